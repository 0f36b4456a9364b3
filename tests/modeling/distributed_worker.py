"""One of two processes: a training step on its half of a batch; see test_distributed.py."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from co_detr.structures import StepCounts
from tests.modeling.builders import make_batch, randomize, tiny_model

# Images of one size, so that splitting the batch changes no padding; ground truths are uneven,
# so that normalizing by a process's own positives would show. (With fewer positives than processes
# the two differ, in the reference too: the mean number of positives is bounded below by 1.)
SIZE = (96, 128)
NUM_GTS = {
    "ordinary": (5, 2),
    "one process without ground truth": (4, 0),
    "two micro-batches in each process": (5, 2, 0, 3),
}


def batch_of(case: str) -> list[dict]:
    return make_batch([SIZE] * len(NUM_GTS[case]), NUM_GTS[case])


def build(heads: int) -> torch.nn.Module:
    """A model in float64, without any random choice in its step."""
    node = "model.auxiliary.positive_queries"
    # Fillers, and what exceeds max_queries, would be drawn at random.
    overrides = [f"{node}.padding=mask", f"{node}.max_queries=300"] if heads else []
    if heads == 6:
        overrides += ["model.auxiliary.roi=null", "model.auxiliary.atss=null"]
    model = tiny_model(heads, overrides)
    randomize(model)
    if heads == 6:  # weights whose sum is below 1 in a process would count as 1, as in mmdet
        model.auxiliary.heads.gfl.class_logits.bias.data.add_(4)
    return model.double()


def step(model: torch.nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return {name: value.detach() for name, value in losses.items()}


def accumulated_step(model: DistributedDataParallel, batch: list[dict]) -> dict[str, torch.Tensor]:
    """As `step`, one image at a time."""
    totals: dict[str, torch.Tensor] = {}
    with EventStorage():
        counts = StepCounts.join([model.module.count([sample]) for sample in batch])
        for number, sample in enumerate(batch, start=1):
            with nullcontext() if number == len(batch) else model.no_sync():
                losses = model([sample], counts)
                sum(losses.values()).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach()
    return totals


def save_results(output_file: str) -> None:
    """Of all cases, by the process of rank 0; every process has to call this."""
    dist.init_process_group("gloo")
    results = {}
    for heads in (0, 1, 6):
        for case in NUM_GTS:
            model = DistributedDataParallel(build(heads), find_unused_parameters=False)
            mine = batch_of(case)[dist.get_rank() :: 2]
            losses = step(model, mine) if len(mine) == 1 else accumulated_step(model, mine)
            for value in losses.values():
                dist.all_reduce(value)
                value /= dist.get_world_size()
            gradients = {name: p.grad for name, p in model.module.named_parameters()}
            results[heads, case] = {"losses": losses, "gradients": gradients}
    if dist.get_rank() == 0:
        torch.save(results, output_file)
    dist.destroy_process_group()
