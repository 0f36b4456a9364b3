"""Large-scale jitter on fixed squares, as in the reference's LSJ configs."""

from detectron2.config import LazyCall as L

from co_detr.data.loader import lsj_train_augmentation
from co_detr.modeling import BatchPadding


def use_lsj(model, dataloader, size):
    """Trains and tests on gray-padded squares of `size` pixels whose padding is not masked.

    `model.padding.square_size` sets the size everywhere.
    """
    model.padding = L(BatchPadding)(square_size=size, value=114.0, masked=False)
    square = "${model.padding.square_size}"
    dataloader.train.mapper.augmentations = L(lsj_train_augmentation)(size=square)
    dataloader.test.mapper.augmentations.update(short_edge=square, max_size=square)
