"""Large-scale jitter on fixed squares, as in the reference's LSJ configs."""

from detectron2.config import LazyCall as L

from co_detr.data.augmentation import lsj_train_augmentation
from co_detr.data.copy_paste import CopyPaste
from co_detr.modeling import BatchPadding


def use_lsj(model, dataloader, size):
    """Trains and tests on gray-padded squares of `size` pixels whose padding is not masked.

    `model.padding.square_size` sets the size everywhere. Where the data have masks, objects are
    pasted, and boxes are drawn around what a crop leaves of the masks.
    """
    model.padding = L(BatchPadding)(square_size=size, value=114.0, masked=False)
    square = "${model.padding.square_size}"
    dataloader.train.mapper.augmentations = L(lsj_train_augmentation)(size=square)
    dataloader.train.mapper.recompute_boxes = True
    dataloader.train.copy_paste = L(CopyPaste)(
        max_pasted=100, pad_value="${model.padding.value}", keep_masks=None
    )
    dataloader.test.mapper.augmentations.update(short_edge=square, max_size=square)
