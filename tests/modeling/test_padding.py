"""What stands beside or around an image in a batch does not change what is detected in it."""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from tests.device import DEVICE
from tests.modeling.builders import (
    decoder_detections,
    detect,
    evaluating,
    make_batch,
    randomize,
    tiny_model,
)

SIZES = ((100, 128), (128, 75))  # each is padded on one side to 128 x 128
STRIDES = (8, 16, 32, 64)


class PatchBackbone(Backbone):
    """Levels of independent patches: unlike a convolutional network (or GroupNorm) it computes
    the cells inside of an image without looking at the padding around."""

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 * 16, channels, 1) for _ in STRIDES])

    def forward(self, images):
        maps = {}
        for conv, stride in zip(self.convs, STRIDES, strict=True):
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % stride, 0, -height % stride))
            pooled = F.avg_pool2d(images, stride // 4)
            maps[f"p{stride}"] = conv(F.pixel_unshuffle(pooled, 4))
        return maps

    def output_shape(self):
        return {f"p{s}": ShapeSpec(channels=self.convs[0].out_channels, stride=s) for s in STRIDES}


def patch_model():
    model = tiny_model(0)
    model.backbone = PatchBackbone(32)
    randomize(model)
    return model.to(DEVICE).double()


def queries_and_outputs(model, batch):
    images = model.preprocess(batch)
    memory = model.encode(images)
    group = model.queries["matching"](memory)
    return group.reference, decoder_detections(model, images)


def test_batched_equals_single():
    model = patch_model()
    batch = make_batch(SIZES)
    with evaluating(model):
        references, joint = queries_and_outputs(model, batch)
        # Tokens that cannot propose (+inf) are more in a padded batch; none may be among the best.
        assert (references < 1).all()
        for index, sample in enumerate(batch):
            reference, (single,) = queries_and_outputs(model, [sample])
            torch.testing.assert_close(references[index : index + 1], reference)
            assert joint[index].image_size == single.image_size == SIZES[index]
            torch.testing.assert_close(joint[index].scores, single.scores, rtol=0, atol=1e-9)
            assert torch.equal(joint[index].pred_classes, single.pred_classes)
            torch.testing.assert_close(
                joint[index].pred_boxes.tensor, single.pred_boxes.tensor, rtol=0, atol=1e-4
            )
            assert single.scores.std() > 1e-3 and single.pred_boxes.tensor.std() > 1


def test_memory_of_the_image_does_not_depend_on_the_padding():
    model = patch_model()
    batch = make_batch(SIZES)
    with evaluating(model):
        joint = model.encode(model.preprocess(batch))
        for index, sample in enumerate(batch):
            single = model.encode(model.preprocess([sample]))
            inside = ~joint.padding_mask[index]
            assert inside.sum() == single.tokens.shape[1] < inside.numel()
            torch.testing.assert_close(
                joint.tokens[index, inside], single.tokens[0], rtol=0, atol=1e-11
            )


def test_neighbors_do_not_matter():
    """The real model: other images of the same padded size leave an image's result alone."""
    model = tiny_model(2)
    randomize(model, scale=0.05)
    first, second = make_batch(((96, 128), (96, 128)), seed=1)
    other = make_batch(((90, 128),), num_gts=(1,), seed=2)[0]
    expected = detect(model, [first])[0]
    for batch in ([first, second], [first, other]):
        found = detect(model, batch)[0]
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )


def test_detections_are_scaled_to_the_requested_size():
    model = tiny_model(0)
    (sample,) = make_batch(((96, 128),), num_gts=(2,))
    plain = detect(model, [sample])[0]
    large = detect(model, [{**sample, "height": 192, "width": 384}])[0]
    assert large.image_size == (192, 384)
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(large.pred_boxes.tensor, plain.pred_boxes.tensor * scale)
    assert torch.equal(large.scores, plain.scores)
