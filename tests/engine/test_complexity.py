"""FLOPs by part: against a count by hand, and nothing for the auxiliary part at test time."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from fvcore.nn import FlopCountAnalysis

from co_detr.engine.config import learns_masks, load_config
from co_detr.engine.memory_use import random_batch
from co_detr.layers import MultiScaleDeformableAttention
from co_detr.tools.complexity import FLOP_HANDLERS, Complexity, PartCost, analyze
from tests.modeling.builders import NUM_CLASSES, NUM_QUERIES, shrink, tiny_model
from tests.paths import config_path

pytestmark = pytest.mark.cpu_only("operations are counted, which are the same everywhere")

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 96, 128
TOKENS_OF_FINEST = 12 * 16
TOKENS = 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
# The tiny models: width, hidden width, heads, levels, points, layers.
C, HIDDEN, HEADS, LEVELS, POINTS, LAYERS = 32, 48, 4, 4, 2, 2
SAMPLES = HEADS * LEVELS * POINTS


def count(heads: int, training: bool) -> Complexity:
    model = tiny_model(heads).train(training)
    return analyze(model, random_batch(HEIGHT, WIDTH, 1, 3, NUM_CLASSES))


@pytest.fixture(scope="module")
def inference() -> dict[int, Complexity]:
    return {heads: count(heads, training=False) for heads in (0, 2)}


def part(complexity: Complexity, name: str) -> PartCost:
    return next(part for part in complexity.parts if part.name == name)


def deformable_attention(queries: int) -> int:
    """Multiply-adds of projections and sampling, counted by hand."""
    projections = TOKENS * C * C + queries * C * (SAMPLES * 3) + queries * C * C
    sampling = queries * SAMPLES * 4 * (C // HEADS)
    return projections + sampling


def norms(number: int, queries: int) -> int:
    """fvcore counts five operations per normalized element with scale and shift."""
    return number * 5 * queries * C


def test_attention_operator_equals_the_count_by_hand():
    shapes = [(12, 16), (6, 8), (3, 4), (2, 2)]

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MultiScaleDeformableAttention(C, HEADS, LEVELS, POINTS)

        def forward(self, query, value, reference):
            return self.layer(query, value, reference, shapes)

    queries = 7
    inputs = (
        torch.rand(1, queries, C),
        torch.rand(1, TOKENS, C),
        torch.rand(1, queries, LEVELS, 2),
    )
    flops = FlopCountAnalysis(Call(), inputs).set_op_handle(**FLOP_HANDLERS)
    flops.unsupported_ops_warnings(False).tracer_warnings("none")
    assert flops.total() == deformable_attention(queries)


def test_encoder_and_decoder_equal_the_count_by_hand(inference):
    layer = deformable_attention(TOKENS) + 2 * TOKENS * C * HIDDEN + norms(2, TOKENS)
    assert part(inference[2], "encoder").flops == LAYERS * layer

    self_attention = 4 * NUM_QUERIES * C * C + 2 * NUM_QUERIES**2 * C
    layer = self_attention + deformable_attention(NUM_QUERIES)
    layer += 2 * NUM_QUERIES * C * HIDDEN + norms(3, NUM_QUERIES)
    assert part(inference[2], "decoder").flops == LAYERS * layer

    heads = NUM_QUERIES * C * (NUM_CLASSES + C + C + 4)
    assert part(inference[2], "heads").flops == LAYERS * heads


def test_auxiliary_parts_cost_parameters_only(inference):
    auxiliary = inference[2].auxiliary
    assert auxiliary.parameters > 0
    assert (auxiliary.flops, auxiliary.activations) == (0, 0)
    assert len([part for part in inference[2].parts if part.name.startswith("auxiliary")]) == 5
    plain, collaborative = inference[0].total, inference[2].total
    assert collaborative.flops == plain.flops
    assert collaborative.activations == plain.activations
    assert collaborative.parameters == plain.parameters + auxiliary.parameters
    assert plain.parameters == sum(p.numel() for p in tiny_model(0).parameters())


def test_training_pays_for_the_auxiliary_parts(inference):
    training = count(2, training=True)
    assert all(part.flops > 0 for part in training.parts if part.name.startswith("auxiliary"))
    for name in ("backbone", "neck", "encoder", "query selection"):
        assert part(training, name) == part(inference[2], name)
    assert part(training, "decoder").flops > part(inference[2], "decoder").flops
    assert "torchvision::roi_align" in training.uncounted  # as the documentation says


def test_no_matrix_product_is_left_out(inference):
    """What has no count is elementwise work: no product of two tensors hides in it."""
    products = ("mm", "matmul", "linear", "conv", "attention", "einsum", "attn", "grid_sampler")
    hidden = [name for name in inference[2].uncounted if any(word in name for word in products)]
    assert not hidden


def test_tool_prints_and_writes(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "analyze_model.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    output = tmp_path / "new" / "cost.json"
    config = config_path("quickstart")
    arguments = ["--config-file", config, "--size", "96x128", "--training", "--output", str(output)]
    assert tool.main([*arguments, "model.num_classes=3"]) == 0
    printed = capsys.readouterr().out
    assert "quickstart.py, inference, 1 x 96x128" in printed
    assert "Operators without a count: " in printed
    written = json.loads(output.read_text())
    assert written["overrides"] == ["model.num_classes=3"]
    assert written["inference"]["auxiliary"]["flops"] == 0
    assert written["training"]["auxiliary"]["flops"] > 0
    total = sum(part["flops"] for part in written["training"]["parts"])
    assert total == written["training"]["total"]["flops"] > 0

    assert tool.main(["--config-file", "nothing.py"]) == 2
    assert "config file 'nothing.py' does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--config-file", config, "--size", "96"])
    assert "'96' is not HEIGHTxWIDTH" in capsys.readouterr().err


def test_the_mask_head_is_counted_where_it_runs():
    cfg = shrink(load_config(config_path("co_detr_r50_instance")))
    cfg.model.num_classes = NUM_CLASSES
    cfg.model.postprocessor.max_detections = 4
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    batch = random_batch(HEIGHT, WIDTH, 1, 3, NUM_CLASSES, masks=learns_masks(cfg.model))
    bitmaps = batch[0]["instances"].gt_masks.tensor
    assert bitmaps.shape == (3, HEIGHT, WIDTH) and bitmaps.flatten(1).any(1).all()
    head = part(analyze(model.eval(), batch), "mask head")
    assert head.parameters == sum(weight.numel() for weight in model.mask_head.parameters())
    # The first convolutions are over the whole map, those of regions over their cells.
    assert head.flops > 9 * C * C * (2 * TOKENS_OF_FINEST + 4 * 14 * 14)
    assert head.activations > 0
