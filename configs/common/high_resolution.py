"""DETR's augmentation at up to twice the size, as in the recipes that start from Objects365."""


def use_high_resolution(dataloader, max_size):
    """Shorter sides of 480 to 1536 pixels, the longer at most `max_size`; test at 1280 x 2048."""
    dataloader.train.mapper.augmentations.update(
        short_edges=list(range(480, 1537, 32)), max_size=max_size
    )
    dataloader.test.mapper.augmentations.update(short_edge=1280, max_size=2048)
