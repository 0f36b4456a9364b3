"""The training loop: accumulation, mixed precision, clipping, and a check before every step."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from co_detr.data.loader import BatchPlan
from co_detr.errors import NonFiniteError
from co_detr.seeding import seed_everything

_NUM_LISTED = 6


@dataclass(frozen=True)
class StepSettings:
    """How one optimiser step is made.

    Attributes:
        device: where the model is ("cpu", "cuda", ..).
        seed: of the model's own randomness (sampling, dropout).
        accumulation_steps: micro-batches per step.
        max_norm: limit of the gradient's L2 norm over all parameters; None: no clipping.
        autocast_dtype: of mixed precision; None: everything in float32.
    """

    device: str
    seed: int
    accumulation_steps: int = 1
    max_norm: float | None = None
    autocast_dtype: torch.dtype | None = None


class Trainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` and `AMPTrainer` in one, for any device.

    One iteration is one optimiser step:
    1. per micro-batch: seed the generators from (seed, iteration, micro-batch, rank), run forward
       under autocast, add up gradients of the loss divided by the number of micro-batches, which
       for losses that are means equals one large batch;
    2. clip the gradient, after undoing the scale that float16 needs;
    3. average the loss terms over processes and bring them to the host, all at once;
    4. if a loss term or the gradient is not finite, raise before the weights change;
    5. step.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        settings: StepSettings,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.settings = settings
        self.device_type = torch.device(settings.device).type
        # bfloat16 has float32's range: only float16 needs its gradients scaled.
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=settings.autocast_dtype == torch.float16
        )

    @property
    def plan(self) -> BatchPlan:
        return self.data_loader.batch_sampler

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs iterations `start_iter` .. `max_iter - 1`.

        Unlike the parent's, a failure is not logged with its traceback here (the caller decides)
        and does not run the hooks that belong to a finished training; only writers are closed.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.iter + 1 >= self.max_iter:  # a hook may have lowered it
                        break
            except BaseException:
                for hook in self._hooks:
                    if isinstance(hook, hooks.PeriodicWriter):
                        hook.after_train()
                raise
            self.iter += 1
            self.after_train()

    def run_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        batches: list[list[dict[str, Any]]] = []
        data_time = 0.0
        for micro_step in range(self.settings.accumulation_steps):
            start = time.perf_counter()
            batches.append(next(self._data_loader_iter))
            data_time += time.perf_counter() - start
            last = micro_step == self.settings.accumulation_steps - 1
            # After loading: starting a loader draws from torch's generator.
            seed_everything("step", self.settings.seed, self.iter, micro_step, comm.get_rank())
            for name, loss in self._backward(batches[-1], reduce_gradients=last).items():
                losses[name] = losses.get(name, 0.0) + loss
        self.grad_scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        means, norm = self._to_host(losses, grad_norm)
        # With float16, an infinite gradient is the scaler's business: it skips the step.
        norm_matters = not self.grad_scaler.is_enabled()
        if not all(map(_is_finite, [*means.values(), *([norm] if norm_matters else [])])):
            self._raise_non_finite(losses, norm, batches)
        self._log(means, norm, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # The only hook with a state is the schedule, which is a function of the iteration.
        state.pop("hooks", None)
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["data"] = self.plan.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"]:  # empty when the run that saved it had no scaler
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.plan.resume(state_dict["data"], self.iter + 1)

    def _backward(self, batch: list[dict[str, Any]], reduce_gradients: bool) -> dict[str, Tensor]:
        """Adds the gradients of one micro-batch; returns its share of each loss term."""
        wait = isinstance(self.model, DistributedDataParallel) and not reduce_gradients
        dtype = self.settings.autocast_dtype
        # DDP reads no_sync at the forward pass, so the forward pass has to be inside, too.
        with self.model.no_sync() if wait else nullcontext():
            with torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None):
                losses = self._forward(batch)
                total = sum(losses.values()) / self.settings.accumulation_steps
            self.grad_scaler.scale(total).backward()
        return {
            name: loss.detach().float() / self.settings.accumulation_steps
            for name, loss in losses.items()
        }

    def _forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        try:
            return self.model(batch)
        except FloatingPointError as error:
            # Detectron2's RPN refuses to rank boxes that are NaN, before there is a loss. Only
            # this process knows, so the error is not joint.
            raise self._non_finite(str(error).rstrip("."), "", _names([batch]), False) from error

    def _clip(self) -> Tensor:
        """Clips in place; returns the norm before clipping."""
        limit = self.settings.max_norm
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # An infinite limit only measures.
        return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)

    def _to_host(
        self, losses: dict[str, Tensor], grad_norm: Tensor
    ) -> tuple[dict[str, float], float]:
        """Mean over processes of each loss term, and the gradient norm, with one transfer."""
        names = sorted(losses)
        values = torch.stack([losses[name] for name in names] + [grad_norm.float()])
        if comm.get_world_size() > 1:
            # NaN and infinity survive the sum, so every process learns of them and they all stop.
            dist.all_reduce(values)
            values /= comm.get_world_size()
        *means, norm = values.tolist()
        return dict(zip(names, means, strict=True)), norm

    def _log(self, means: dict[str, float], grad_norm: float, data_time: float) -> None:
        storage = get_event_storage()
        storage.put_scalars(
            total_loss=sum(means.values()), grad_norm=grad_norm, data_time=data_time, **means
        )

    def _raise_non_finite(
        self, losses: dict[str, Tensor], norm: float, batches: list[list[dict[str, Any]]]
    ) -> None:
        bad = {name: float(loss) for name, loss in losses.items() if not torch.isfinite(loss)}
        images = _names(batches)
        gathered = comm.all_gather((bad, images))
        terms = {name: value for terms, _ in gathered for name, value in terms.items()}
        if terms:
            # Name the images of the processes where the loss went wrong.
            images = [image for terms, images in gathered if terms for image in images]
            what = "the loss became NaN or infinite"
            details = ", ".join(f"{name}={value}" for name, value in _first(sorted(terms.items())))
        else:
            images = [image for _, images in gathered for image in images]
            what, details = "the gradient became NaN or infinite", f"norm={norm}"
        raise self._non_finite(what, f" ({details})", images, True)

    def _non_finite(
        self, what: str, details: str, images: list[str], joint: bool
    ) -> NonFiniteError:
        error = NonFiniteError(
            f"{what} at iteration {self.iter}{details} on the images "
            f"{', '.join(_first(images))}: the weights were not changed and the checkpoints "
            "written so far are intact; check these images and their boxes, or lower optimizer.lr "
            "or set train.amp.enabled=false, and continue with --resume."
        )
        error.joint = joint
        return error


def _names(batches: list[list[dict[str, Any]]]) -> list[str]:
    return [
        f"{sample.get('file_name', '?')} (id {sample.get('image_id', '?')})"
        for batch in batches
        for sample in batch
    ]


def _is_finite(value: float) -> bool:
    return float("-inf") < value < float("inf")


def _first(values: list[Any]) -> list[Any]:
    return values[:_NUM_LISTED]
