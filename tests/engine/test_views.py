"""Views of an image and the way back: sizes, mirror, tiles, masks, and both numbers of a run."""

import json

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from co_detr.engine.train import run_evaluation_only
from co_detr.engine.views import TTA, Tiles, View, detect_views, named_tta, see, whole
from co_detr.errors import ConfigError
from co_detr.modeling.fusion import NmsFusion, WeightedBoxesFusion
from co_detr.modeling.postprocess import DetectedMasks
from tests.engine.masked import write_masks

AS_IT_IS = T.AugmentationList([])
SIZE = (80, 120)
BOXES = [[8, 4, 40, 28], [52, 40, 76, 76], [90, 8, 118, 60]]  # one of each color


def picture(boxes=BOXES):
    """Black, with one filled box in each color channel."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    for channel, (left, top, right, bottom) in enumerate(boxes):
        pixels[top:bottom, left:right, channel] = 255
    return pixels


def color_detector(batch):
    """Finds the box around all pixels of each color; what is cut off has the better score.

    The left half of a box is its mask.
    """
    outputs = []
    for sample in batch:
        image, size = sample["image"], (sample["height"], sample["width"])
        factor = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
        boxes, scores, classes = [], [], []
        for channel, pixels in enumerate(image > 127):
            rows, columns = (pixels.any(axis).nonzero() for axis in (1, 0))
            if len(rows):
                box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).squeeze(1)
                touches = box[:2].min() == 0 or box[2] == image.shape[2] or box[3] == image.shape[1]
                boxes.append(box * factor)
                scores.append(0.9 if touches else 0.8 - channel / 100)
                classes.append(channel)
        found = Instances(
            size,
            pred_boxes=Boxes(torch.stack(boxes) if boxes else torch.zeros(0, 4)),
            scores=torch.tensor(scores),
            pred_classes=torch.tensor(classes, dtype=torch.long),
        )
        masks = torch.zeros(len(found), 8, 8)
        masks[:, :, :4] = 1
        found.pred_masks = DetectedMasks(masks, found.pred_boxes.tensor.clone(), size)
        found.mask_scores = found.scores / 2
        outputs.append({"instances": found[found.scores.argsort(descending=True)]})
    return outputs


def detect(plan, pixels=None, model=color_detector, **options):
    pixels = picture() if pixels is None else pixels
    return detect_views(model, plan, [see(plan, pixels, AS_IT_IS, "it")], **options)[0]


def by_class(found):
    return found.pred_boxes.tensor[found.pred_classes.argsort()].tolist()


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("region", [whole(SIZE), (4, 2, 120, 78)])
def test_the_way_back_is_exact(region, scale, mirror):
    view = View(region, scale, mirror)
    image = view.network_input(picture(), AS_IT_IS, "it")
    height, width = view.size
    assert image.shape == (3, scale * height, scale * width)
    found = color_detector([{"image": image, "height": height, "width": width}])[0]["instances"]
    back = view.to_image(found, SIZE)
    assert by_class(back) == BOXES
    masks = back.pred_masks[back.pred_classes.argsort()].tensor
    left, top, right, bottom = BOXES[0]
    half = masks.new_zeros(SIZE)
    middle = (left + right) // 2
    half[top:bottom, slice(middle, right) if mirror else slice(left, middle)] = True
    assert (masks[0] & half).sum() > 0.9 * (masks[0] | half).sum()  # but for corners


def test_a_single_view_is_left_as_it_is():
    plain = color_detector(
        [{"image": torch.from_numpy(picture()).permute(2, 0, 1)} | {"height": 80, "width": 120}]
    )[0]["instances"]
    twice = Instances.cat([plain, plain])  # which a fusion would join
    for plan in (TTA(mirror=False), Tiles(size=120)):
        found = detect(plan, model=lambda batch: [{"instances": twice}] * len(batch))
        assert found.pred_boxes.tensor.equal(twice.pred_boxes.tensor)
        assert found.scores.equal(twice.scores)


def test_what_is_known_is_not_computed_again():
    views = see(TTA((1.0, 0.5)), picture(), AS_IT_IS, "it")
    sizes = []

    def model(batch):
        sizes.extend(tuple(sample["image"].shape[1:]) for sample in batch)
        return color_detector(batch)

    plan = TTA((1.0, 0.5))
    expected = detect_views(model, plan, [views])[0]
    assert sizes == [SIZE, SIZE, (40, 60), (40, 60)]
    sizes.clear()
    known = color_detector([{"image": views[0].image, "height": 80, "width": 120}])
    found = detect_views(model, plan, [views], plain=[known[0]["instances"]])[0]
    assert sizes == [SIZE, (40, 60), (40, 60)]
    assert found.scores.equal(expected.scores)
    assert found.pred_boxes.tensor.equal(expected.pred_boxes.tensor)


@pytest.mark.parametrize("fusion", [NmsFusion(), WeightedBoxesFusion()])
def test_views_that_agree_become_one_list(fusion):
    sizes = []

    def model(batch):
        sizes.append([tuple(sample["image"].shape[1:]) for sample in batch])
        return color_detector(batch)

    found = detect(TTA((0.5, 1.0), fusion=fusion), model=model, batch_size=4)
    assert sizes == [[(40, 60)] * 2, [SIZE] * 2]  # equal sizes run together, others never
    assert by_class(found) == BOXES and len(found) == 3
    assert found.scores.tolist() == pytest.approx([0.8, 0.79, 0.78])
    # The mirrored views see the other half: the mean of both is 0.5 everywhere in the box.
    probabilities = found.pred_masks.probabilities
    assert probabilities.allclose(torch.tensor(0.5), atol=0.3)
    assert probabilities.mean().item() == pytest.approx(0.5, abs=0.02)
    assert found.mask_scores.tolist() == pytest.approx([0.4, 0.395, 0.39])


def test_masks_are_those_of_the_object_and_not_of_others():
    """A second object of the class, which only one of the views finds, keeps its own mask."""
    near = Boxes(torch.tensor([[0.0, 0, 40, 40], [60, 0, 100, 40], [0, 60, 20, 80]]))

    def model(batch):
        outputs = []
        for number in range(len(batch)):
            found = Instances(
                SIZE,
                pred_boxes=near,
                scores=torch.tensor([0.9, 0.8, 0.1]),
                pred_classes=torch.zeros(3, dtype=torch.long),
                pred_masks=DetectedMasks(
                    torch.tensor([1.0, 0, 0])[:, None, None].expand(-1, 8, 8), near.tensor, SIZE
                ),
            )
            outputs.append({"instances": found[:1] if number else found})
        return outputs

    found = detect(TTA(fusion=WeightedBoxesFusion(score="max")), model=model, batch_size=2)
    # Mirrored, the first box of the second view lies in the right of the image; the last of the
    # first view has no place in a list of three.
    order = found.pred_boxes.tensor[:, 0].argsort()
    assert found.pred_boxes.tensor[order, 0].tolist() == [0, 60, 80]
    means = found.pred_masks.probabilities[order].mean((1, 2))
    assert means[0] > 0.9 and means[1] < 0.1 and means[2] > 0.9


def test_small_views_are_for_large_objects():
    plan = TTA((0.5,), mirror=False, smallest=(15.0,))
    found = detect(plan)
    sides = (found.pred_boxes.area().sqrt() / 2).tolist()
    assert len(found) == 1 and min(sides) >= 15  # pixels of the network input
    rest = detect(TTA((0.5,), mirror=False, largest=(15.0,)))
    assert sorted(by_class(found) + by_class(rest)) == sorted(BOXES)


def test_tiles_cover_the_image_evenly():
    tiles = Tiles(size=50, overlap=0.2)
    regions = tiles.regions((50, 120))
    assert regions == [(0, 0, 50, 50), (35, 0, 85, 50), (70, 0, 120, 50)]
    for size in ((1, 1), (49, 51), (333, 90)):
        regions = tiles.regions(size)
        seen = np.zeros(size, bool)
        for left, top, right, bottom in regions:
            assert (right - left, bottom - top) == (min(50, size[1]), min(50, size[0]))
            seen[top:bottom, left:right] = True
        assert seen.all()
    assert tiles.views((50, 120))[-1].region == (0, 0, 120, 50)
    assert Tiles(size=50, full_image=False).views((50, 50)) == tiles.views((50, 50))
    assert len(Tiles(size=50, overlap=0).regions((100, 100))) == 4


def test_parts_of_objects_give_way_to_the_whole():
    """Each object is cut in some tile, where its score is higher, and whole in another one."""
    boxes = [[30, 10, 62, 36], [4, 40, 30, 76], [70, 44, 100, 70]]
    tiles = Tiles(size=60, overlap=0.6, full_image=False)
    found = detect(tiles, picture(boxes), batch_size=3)
    assert by_class(found) == boxes
    assert found.scores.max() < 0.9


def test_an_object_larger_than_a_tile_is_found_in_the_full_image():
    boxes = [[4, 4, 116, 76]]
    found = detect(Tiles(size=60, overlap=0.3), picture(boxes))
    assert by_class(found) == boxes
    without = detect(Tiles(size=60, overlap=0.3, full_image=False), picture(boxes))
    assert len(without) > 1


def test_a_whole_one_of_low_score_or_another_class_takes_nothing_away():
    part = torch.tensor([[40.0, 10, 60, 30]])
    for score, label, kept in ((0.01, 0, 2), (0.8, 1, 2), (0.8, 0, 1)):

        def model(batch, score=score, label=label):
            tile = Instances(
                (80, 60),
                pred_boxes=Boxes(part),
                scores=torch.tensor([0.9]),
                pred_classes=torch.tensor([0]),
            )
            full = Instances(
                SIZE,
                pred_boxes=Boxes(torch.tensor([[40.0, 10, 90, 30]])),
                scores=torch.tensor([score]),
                pred_classes=torch.tensor([label]),
            )
            wide = batch[0]["width"] == 120
            nothing = tile[:0]
            first = model.calls == 0
            model.calls += 1
            return [{"instances": full if wide else tile if first else nothing}]

        model.calls = 0
        assert len(detect(Tiles(size=60, overlap=0), picture()[:60], model=model)) == kept


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TTA(()), r"scales=\[\] of the test-time augmentation"),
        (lambda: TTA((0.0,)), "must be numbers above 0"),
        (lambda: TTA((1.0, 2.0), smallest=(1.0,)), "has 2 scales but 1 smallest"),
        (lambda: Tiles(0), "tiles of 0 pixels"),
        (lambda: Tiles(10, 1.0), "the overlap 1.0 of tiles"),
        (lambda: named_tta("flop", "dataloader.tta"), "dataloader.tta=flop is no test-time"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_evaluation_reports_both(tiny_cfg, tiny_data, tmp_path):
    write_masks(tiny_data)
    masked = "model._target_=tests.engine.masked.MaskedDetector"
    node = "dataloader.tta={_target_: co_detr.engine.views.TTA, scales: [1.0], mirror: false}"
    metrics = run_evaluation_only(tiny_cfg(masked, node), resume=False)
    for name in ("AP", "AP50", "AP-cell", "segm/AP"):
        assert metrics[f"tta/{name}"] == metrics[name]  # its only view is the plain one
    assert "roi/AP" in metrics
    folder = tmp_path / "out"
    assert json.loads((folder / "metrics.json").read_text())["tta/AP"] == metrics["AP"]
    plain, seen_twice = (
        json.loads((path / "coco_instances_results.json").read_text())
        for path in (folder, folder / "tta")
    )
    assert plain == seen_twice

    mirrored = run_evaluation_only(tiny_cfg(masked, "dataloader.tta=flip"), resume=False)
    assert mirrored["AP"] == metrics["AP"]
    flipped = json.loads((folder / "tta" / "coco_instances_results.json").read_text())
    assert flipped != plain and len(flipped) > 0
