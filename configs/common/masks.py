"""Masks in the data, for models that learn them."""


def use_masks(dataloader):
    """Training images come with masks of their objects; the evaluation also scores masks."""
    dataloader.train.dataset.with_masks = True
    dataloader.train.mapper.use_instance_mask = True
