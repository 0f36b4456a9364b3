"""train_net.py on a GPU: loading workers, mixed precision, resume, and NCCL under torchrun."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine.tiny_data import make_tiny_data
from tests.paths import ROOT, python_path

pytestmark = pytest.mark.gpu
ENGINE = ROOT / "tests" / "engine"  # the tiny detector and its config


@pytest.fixture
def train(tmp_path):
    """Trains the tiny detector on the GPU; returns the losses and all that was said."""
    data = make_tiny_data(tmp_path)

    def run(*arguments, launcher=()):
        result = subprocess.run(
            [
                *(sys.executable, *launcher, str(ROOT / "train_net.py")),
                *("--config-file", str(ENGINE / "tiny_config.py")),
                *(*data.overrides(tmp_path / "out"), "train.device=cuda", *arguments),
            ],
            capture_output=True,
            text=True,
            timeout=90,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        )
        said = result.stdout + result.stderr
        assert result.returncode == 0, said
        lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
        return [line["total_loss"] for line in lines if "total_loss" in line], said

    return run


def test_one_process_with_workers_float16_and_a_resume(train, tmp_path):
    amp = ["train.amp.enabled=true", "train.amp.dtype=float16", "dataloader.train.num_workers=2"]
    losses, _ = train(*amp, "train.max_iter=3")
    assert len(losses) == 3
    losses, _ = train("--resume", *amp)
    assert len(losses) == 6
    assert "AP" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_nccl_under_torchrun(train):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    losses, said = train("train.ema.enabled=true", "train.val_loss.enabled=true", launcher=launcher)
    assert len(losses) == 6
    assert "1 process(es)" in said
