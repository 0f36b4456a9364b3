"""The whole model on an emulated GPU: devices, precision under autocast, and waits of the host."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from co_detr.engine.config import load_config
from co_detr.structures import tensor_on, to_device
from tests.cuda_emulation import (
    DEVICE,
    EmulatedCuda,
    emulate,
    emulated_autocast,
    to_emulated,
)
from tests.gpu.steps import losses_of_groups, pixels_to_predictions, training_output
from tests.modeling.builders import make_batch, randomize, shrink, tiny_model, with_masks
from tests.paths import config_path

pytestmark = pytest.mark.cpu_only("emulates a GPU on the CPU")

FAMILIES = [
    "co_detr_r50",
    "co_detr_r50_k6",
    "co_detr_r50_mask_rcnn",
    "co_deformable_detr_swin_t_12ep",
    "co_dino_r50",
    "co_dino_r50_instance",
    "co_dino_r50_lsj_12ep",
    "co_dino_swin_l_12ep",
    "co_dino_vit_l_o365_12ep",
    "co_conditional_detr_r50",
    "co_dab_detr_r50",
    "deformable_detr_single_stage_r50",
    "group_detr_r50",
    "h_deformable_detr_r50",
    "atss_on_encoder_r50",
    "faster_rcnn_on_encoder_r50",
]
# Their modules are those of the others, put together in another way.
NO_TYPES_OF_THEIR_OWN = {
    "co_detr_r50",
    "co_dino_swin_l_12ep",
}


def build(name):
    cfg = shrink(load_config(config_path(name), ["model.num_classes=5"]))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    randomize(model)
    return model


def losses_of(model, masks=False):
    torch.manual_seed(1)
    with EventStorage():
        return model(with_masks(make_batch()) if masks else make_batch())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, None) for name in FAMILIES),
        *((name, torch.bfloat16) for name in FAMILIES if name not in NO_TYPES_OF_THEIR_OWN),
        ("co_detr_r50_k6", torch.float16),
    ],
    ids=str,
)
def test_every_family_trains_and_detects_on_one_device(name, dtype):
    """That no tensor is left on the host is what the emulation itself checks."""
    masks = "mask" in name or "instance" in name
    model = build(name)
    expected = losses_of(model, masks) if dtype is None else {}
    with EmulatedCuda(), nullcontext() if dtype is None else emulated_autocast(dtype):
        losses = losses_of(emulate(model), masks)
        assert {loss.device for loss in losses.values()} == {DEVICE}
        found = {key: value.item() for key, value in losses.items()}
        detections = model.eval()(make_batch())
        for result in detections:
            fields = result["instances"].get_fields()
            devices = {fields[key].device for key in ("scores", "pred_classes")}
            assert {*devices, fields["pred_boxes"].device} == {DEVICE}
    assert found and all(torch.tensor(value).isfinite() for value in found.values())
    if dtype is None:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Nothing but the order of sums differs: kernels are the CPU's.
            assert found[key] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_are_float32_under_the_autocast_of_cuda(dtype):
    """Unlike the CPU's it computes layer norms, and what is added to them, in float32."""
    model = build("co_detr_r50")
    with EmulatedCuda(), emulated_autocast(dtype), EventStorage():
        emulate(model)
        batch = make_batch()
        output = model.forward_training(
            model.preprocess(batch), [sample["instances"] for sample in batch]
        )
        assert output.memory.tokens.dtype == torch.float32
        for group, predicted in zip(output.groups, output.predictions, strict=True):
            assert group.reference.dtype == predicted.boxes.dtype == torch.float32
        truth = batch[0]["instances"].gt_boxes.tensor / torch.tensor([128, 96, 128, 96])
        middle = (truth[:, :2] + truth[:, 2:]) / 2
        for targets in output.targets:
            boxes, labels = (tensor.cpu() for tensor in (targets.boxes, targets.labels))
            centers = boxes[:, 0][labels[:, 0] < model.num_classes][:, :2]
            distance = (centers[:, None] - middle).abs().amax(-1).amin(-1)
            assert len(centers) and distance.max() < 1e-6


