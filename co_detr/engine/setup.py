"""What happens before a run: output folder, log files, seed."""

from __future__ import annotations

import logging
import os

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from co_detr.engine.allocator import keep_freed_memory
from co_detr.engine.config import save_config

logger = logging.getLogger(__name__)


def setup_run(cfg: DictConfig, write: bool = True) -> None:
    """Does what Detectron2's ``default_setup`` does, but keeps the console short.

    On the CPU also keeps freed memory for the next step (`keep_freed_memory`).

    Writes to ``train.output_dir``: ``log.txt`` (all messages; ``log.txt.rank1`` and so on for
    other processes), ``environment.txt`` and ``config.yaml`` (the complete configuration); nothing
    without ``write``.
    """
    if torch.device(cfg.train.device).type == "cpu":
        keep_freed_memory()
    # On a full disk each line of the log would end in a traceback. The next file of more weight,
    # metrics.jsonl or a checkpoint, stops the run with one sentence.
    logging.raiseExceptions = False
    output_dir, rank = cfg.train.output_dir, comm.get_rank()
    if write:
        os.makedirs(output_dir, exist_ok=True)
    for name in ("detectron2", "fvcore", "co_detr"):
        setup_logger(output_dir if write else None, distributed_rank=rank, name=name)
    # The dataset serialiser and the checkpoint loader tell their progress at the info level.
    for name in ("detectron2.data.common", "fvcore.common.checkpoint"):
        logging.getLogger(name).setLevel(logging.WARNING)
    seed_all_rng(cfg.train.seed + rank)
    if write and comm.is_main_process():
        with open(os.path.join(output_dir, "environment.txt"), "w") as file:
            file.write(collect_env_info() + "\n")
        config_file = os.path.join(output_dir, "config.yaml")
        save_config(cfg, config_file)
        logger.info(
            "torch %s on %s with %d threads, %d process(es); configuration: %s",
            torch.__version__,
            cfg.train.device,
            torch.get_num_threads(),
            comm.get_world_size(),
            config_file,
        )
