"""The training loop: accumulation, mixed precision, clipping, and a check before every step."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from co_detr.checkpoint.reading import with_present_names
from co_detr.data.loader import BatchPlan
from co_detr.engine.freezing import FrozenHook, freeze
from co_detr.engine.non_finite import BadStep, NonFiniteGuard, facts_of
from co_detr.engine.optim import layout_of, with_own_settings
from co_detr.engine.writers import WriterHook
from co_detr.errors import ConfigError, UserError, first_line
from co_detr.process_setup import StopSignals
from co_detr.seeding import seed_everything
from co_detr.structures import StepCounts

logger = logging.getLogger(__name__)

GPU_PEAK = "gpu_peak_mib"  # under which metrics.jsonl has what tensors took on the GPU so far


@dataclass(frozen=True)
class StepSettings:
    """How one optimizer step is made.

    Attributes:
        device: where the model is ("cpu", "cuda", ..).
        seed: of the model's own randomness (sampling, dropout).
        accumulation_steps: micro-batches per step.
        exact_counts: whether, with several micro-batches, auxiliary heads run once more where they
            could else not count what their losses are divided by in the whole step.
        max_norm: limit of the gradient's L2 norm over all parameters; None: no clipping.
        autocast_dtype: of mixed precision; None: everything in float32.
        max_skips: steps in a row that are skipped because something is NaN or infinite.
        output_dir: where the diagnosis of what is NaN or infinite goes.
    """

    device: str
    seed: int
    accumulation_steps: int = 1
    exact_counts: bool = True
    max_norm: float | None = None
    autocast_dtype: torch.dtype | None = None
    max_skips: int = 0
    output_dir: str = "."


@dataclass
class MicroBatches:
    """What the micro-batches of one iteration add up to in this process."""

    batches: list[list[dict[str, Any]]] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    data_time: float = 0.0  # seconds


@dataclass(frozen=True)
class JointResult:
    """What all processes know after the backward pass.

    Attributes:
        losses: mean over processes of each loss term.
        grad_norm: L2 norm before clipping.
        stop: whether any process was asked to stop.
    """

    losses: dict[str, float]
    grad_norm: float
    stop: bool


class Trainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` and `AMPTrainer` in one, for any device.

    One iteration is one optimizer step:
    1. with several micro-batches and a model that can `count`: count in all of them what losses are
       divided by, so that their sum equals one large batch;
    2. per micro-batch: seed the generators from (seed, iteration, micro-batch, rank), run forward
       under autocast, add up gradients of what the micro-batch contributes to the loss: of a model
       that cannot count, its loss divided by the number of micro-batches;
    3. measure the gradient, after undoing the scale that float16 needs;
    4. average the loss terms over processes, learn whether one of them was asked to stop, and
       bring all of this to the host at once;
    5. if a loss term or the gradient is not finite, leave the weights as they are, and after a few
       such iterations in a row raise (`NonFiniteGuard`);
    6. else clip the gradient and step.

    Attributes:
        stopping: after a step, whether the training ends behind this iteration because a process
            was asked to; the same in all processes.
        evaluation_pending: whether the evaluation behind the last iteration is still to be made; a
            run that goes on from a checkpoint that says so begins with it.
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
        self.stopping = False
        self.evaluation_pending = False
        self.device_type = torch.device(settings.device).type
        # bfloat16 has float32's range: only float16 needs its gradients scaled.
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=settings.autocast_dtype == torch.float16
        )
        self.guard = NonFiniteGuard(
            model.module if isinstance(model, DistributedDataParallel) else model,
            optimizer,
            self.grad_scaler,
            amp_dtype=settings.autocast_dtype,
            output_dir=settings.output_dir,
            max_skips=settings.max_skips,
        )
        self._signals = StopSignals(has_launcher=comm.get_world_size() > 1)

    @property
    def plan(self) -> BatchPlan:
        return self.data_loader.batch_sampler

    @property
    def last_iteration(self) -> int:
        """That was done; behind the training, `iter` is the one that does not come."""
        return min(self.iter, self.max_iter - 1)

    def asked_to_stop(self) -> bool:
        """Whether this process was; others may not know yet."""
        return self._signals.received

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs iterations `start_iter` .. `max_iter - 1`, or less if asked to stop by a signal.

        Unlike the parent's, a failure is not logged with its traceback here (the caller decides).
        Neither a failure nor a stop runs the hooks that belong to a finished training; only
        writers are closed.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage, self._signals:
            try:
                self.before_train()
                end = start_iter if self.stopping else self.max_iter
                for self.iter in range(start_iter, end):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self._signals.interrupted:
                        raise KeyboardInterrupt  # again: whoever got it has swallowed it
                    # Asked to, or a hook has lowered `max_iter`.
                    if self.stopping or self.iter + 1 >= self.max_iter:
                        break
                if not self.stopping:
                    self.iter = max(start_iter, self.max_iter)
                    self.after_train()
            finally:
                for hook in self._hooks:
                    if isinstance(hook, WriterHook):
                        hook.close()

    def run_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.before_forward()
        micro = MicroBatches()
        try:
            self._forward_and_backward(micro)
        except FloatingPointError as error:
            # Raised by the model before there was a loss.
            bad = self._bad_step(micro, grad_norm=None, cause=str(error))
            if comm.get_world_size() > 1:
                # The others know nothing of it and wait for this process's gradients.
                raise self.guard.failed_alone(bad) from error
            self._skip(bad)
            self.stopping = self._signals.received
            return
        self.grad_scaler.unscale_(self.optimizer)
        norm = gradient_norm(self._parameters())
        joint = self._to_host(micro.losses, norm)
        self.stopping = joint.stop
        if self._is_finite(joint):
            self.guard.passed()
            clip_gradient(self._parameters(), self.settings.max_norm, norm)
            self._log(joint, micro.data_time)
            self.grad_scaler.step(self.optimizer)
        else:
            self._skip(self._bad_step(micro, joint.grad_norm))
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["iteration"] = self.last_iteration
        state["optimizer_layout"] = layout_of(self.optimizer, self.guard.model)
        # The only hook with a state is the schedule, which is a function of the iteration.
        state.pop("hooks", None)
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["skips_in_a_row"] = self.guard.in_a_row
        state["evaluation_pending"] = self.evaluation_pending
        state["data"] = self.plan.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model, saved = self.guard.model, state_dict.get("optimizer_layout")
        if saved is not None:
            names = with_present_names(dict.fromkeys(saved["parameters"]), model)
            saved = {**saved, "parameters": list(names)}
        optimizer_state = with_own_settings(
            state_dict["optimizer"], saved, self.optimizer, layout_of(self.optimizer, model)
        )
        super().load_state_dict({**state_dict, "optimizer": optimizer_state})
        if state_dict["grad_scaler"]:  # empty when the run that saved it had no scaler
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.guard.in_a_row = state_dict.get("skips_in_a_row", 0)
        self.evaluation_pending = state_dict.get("evaluation_pending", False)
        self.plan.resume(state_dict["data"], self.iter + 1)

    def _forward_and_backward(self, micro: MicroBatches) -> None:
        """Loads all micro-batches of this iteration and adds up what they give in `micro`.

        Raises:
            FloatingPointError: if the model does; all of the iteration's data are loaded by then.
        """
        steps = self.settings.accumulation_steps
        for _ in range(steps):
            self._load(micro)
        counts = self._count(micro.batches) if steps > 1 else None
        for micro_step, batch in enumerate(micro.batches):
            self._seed(micro_step)
            terms = self._backward(batch, counts, reduce_gradients=micro_step == steps - 1)
            for name, loss in terms.items():
                micro.losses[name] = micro.losses.get(name, 0.0) + loss

    def _count(self, batches: list[list[dict[str, Any]]]) -> StepCounts | None:
        """What the losses of all micro-batches are divided by; None: the model does not count."""
        model = self.guard.model
        if not hasattr(model, "count"):
            return None
        parts = []
        # The storage takes what heads log about themselves, which they log again.
        with self._autocast(), EventStorage():
            for micro_step, batch in enumerate(batches):
                self._seed(micro_step)
                parts.append(model.count(batch, with_heads=self.settings.exact_counts))
        self.guard.restore_statistics()
        return StepCounts.join(parts)

    def _seed(self, micro_step: int) -> None:
        """Not before loading: starting a loader draws from torch's generator."""
        seed_everything("step", self.settings.seed, self.iter, micro_step, comm.get_rank())

    def _autocast(self) -> torch.autocast:
        dtype = self.settings.autocast_dtype
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def _load(self, micro: MicroBatches) -> None:
        start = time.perf_counter()
        micro.batches.append(next(self._data_loader_iter))
        micro.data_time += time.perf_counter() - start

    def _backward(
        self, batch: list[dict[str, Any]], counts: StepCounts | None, reduce_gradients: bool
    ) -> dict[str, Tensor]:
        """Adds the gradients of one micro-batch; returns its share of each loss term."""
        wait = isinstance(self.model, DistributedDataParallel) and not reduce_gradients
        # DDP reads no_sync at the forward pass, so the forward pass has to be inside, too.
        with self.model.no_sync() if wait else nullcontext():
            with self._autocast():
                losses = self.model(batch) if counts is None else self.model(batch, counts)
                # With counts, losses are shares already.
                divisor = self.settings.accumulation_steps if counts is None else 1
                total = sum(losses.values()) / divisor
            self.grad_scaler.scale(total).backward()
        return {name: loss.detach().float() / divisor for name, loss in losses.items()}

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _to_host(self, losses: dict[str, Tensor], grad_norm: Tensor) -> JointResult:
        """Brings together what all processes have to agree on, with one transfer."""
        names = sorted(losses)
        stop = grad_norm.new_full((), float(self._signals.received), dtype=torch.float32)
        values = torch.stack([losses[name] for name in names] + [grad_norm.float(), stop])
        if comm.get_world_size() > 1:
            # NaN and infinity survive the sum, so that every process learns of them.
            dist.all_reduce(values)
            values /= comm.get_world_size()
        *means, norm, stop_share = values.tolist()
        return JointResult(dict(zip(names, means, strict=True)), norm, stop_share > 0)

    def _is_finite(self, joint: JointResult) -> bool:
        # With float16, an infinite gradient is the scaler's business: it skips the step and lowers
        # the scale. What is infinite without any scale left is so by itself.
        scaler = self.grad_scaler
        scaled = scaler.is_enabled() and scaler.get_scale() > 1
        return all(map(math.isfinite, joint.losses.values())) and (
            scaled or math.isfinite(joint.grad_norm)
        )

    def _bad_step(self, micro: MicroBatches, grad_norm: float | None, cause: str = "") -> BadStep:
        losses = {name: float(loss) for name, loss in micro.losses.items()}
        return BadStep(self.iter, losses, grad_norm, facts_of(micro.batches), cause)

    def _skip(self, bad: BadStep) -> None:
        self.guard.failed(bad)
        get_event_storage().put_scalar("skips_in_a_row", self.guard.in_a_row)

    def _log(self, joint: JointResult, data_time: float) -> None:
        means = joint.losses
        get_event_storage().put_scalars(
            total_loss=sum(means.values()),
            grad_norm=joint.grad_norm,
            data_time=data_time,
            **means,
        )
        if self.device_type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.settings.device)
            get_event_storage().put_scalar(GPU_PEAK, peak / 2**20)


