"""What happens before a run: messages, seed, and what describes it for its folder."""

from __future__ import annotations

import logging
import logging.handlers
import os

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from co_detr.engine.allocator import keep_freed_memory
from co_detr.engine.config import config_content, leaves, read_yaml, to_text
from co_detr.errors import ConfigError
from co_detr.files import written_whole

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_NOT_SET = object()
_LOGGERS = ("detectron2", "fvcore", "co_detr")


class RunLog:
    """All messages of a run, for a file that may be opened later.

    A start that fails shall not touch the folder of a run that has ended well: until the training
    runs, messages are kept in memory (and are on the console).
    """

    def __init__(self) -> None:
        self._early = logging.handlers.MemoryHandler(
            capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        self._handler: logging.Handler = self._early
        self._attach(self._early)

    def open(self, folder: str) -> None:
        """Puts everything so far and from now on into `folder`/log.txt; only the first call counts.

        Other processes than the main one have log.txt.rank1 and so on.
        """
        if self._handler is not self._early:
            return
        rank = comm.get_rank()
        name = f"log.txt.rank{rank}" if rank else "log.txt"
        os.makedirs(folder, exist_ok=True)
        file = logging.FileHandler(os.path.join(folder, name), encoding="utf-8")
        file.setFormatter(
            logging.Formatter(
                "[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"
            )
        )
        self._early.setTarget(file)
        self._early.flush()
        self._attach(file)

    def _attach(self, handler: logging.Handler) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
            logging.getLogger(name).addHandler(handler)
        self._handler = handler


def setup_run(cfg: DictConfig) -> RunLog:
    """Does what Detectron2's ``default_setup`` does, but writes nothing, and less to the console.

    On the CPU also keeps freed memory for the next step (`keep_freed_memory`).

    Returns:
        What takes the messages from now on.
    """
    if torch.device(cfg.train.device).type == "cpu":
        keep_freed_memory()
    # On a full disk each line of the log would end in a traceback. The next file of more weight,
    # metrics.jsonl or a checkpoint, stops the run with one sentence.
    logging.raiseExceptions = False
    rank = comm.get_rank()
    for name in _LOGGERS:
        setup_logger(None, distributed_rank=rank, name=name)
    log = RunLog()
    # The dataset serializer and the checkpoint loader tell their progress at the info level.
    for name in ("detectron2.data.common", "fvcore.common.checkpoint"):
        logging.getLogger(name).setLevel(logging.WARNING)
    seed_all_rng(cfg.train.seed + rank)
    logger.info(
        "torch %s on %s with %d threads, %d process(es)",
        torch.__version__,
        cfg.train.device,
        torch.get_num_threads(),
        comm.get_world_size(),
    )
    return log


def write_description(folder: str, config: str) -> None:
    """Writes ``config.yaml`` (from `config_text`) and ``environment.txt``; in the main process."""
    os.makedirs(folder, exist_ok=True)
    for name, text in ((CONFIG_FILE, config), ("environment.txt", collect_env_info() + "\n")):
        with written_whole(os.path.join(folder, name)) as file:
            file.write(text)


def description_of_resumed(cfg: DictConfig, folder: str) -> str:
    """What ``config.yaml`` is to say of a run that goes on; logs what differs from the one there.

    The settings are the new ones, but a run that goes on does not start from
    ``train.init_checkpoint``: that one stays.
    """
    content = config_content(cfg)
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        return to_text(content)
    try:
        earlier = read_yaml(path)
    except ConfigError as error:
        logger.warning("What has changed since this run began is not known: %s", error)
        return to_text(content)
    before, now = dict(leaves(earlier)), dict(leaves(content))
    init = "train.init_checkpoint"
    if now.get(init) and before.get(init) != now[init]:
        logger.warning("%s=%s has no effect: the run goes on from its own.", init, now[init])
    if init in before:
        content["train"]["init_checkpoint"] = now[init] = before[init]
    changed = [
        f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in dict.fromkeys((*now, *before))
        if before.get(key, _NOT_SET) != now.get(key, _NOT_SET)
    ]
    if changed:
        logger.info("Settings that differ from those in %s: %s", path, "; ".join(changed))
    return to_text(content)
