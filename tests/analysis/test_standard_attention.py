"""The measures on models with standard attention, whose encoder has a single level."""

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.config import apply_overrides, load_config
from co_detr.tools.analyze.attention import captured_attention, measure_attention
from co_detr.tools.analyze.conflict import measure_conflict
from co_detr.tools.analyze.discriminability import measure_discriminability
from co_detr.tools.analyze.subjects import Subject
from tests.analysis.cases import plain, tiny_samples, tiny_subject
from tests.modeling.builders import NUM_CLASSES, randomize, shrink
from tests.paths import config_path


def _subject(name):
    cfg = shrink(load_config(config_path(name)))
    apply_overrides(cfg, [f"model.num_classes={NUM_CLASSES}"])
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    randomize(model)
    return Subject(name, model, cfg)


@pytest.mark.parametrize("name", ["conditional_detr_r50", "dab_detr_r50"])
def test_captured_weights_are_those_of_the_output(name):
    subject, samples = _subject(name), tiny_samples(((60, 128), (96, 128)))
    model, seen = subject.model, {}
    attention = model.decoder.layers[-1].cross_attention
    batch = [sample.input for sample in samples]  # the first image is padded
    with torch.no_grad(), captured_attention(model.decoder) as captured:
        memory = model.encode(model.preprocess(batch))
        handle = attention.register_forward_hook(lambda *call: seen.update(output=call[2]))
        logits, boxes = model.decode(memory)
        handle.remove()
        value = attention.value(memory.tokens)[0].unflatten(-1, (4, -1))  # (S, H, D)
        weights = captured[-1].weights  # (Q, H, S)
        mixed = torch.einsum("qhs,shd->qhd", weights, value).flatten(1)
        torch.testing.assert_close(attention.out_proj(mixed), seen["output"][0])
    assert len(captured) == model.decoder.num_layers
    assert memory.padding_mask[0].any() and not weights[..., memory.padding_mask[0]].any()
    with torch.no_grad():
        again = model.decode(memory)
    assert torch.equal(again[0], logits) and torch.equal(again[1], boxes)
    (found,) = captured[-1].maps(torch.ones(len(weights), dtype=torch.bool))
    assert found.shape == memory.level_shapes[0]
    torch.testing.assert_close(found.sum(), torch.tensor(4.0 * len(weights)))


def test_sections_compare_both_kinds():
    subjects = [_subject("co_dab_detr_r50"), tiny_subject(2)]
    samples = tiny_samples(num_gts=(3, 2))
    attention = measure_attention(subjects, samples, plain)
    assert [row[0] for row in attention.tables[0].rows] == ["co_dab_detr_r50", "K = 2"]
    level = attention.tables[0].columns.index("last layer, level 2")
    assert attention.tables[0].rows[0][level] is None  # it has a single level
    discriminability = measure_discriminability(subjects, samples, plain)
    first = discriminability.tables[0].rows[0]
    assert first[1] == first[2] and first[3] is None
    conflict = measure_conflict(subjects, samples, plain)
    assert len(conflict.tables[0].rows) == 2