# `torch.nn.utils.clip_grad_norm_` in two steps, so that a NaN can be looked for in between.


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, a scalar; the gradients stay as they are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if hasattr(nn.utils, "get_total_norm"):
        return nn.utils.get_total_norm(gradients)
    # torch before 2.6
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


def clip_gradient(parameters: Sequence[nn.Parameter], max_norm: float | None, norm: Tensor) -> None:
    """Scales all gradients so that their norm, which is `norm`, is at most `max_norm`.

    With None, does nothing.
    """
    if max_norm is None:
        return
    if hasattr(nn.utils, "clip_grads_with_norm_"):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    else:  # torch before 2.6
        nn.utils.clip_grad_norm_(parameters, max_norm)


def build_trainer(
    cfg: DictConfig, model: nn.Module, loader: DataLoader, accumulation_steps: int
) -> Trainer:
    """Puts optimizer, processes and settings of a step around a model.

    Args:
        loader: of micro-batches, of which `accumulation_steps` make a step.

    Raises:
        ConfigError: if `train.freeze` cannot be applied, or the optimizer refuses its settings.
    """
    logger.info("%.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    patterns = list(cfg.train.get("freeze", []))
    if patterns:
        logger.info(freeze(model, patterns).text())
    node = copy.deepcopy(cfg.optimizer)  # a config describes; it does not hold a model
    node.params.model = model
    try:
        optimizer = instantiate(node)
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"the optimizer refuses its settings ({first_line(error)}): correct optimizer.*."
        ) from error
    settings = _step_settings(cfg, accumulation_steps)
    trainer = Trainer(_distributed(model, cfg), loader, optimizer, settings)
    trainer.register_hooks([FrozenHook(model)] if patterns else [])
    return trainer


def _step_settings(cfg: DictConfig, accumulation_steps: int) -> StepSettings:
    amp = cfg.train.amp
    return StepSettings(
        device=cfg.train.device,
        seed=cfg.train.seed,
        accumulation_steps=accumulation_steps,
        exact_counts=cfg.train.get("exact_counts", True),
        max_norm=cfg.train.clip_grad.max_norm,
        autocast_dtype=getattr(torch, amp.dtype) if amp.enabled else None,
        max_skips=cfg.train.non_finite.max_skips,
        output_dir=cfg.train.output_dir,
    )


def _distributed(model: nn.Module, cfg: DictConfig) -> nn.Module:
    settings = dict(cfg.train.ddp)
    if torch.device(cfg.train.device).type == "cpu":
        settings["device_ids"] = None  # Detectron2 would pass the rank as a GPU number
    return create_ddp_model(model, **settings)
