"""A training step without any random choice, which the CPU and a GPU therefore do alike."""

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from co_detr.modeling.losses import Assignment, score_groups
from co_detr.structures import Predictions, QuerySet, TrainingOutput
from tests.modeling.builders import make_batch, randomize, tiny_model

# Everything is sampled, and there are no fillers, so that only the order of what is drawn differs.
NOTHING_DRAWN = [
    "model.auxiliary.positive_queries.padding=mask",
    "model.auxiliary.positive_queries.max_queries=1000",
    "model.auxiliary.roi.rpn.batch_size_per_image=100000",
    "model.auxiliary.roi.roi_heads.batch_size_per_image=100000",
]


def build(device: torch.device, dtype: torch.dtype = torch.float32, heads: int = 2) -> nn.Module:
    """A tiny Co-Deformable-DETR, with an ATSS head, or with Faster R-CNN as well.

    Its weights are the same everywhere. Detectron2's RPN knows float32 alone.
    """
    drawn = [name for name in NOTHING_DRAWN if heads == 2 or ".roi." not in name]
    model = tiny_model(heads, drawn).cpu()
    randomize(model, scale=0.05)
    return model.to(device, dtype)


def losses_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with EventStorage():
        return model(make_batch())


def step(model: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses, and gradients on the host in float64."""
    model.zero_grad(set_to_none=True)
    losses = losses_of(model)
    sum(losses.values()).backward()
    gradients = {
        name: parameter.grad.cpu().double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: loss.item() for name, loss in losses.items()}, gradients


def pixels_to_predictions(model: nn.Module, batch: list[dict]) -> Predictions:
    """What no value has to be known for on the host: preprocessing, encoder, queries, decoder."""
    memory = model.encode(model.preprocess(batch))
    return model.decoder(QuerySet.concat([model.inference_source(memory)]), memory)


def training_output(model: nn.Module, batch: list[dict]) -> TrainingOutput:
    with EventStorage():
        return model.forward_training(
            model.preprocess(batch), [sample["instances"] for sample in batch]
        )


def losses_of_groups(model: nn.Module, output: TrainingOutput) -> dict[str, Tensor]:
    """The criterion on what is decoded and assigned."""
    assignment = Assignment(output.targets, output.proposal_targets)
    return score_groups(
        output.groups, output.predictions, assignment, output.memory.geometry, model.criterion
    )
