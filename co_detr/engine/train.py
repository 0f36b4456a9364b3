"""A whole run on one page: configuration, data, model, optimizer, hooks, loop, evaluation."""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.engine import hooks
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from co_detr.checkpoint.reading import AVERAGED
from co_detr.checkpoint.saving import RUN_ID, Checkpointer, RunIdentity, read_identity
from co_detr.data.coco_classes import align_classes, class_names
from co_detr.engine.config import load_config, suggest_rate
from co_detr.engine.config_yaml import config_text
from co_detr.engine.data_check import adopt_class_count, align_with_checkpoint, check_data
from co_detr.engine.evaluation import evaluate, log_best_detector
from co_detr.engine.hooks import (
    BeginHook,
    CheckpointHook,
    EmaHook,
    EvaluationHook,
    PeriodicEvaluation,
    build_averaged,
)
from co_detr.engine.launch import jointly, launch, report
from co_detr.engine.memory_table import memory_table
from co_detr.engine.memory_use import (
    dry_run,
    evaluation_advice,
    explain_out_of_memory,
    training_advice,
)
from co_detr.engine.optim import build_new_class_rate
from co_detr.engine.setup import (
    CONFIG_FILE,
    RunLog,
    build_model,
    description_of_resumed,
    evaluation_folder,
    exclusive,
    holds_training,
    pin_for,
    setup_run,
    warn_of_emulation,
    write_description,
)
from co_detr.engine.tracking import build_trackers, require_trackers
from co_detr.engine.trainer import Trainer, build_trainer
from co_detr.engine.validation import build_selection, load_validation_set
from co_detr.engine.views import DetectorWithTTA, MapperWithViews, compared_kinds, named_tta
from co_detr.engine.writers import WriterHook, build_writers
from co_detr.errors import CheckpointError, ConfigError, UserError
from co_detr.files import remove_incomplete
from co_detr.process_setup import outlive_signals

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """What `train_net.py` does with its arguments; returns the exit code (see `launch`)."""
    try:
        if args.amp and not args.eval_only:
            raise ConfigError(
                f"--amp {args.amp} is of evaluations: for a training set train.amp.enabled=true "
                f"train.amp.dtype={args.amp}."
            )
        cfg = load_config(args.config_file, args.opts)
        adopt_class_count(cfg, args.opts, args.eval_only, args.resume)
        return launch(main, cfg, args)
    except UserError as error:
        report(error, args.debug)
        return 2


