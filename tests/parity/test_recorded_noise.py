"""Recorded noise reaches the slots that it was drawn for."""

import pytest
import torch

from co_detr.modeling.queries import DenoisingQueries
from co_detr.structures import GroundTruth
from tests.golden import load_units
from tests.modeling.builders import factor_of, random_memory
from tests.parity.oracle.training import flat_slots, recorded_noise


@pytest.mark.parametrize("num_gts", [[3, 5], [0, 2], [1], [2, 0, 3], [0, 0]])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_slots_in_the_order_of_the_reference(num_gts, num_blocks):
    longest, expected = max(num_gts), []
    for block in range(num_blocks):
        for negative in range(2):
            for image, number in enumerate(num_gts):
                start = ((image * num_blocks + block) * 2 + negative) * longest
                expected += range(start, start + number)
    assert flat_slots(num_gts, num_blocks).tolist() == expected


def make_step(num_gts):
    source = DenoisingQueries(num_classes=7, embed_dim=32)
    size = (96, 128)
    truth = [
        GroundTruth(torch.zeros(n, dtype=torch.long), torch.full((n, 4), 0.5), factor_of(size))
        for n in num_gts
    ]
    return source, random_memory(image_sizes=[size] * len(num_gts)), truth


def raw_draws(number, num_flipped):
    return {
        "label_uniform": torch.where(torch.arange(number) < num_flipped, 0.1, 0.9),
        "label_new": torch.full((num_flipped,), 6),
        "box_sign01": torch.ones(number, 4),
        "box_uniform": torch.zeros(number, 4),
    }


def test_the_draws_are_used_and_only_inside():
    source, memory, truth = make_step([2, 1])
    with recorded_noise(source, raw_draws(300, 3), [2, 1]):
        group = source(memory, truth)
    labels = source.label_embedding.weight
    # The first positives of the first block: two of the first image, one of the second.
    assert torch.equal(group.content[0, :2], labels[[6, 6]].to(group.content.dtype))
    assert torch.equal(group.content[1, 0], labels[6].to(group.content.dtype))
    assert torch.equal(group.content[0, 4], labels[0].to(group.content.dtype))
    torch.testing.assert_close(group.reference[0, :2], torch.full((2, 4), 0.5))
    assert "draw" not in vars(source)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (raw_draws(299, 3), "noises 300 boxes"),
        ({**raw_draws(300, 3), "box_uniform": torch.zeros(10, 4)}, "'box_uniform': 10"),
        ({**raw_draws(300, 3), "label_new": torch.zeros(2)}, "replaces 3 labels, the reference 2"),
    ],
)
def test_other_numbers_of_draws_are_an_error(raw, message):
    source, memory, truth = make_step([2, 1])
    with pytest.raises(RuntimeError, match=message), recorded_noise(source, raw, [2, 1]):
        source(memory, truth)


def test_the_shipped_units_have_a_batch_without_any_ground_truth():
    assert 0 in [entry["pad_size"] for entry in load_units()["dn_generator"]]
