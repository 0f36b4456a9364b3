"""Objects365 v2; models need `num_classes = NUM_CLASSES`."""

from detectron2.config import LazyCall as L

from co_detr.data.coco import load_objects365

from .coco import data, dataloader

NUM_CLASSES = 365

data.train = "datasets/objects365/annotations/zhiyuan_objv2_train.json"
data.train_images = "datasets/objects365/train"
data.val = "datasets/objects365/annotations/zhiyuan_objv2_val.json"
data.val_images = "datasets/objects365/val"


def _objects365(split):
    return L(load_objects365)(
        annotation_file=f"${{data.{split}}}",
        image_root=f"${{data.{split}_images}}",
        num_classes="${model.num_classes}",
        invalid_boxes="${data.invalid_boxes}",
    )


dataloader.train.dataset = _objects365("train")
# See coco.py.
dataloader.train.dataset.update(with_masks=None, repeat_threshold=0.0, score_weights=False)
dataloader.test.dataset = _objects365("val")