@pytest.mark.parametrize(
    ("name", "most"),
    # One to fetch the costs of matching; of every head one to choose its positive queries, and of
    # a dense one another to find its positives. The mask head has one to choose its boxes.
    [
        ("deformable_detr_r50", 1),
        ("co_detr_r50", 4),
        ("co_dino_r50", 4),
        ("co_dino_r50_instance", 5),
        ("co_dab_detr_r50", 4),
    ],
)
def test_a_training_step_waits_for_the_device_only_where_it_must(name, most):
    model = build(name)
    with EmulatedCuda() as device:
        losses_of(emulate(model), masks="instance" in name)
    assert sum(device.own_waits().values()) <= most, device.own_waits()


@pytest.mark.parametrize(("name", "most"), [("deformable_detr_r50", 1), ("co_detr_r50", 4)])
def test_a_micro_batch_waits_no_more_often(name, most):
    """The counts of the step are the host's, or stay on the device."""
    model = build(name)
    with EmulatedCuda() as device, EventStorage():
        counts = emulate(model).count(make_batch())
        device.waits.clear()
        model(make_batch(), counts)
    assert sum(device.own_waits().values()) <= most, device.own_waits()


def test_no_wait_from_pixels_to_predictions_and_in_the_criterion():
    model, batch = build("co_detr_r50"), make_batch()
    with EmulatedCuda() as device:
        pixels_to_predictions(emulate(model), batch)
        assert not device.waits, device.waits
        output = training_output(model, batch)
        device.waits.clear()
        losses = losses_of_groups(model, output)
        assert not device.waits, device.waits
        for name, value in losses.items():
            assert value.item() == output.losses[name].item(), name


def test_detecting_waits_for_the_device_once():
    """For the check that boxes are finite."""
    model = build("deformable_detr_r50").eval()
    with EmulatedCuda() as device:
        emulate(model)(make_batch())
    assert sum(device.own_waits().values()) == 1, device.own_waits()


class Calls(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [0, 2, 6])
def test_the_backward_pass_asks_for_no_value(heads):
    """As the gradient of a product along an axis would, for each of its calls."""
    model = tiny_model(heads)
    total = sum(losses_of(model).values())
    with Calls() as calls:
        total.backward()
    assert not calls.counts["aten::_local_scalar_dense"]
    assert not any("cumprod" in name for name in calls.counts)


class TestTheEmulationItself:
    def test_counts_where_a_gpu_would_make_the_host_wait(self):
        with EmulatedCuda() as device:
            x = to_emulated(torch.tensor([1.0, 0.0, 2.0]))
            waits = {
                "item": lambda: float(x.sum()),
                "aten.nonzero.default": lambda: x.nonzero(),
                "boolean index": lambda: x[x > 0],
                "index of the host": lambda: x[torch.tensor([0, 2])],
                "copy": lambda: x.new_tensor([1.0, 2.0]),
                "repeat_interleave": lambda: x.repeat_interleave(x.long()),
            }
            for kind, wait in waits.items():
                device.waits.clear()
                wait()
                assert kind in {found for found, _ in device.waits}, (kind, device.waits)
            for wait in (
                lambda: x.cpu(),
                lambda: x.to("cpu"),
                lambda: torch.ones(3).to(DEVICE),
                lambda: x.copy_(torch.ones(3)),
                lambda: x.tolist(),
                lambda: bool(x.any()),
            ):
                device.waits.clear()
                wait()
                assert sum(device.waits.values()) == 1, device.waits

    def test_does_not_count_what_is_asynchronous(self):
        with EmulatedCuda() as device:
            x = to_emulated(torch.arange(3.0))
            y = to_device(torch.ones(3), DEVICE) + tensor_on([1.0, 2.0, 3.0], x.dtype, DEVICE)
            z = x[x.argsort()] + torch.zeros(3, device=DEVICE) + x.new_full((), 2.0) * 3
            assert not device.waits
            assert y.cpu().tolist() == [2, 3, 4] and z.cpu().tolist() == [2 * 3, 7, 8]

    def test_tensors_of_two_devices_do_not_meet(self):
        with EmulatedCuda():
            x = to_emulated(torch.ones(3))
            with pytest.raises(RuntimeError, match="host and of the device meet"):
                x + torch.ones(3)
            with pytest.raises(RuntimeError, match="host and of the device meet"):
                torch.cat([x, torch.ones(3)])
            assert (x + torch.tensor(1.0)).device == DEVICE  # a number, as on a GPU

    def test_writes_and_views_reach_the_tensor_they_came_from(self):
        with EmulatedCuda():
            x = to_emulated(torch.zeros(2, 3))
            x[0].add_(1)
            x[1, 1:] = 5.0
            assert x.tolist() == [[1, 1, 1], [0, 5, 5]]