def main(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Runs in every process."""
    log = setup_run(cfg)
    if args.dry_run:
        if comm.is_main_process():
            print(f"{memory_table(cfg).text()}\n", flush=True)  # first: it helps if nothing fits
        measured = dry_run(cfg)
        if comm.is_main_process():
            print(measured.text())
    elif args.eval_only:
        check_data(cfg, eval_only=True)
        run_evaluation_only(cfg, args.resume, log, args.amp)
    else:
        with exclusive(cfg.train.output_dir):
            check_data(cfg)
            suggest_rate(cfg, args.config_file, args.opts)
            run_training(cfg, args.resume, log)


def run_training(cfg: DictConfig, resume: bool, log: RunLog | None = None) -> dict[str, float]:
    """Trains and evaluates; returns the final COCO metrics (see `evaluate`).

    With `resume`, continues from the last checkpoint of `train.output_dir`, or starts anew if
    there is none yet; otherwise starts from `train.init_checkpoint`. Nothing in the folder changes
    before the first step is done: a start that fails leaves an earlier run as it was.

    Args:
        log: of the messages, if they are to be written.
    """
    require_trackers(cfg)
    description = config_text(cfg)
    output_dir, device = cfg.train.output_dir, cfg.train.device

    # Data. The val set is loaded first although it is used last: a wrong data.val should not end a
    # finished training.
    train_loader = pin_for(instantiate(cfg.dataloader.train), device)
    names = class_names(cfg.data.train)
    val_set = load_validation_set(cfg)
    run_evaluation = build_evaluation(cfg)
    align_classes(cfg.data.val, names)

    # Model and optimizer.
    model = build_model(cfg)
    kinds = compared_kinds(model, with_tta=cfg.dataloader.get("tta") is not None)
    selection = build_selection(cfg, names, getattr(model, "predicts_masks", False), kinds)
    trainer = build_trainer(cfg, model, train_loader, train_loader.batch_sampler.accumulation_steps)
    plan, max_iter = trainer.plan, cfg.train.max_iter
    epochs = max_iter * plan.total_batch_size / plan.size
    logger.info(plan.text())
    digits = 1 if epochs < 10 else 0
    logger.info("%d iterations are %.*f epochs of %d images.", max_iter, digits, epochs, plan.size)
    averaged = build_averaged(model, cfg)

    # Weights to start from, or a checkpoint to continue from.
    os.makedirs(output_dir, exist_ok=True)
    if log is not None and not jointly(lambda: holds_training(output_dir)):
        log.open(output_dir)
    states = {"trainer": trainer} | ({} if averaged is None else {AVERAGED: averaged})
    new_classes = build_new_class_rate(cfg, model, trainer.optimizer)
    if new_classes is not None:
        states["new_classes"] = new_classes
    checkpointer = _checkpointer(
        model,
        cfg,
        cfg.data.train,
        # Not for evaluations, whose checkpoints have the classes of the run.
        class_sources=cfg.train.get("init_checkpoint_classes"),
        **states,
    )
    start_iter, identity = _load_start(checkpointer, trainer, cfg, resume)
    if new_classes is not None and not start_iter:
        new_classes.find_in(checkpointer.report)
    if start_iter:
        description = jointly(lambda: description_of_resumed(cfg, output_dir))
    if averaged is not None:
        averaged.start_from(model)
    if selection is not None:
        history = selection.history
        jointly(lambda: history.read(until=start_iter) if start_iter else None)
    if start_iter >= max_iter or (selection is not None and selection.exhausted(start_iter)):
        logger.info("Nothing to train: iteration %d of %d is done.", start_iter, max_iter)
        max_iter = start_iter  # what is left is the evaluation

    # Hooks.
    saving, eval_period = cfg.train.checkpointer, cfg.train.eval_period
    writers = WriterHook(cfg.train.log_period, eval_period)
    evaluation = PeriodicEvaluation(
        trainer,
        checkpointer,
        model if averaged is None else averaged.module,
        partial(run_evaluation, should_stop=trainer.asked_to_stop),
        validation_loss=None if val_set is None else val_set.build_loss(names, trainer.settings),
        selection=selection,
    )

    def begin() -> None:
        """Makes the folder this run's; in the main process."""
        # First: a tracker that cannot be reached ends the run before it has changed anything.
        trackers = build_trackers(cfg, resume=start_iter > 0)
        if removed := remove_incomplete(output_dir):
            logger.info("Removed what an interrupted run left half written: %s", ", ".join(removed))
        identity.write(output_dir)
        write_description(output_dir, description)
        logger.info("Configuration: %s", os.path.join(output_dir, CONFIG_FILE))
        if selection is not None and not start_iter:
            selection.history.forget_earlier_run()
        own = build_writers(
            output_dir, start_iter, max_iter, cfg.train.log_period, trainer.evaluation_pending
        )
        writers.open([*own, *trackers])

    trainer.register_hooks(
        [
            BeginHook(begin, output_dir, log),
            hooks.IterationTimer(),
            None if averaged is None else EmaHook(averaged, model),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            writers,
            # Behind what belongs to an iteration, and before what can fail without harm to it.
            CheckpointHook(checkpointer, saving.period, saving.max_to_keep, eval_period),
            EvaluationHook(eval_period, evaluation, writers),
        ]
    )

    # The loop, with the final evaluation at its end.
    with explain_out_of_memory(device, "training", lambda: training_advice(cfg, trainer.plan)):
        trainer.train(start_iter, max_iter)
    if trainer.stopping:
        logger.info(
            "Stopped as asked; everything is in %s: the same command with --resume continues.",
            checkpointer.get_checkpoint_file(),
        )
    else:
        _log_best(model, evaluation.metrics, output_dir, checkpointer.get_checkpoint_file())
    return evaluation.metrics


def run_evaluation_only(
    cfg: DictConfig, resume: bool, log: RunLog | None = None, amp: str | None = None
) -> dict[str, float]:
    """Evaluates the last checkpoint of `train.output_dir` (`resume`) or `train.init_checkpoint`.

    Writes to `train.output_dir`, but where that holds a training, to its subfolder `evaluation`.

    Args:
        amp: "bfloat16" or "float16" of mixed precision, as of `co_detr.Predictor`; None: float32,
            in which evaluations are made in the course of a training, however it is computed.
    """
    description = config_text(cfg)
    folder = evaluation_folder(cfg.train.output_dir)
    if log is not None:
        log.open(folder)
        jointly(lambda: write_description(folder, description))
    run_evaluation = build_evaluation(cfg, folder)
    model = build_model(cfg)
    checkpointer = _checkpointer(model, cfg, cfg.data.val)
    if checkpointer.mismatch != "by_name":
        checkpointer.class_names = None  # not compared here: align_with_checkpoint does more
    if resume and not checkpointer.has_checkpoint():
        raise CheckpointError(
            f"there is no checkpoint in {cfg.train.output_dir} to evaluate: train first, or set "
            "train.init_checkpoint instead of --resume."
        )
    if not resume and not cfg.train.init_checkpoint:
        logger.warning("train.init_checkpoint is empty: evaluating random weights.")
    checkpoint = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    align_with_checkpoint(cfg, checkpoint.get("class_names"))
    dtype = None if amp is None else getattr(torch, amp)
    if amp is not None:
        warn_of_emulation(cfg.train.device, amp, "leave --amp out")
    with torch.autocast(torch.device(cfg.train.device).type, dtype, enabled=amp is not None):
        metrics = run_evaluation(model)
    _log_best(model, metrics, folder, checkpointer.resumed_from or cfg.train.init_checkpoint)
    return metrics


def _log_best(model: nn.Module, metrics: dict[str, float], folder: str, checkpoint: str) -> None:
    """Says at the end which detector of the model to use; `folder` has its config."""
    kinds = getattr(model, "compared", ())
    log_best_detector(metrics, kinds, os.path.join(folder, CONFIG_FILE), checkpoint)


def build_evaluation(cfg: DictConfig, folder: str | None = None) -> Callable[..., dict[str, float]]:
    """Loads the val set now and returns `evaluate` without its arguments behind the model.

    Args:
        folder: for what it writes; None: `train.output_dir`.
    """
    tta = named_tta(cfg.dataloader.get("tta"), "dataloader.tta")
    if tta is not None:
        cfg = copy.deepcopy(cfg)
        cfg.dataloader.test.mapper = LazyCall(MapperWithViews)(
            mapper=cfg.dataloader.test.mapper, tta="${dataloader.tta}"
        )
    loader = pin_for(instantiate(cfg.dataloader.test), cfg.train.device)
    loader.worker_init_fn = outlive_signals
    node = copy.deepcopy(cfg.dataloader.evaluator)
    output_dir = cfg.train.output_dir if folder is None else folder
    if node.get("output_dir") == cfg.train.output_dir:
        node.output_dir = output_dir
    evaluator = instantiate(node)

    def run_evaluation(model: nn.Module, **arguments: Any) -> dict[str, float]:
        model = model if tta is None else DetectorWithTTA(model, tta)
        with explain_out_of_memory(cfg.train.device, "evaluation", lambda: evaluation_advice(cfg)):
            return evaluate(model, loader, evaluator, output_dir, **arguments)

    return run_evaluation


def _checkpointer(
    model: nn.Module, cfg: DictConfig, annotation_file: str, **settings: Any
) -> Checkpointer:
    """Reads and writes checkpoints of a model for the classes of a loaded annotation file.

    Args:
        settings: other arguments of `Checkpointer`, and what else it saves and resumes.
    """
    return Checkpointer(
        model,
        cfg.train.output_dir,
        mismatch=cfg.train.init_checkpoint_mismatch,
        unsafe=cfg.train.init_checkpoint_unsafe,
        weights=cfg.train.get("init_checkpoint_weights", "ema"),
        class_names=class_names(annotation_file),
        **settings,
    )


def _load_start(
    checkpointer: Checkpointer, trainer: Trainer, cfg: DictConfig, resume: bool
) -> tuple[int, RunIdentity]:
    """Loads what training starts from; returns the first iteration, and which run it is."""
    folder = checkpointer.save_dir
    exists = checkpointer.has_checkpoint()
    resumes = resume and exists
    if resume and not exists:
        logger.info("No checkpoint in %s: starting anew.", folder)
    elif resumes:
        # What was saved by this run has to fit completely, whatever it was initialized from.
        checkpointer.mismatch = "error"
        checkpointer.weights = None  # the averaged ones are loaded as well
    elif exists:
        logger.warning(
            "%s holds checkpoints of an earlier run, which will be replaced; --resume continues "
            "that run.",
            folder,
        )
    loaded = checkpointer.resume_or_load(cfg.train.init_checkpoint or "", resume=resumes)
    # Only the main process writes, and knows for sure what is in the folder.
    earlier = jointly(lambda: read_identity(folder)) if resume else None
    if not resumes:
        identity = earlier or RunIdentity.new()
        checkpointer.run_id = identity.run_id
        return 0, identity
    if AVERAGED in loaded:  # nobody has taken it
        logger.warning(
            "The averaged weights of %s are dropped, as train.ema.enabled is false.",
            checkpointer.resumed_from,
        )
    start_iter = trainer.iter + 1
    if start_iter > cfg.train.max_iter:
        raise ConfigError(
            f"train.max_iter={cfg.train.max_iter}, but {checkpointer.resumed_from} has "
            f"{start_iter} iterations behind it: set train.max_iter to at least that, or start a "
            "new run in another train.output_dir."
        )
    saved = loaded.get(RUN_ID)
    identity = earlier or RunIdentity.new(adopts_unnamed=saved is None, run_id=saved)
    checkpointer.run_id = identity.run_id
    return start_iter, identity
