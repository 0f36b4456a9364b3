"""The encoder's score maps, and the section that compares models by them."""

import json

import torch

from co_detr.modeling.geometry import BatchPadding
from co_detr.tools.analyze.discriminability import feature_maps, measure_discriminability
from tests.analysis.cases import encoder_only_subject, plain, tiny_samples, tiny_subject


def test_score_is_the_norm_of_the_feature():
    subject, (sample, _) = tiny_subject(0), tiny_samples()
    with torch.no_grad():
        maps = feature_maps(subject.model, sample)
        memory = subject.model.encode(subject.model.preprocess([sample.input]))
    norms = memory.maps()[0][0].square().sum(0).sqrt()  # (12, 16) of the finest level
    found = maps["level 1"]
    assert found.shape == (96, 128)
    # An odd number of cells would have a pixel in a cell's middle; of 8, none: the two around it.
    middle = found.unfold(0, 8, 8).unfold(1, 8, 8)[..., 3:5, 3:5].mean((-1, -2))
    torch.testing.assert_close(
        middle[1:-1, 1:-1], (norms / norms.max())[1:-1, 1:-1], rtol=0, atol=0.05
    )
    assert maps["fused"].shape == (96, 128)


def test_unmasked_padding_does_not_count():
    """Where the model takes padding for image, maps still cover the image alone."""
    subject, (sample, _) = tiny_subject(0), tiny_samples()
    subject.model.padding = BatchPadding(square_size=160, masked=False)
    with torch.no_grad():
        assert feature_maps(subject.model, sample)["fused"].shape == (96, 128)


def test_section_compares_models_of_any_kind():
    subjects = [tiny_subject(2, seed=1), tiny_subject(0), encoder_only_subject()]
    samples = tiny_samples(((96, 128), (80, 112), (64, 64)), (3, 2, 0))
    section = measure_discriminability(subjects, samples, plain)
    (table,) = section.tables
    assert [row[0] for row in table.rows] == ["K = 2", "K = 0", "encoder only"]
    assert table.columns[:3] == ("model", "fused", "level 1")
    assert all(0 <= area <= 1 for row in table.rows for area in row[1:])
    # The last two have the same encoder, so the same numbers.
    assert table.rows[1][1:] == table.rows[2][1:] != table.rows[0][1:]
    assert section.numbers["K = 2"]["images"] == 2  # the third has no objects
    json.dumps(section.numbers, allow_nan=False)
    assert [chart.name for chart in section.charts] == [
        "models",
        "levels-1",
        "levels-2",
        "levels-3",
    ]
    assert len(section.pictures) == 2
    assert all(
        picture.image.ndim == 3 and picture.image.dtype == "uint8" for picture in section.pictures
    )


def test_without_any_object_there_is_a_sentence():
    section = measure_discriminability([tiny_subject(0)], tiny_samples(num_gts=(0, 0)), plain)
    assert section.text.startswith("No image has both") and not section.charts
