"""LVIS v1 on COCO's images; models need `num_classes = NUM_CLASSES`."""

from detectron2.config import LazyCall as L

from co_detr.data.coco import load_lvis
from co_detr.engine.evaluators import LvisDetectionEvaluator

from .coco import data, dataloader

NUM_CLASSES = 1203

data.train = "datasets/lvis_v1/annotations/lvis_v1_train.json"
data.val = "datasets/lvis_v1/annotations/lvis_v1_val.json"
# Both sets have images of COCO's train2017 and val2017.
data.train_images = data.val_images = "datasets/coco"


def _lvis(split):
    return L(load_lvis)(
        annotation_file=f"${{data.{split}}}",
        image_root=f"${{data.{split}_images}}",
        num_classes="${model.num_classes}",
        invalid_boxes="${data.invalid_boxes}",
        repeat_threshold=0.0,
    )


dataloader.train.dataset = _lvis("train")
dataloader.train.dataset.update(with_masks=None, score_weights=False)  # see coco.py
dataloader.test.dataset = _lvis("val")
dataloader.evaluator = L(LvisDetectionEvaluator)(
    annotation_file="${data.val}", output_dir="${train.output_dir}", max_detections=300
)
