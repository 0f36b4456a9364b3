"""Trackers get every number once and go on with their run; without them nothing is needed.

Fakes stand in for the packages; tests of the real ones run where these are installed.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from co_detr.engine.train import run_training
from co_detr.errors import ConfigError

STEPS = ["train.eval_period=2", "train.log_period=2"]
WANDB = ["train.wandb.enabled=true", "train.wandb.project=tests", "train.wandb.mode=offline"]


class FakeWandb(ModuleType):
    """Records what it is told; numbers of a run by its id."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.starts, self.logged, self.finished = [], {}, []

    def init(self, **arguments):
        self.starts.append(arguments)
        numbers = self.logged.setdefault(arguments["id"], [])
        return SimpleNamespace(
            config=SimpleNamespace(update=lambda config, allow_val_change: None),
            log=lambda scalars, step: numbers.append((step, scalars)),
            finish=lambda: self.finished.append(arguments["id"]),
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class FakeMlflow:
    """A store of runs behind `MlflowClient`."""

    def __init__(self):
        self.runs, self.status, self.experiments, self.artifacts = {}, {}, {}, {}
        self.down = False

    def modules(self):
        package, entities, exceptions = (
            ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.exceptions")
        )
        package.__spec__ = ModuleSpec("mlflow", None)
        package.MlflowClient = lambda tracking_uri: self
        entities.Metric = lambda *fields: fields
        exceptions.MlflowException = type("MlflowException", (Exception,), {})
        self.failure = exceptions.MlflowException
        return {module.__name__: module for module in (package, entities, exceptions)}

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = SimpleNamespace(experiment_id=name)
        return name

    def create_run(self, experiment_id, run_name):
        run_id = f"run{len(self.runs)}"
        self.runs[run_id], self.status[run_id] = [], "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_dict(self, run_id, content, path):
        self.artifacts[run_id, path] = content

    def update_run(self, run_id, status):
        if run_id not in self.runs:
            raise self.failure(f"no run {run_id}\nlong story")
        self.status[run_id] = status

    def log_batch(self, run_id, metrics):
        if self.down:
            raise self.failure("server is away")
        assert len(metrics) <= 1000
        self.runs[run_id] += metrics

    def set_terminated(self, run_id):
        self.status[run_id] = "FINISHED"


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def _by_step(numbers, name):
    """(step, value) of one scalar; none may come twice."""
    found = [(step, scalars[name]) for step, scalars in numbers if name in scalars]
    assert len(dict(found)) == len(found)
    return found


def test_wandb_gets_the_numbers_of_the_metrics_file(tiny_cfg, tmp_path, wandb):
    run_training(tiny_cfg(*STEPS, *WANDB, "train.wandb.name=first"), resume=False)
    (start,) = wandb.starts
    assert (start["project"], start["name"], start["mode"]) == ("tests", "first", "offline")
    assert start["dir"] == str(tmp_path / "out") and start["resume"] == "allow"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    for name in ("total_loss", "bbox/AP"):
        expected = {line["iteration"]: line[name] for line in lines if name in line}
        assert dict(_by_step(wandb.logged[start["id"]], name)) == pytest.approx(expected)
        assert len(expected) == 3
    assert wandb.finished == [start["id"]]


def test_a_resumed_run_goes_on_in_wandb_and_a_new_one_does_not(tiny_cfg, wandb):
    run_training(tiny_cfg(*STEPS, *WANDB, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*STEPS, *WANDB), resume=True)
    run_training(tiny_cfg(*STEPS, *WANDB, "train.max_iter=1"), resume=False)
    first, second, third = (start["id"] for start in wandb.starts)
    assert first == second != third
    steps = [step for step, _ in _by_step(wandb.logged[first], "total_loss")]
    assert steps == sorted(steps) and steps[-1] == 5


def test_mlflow_gets_numbers_and_config_and_goes_on(tiny_cfg, tmp_path, mlflow):
    overrides = [*STEPS, "train.mlflow.enabled=true"]
    run_training(tiny_cfg(*overrides, "train.max_iter=3"), resume=False)
    assert mlflow.status == {"run0": "FINISHED"}
    assert mlflow.artifacts["run0", "config.json"]["train"]["max_iter"] == 3
    run_training(tiny_cfg(*overrides), resume=True)
    assert list(mlflow.runs) == ["run0"] and list(mlflow.experiments) == ["co-detr"]
    assert (tmp_path / "out" / "mlflow_run.txt").read_text() == "run0\n"
    losses = [(step, value) for name, value, _, step in mlflow.runs["run0"] if name == "total_loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 5]


def test_mlflow_that_fails_later_does_not_stop_the_training(tiny_cfg, tmp_path, mlflow, caplog):
    mlflow.down = True
    run_training(tiny_cfg(*STEPS, "train.mlflow.enabled=true"), resume=False)
    assert "MLflow lacks iteration 1: server is away" in caplog.text
    assert (tmp_path / "out" / "model_final.pth").exists()


def test_a_tracker_that_cannot_start_is_one_sentence(tiny_cfg, tmp_path, wandb, mlflow):
    def refuse(**arguments):
        raise wandb.errors.Error("api_key not configured (no-tty).\nmore")

    wandb.init = refuse
    with pytest.raises(
        ConfigError, match=r"W&B cannot be used \(api_key .*\): log in with wandb l"
    ):
        run_training(tiny_cfg(*WANDB), resume=False)
    run_training(tiny_cfg("train.mlflow.enabled=true", "train.max_iter=3"), resume=False)
    mlflow.runs.clear()
    with pytest.raises(ConfigError, match=r"MLflow cannot be used \(no run run0\): check train"):
        run_training(tiny_cfg("train.mlflow.enabled=true"), resume=True)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(tiny_cfg, tmp_path, monkeypatch, name):
    monkeypatch.setattr("co_detr.engine.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"train.{name}.enabled=true needs .* pip install {name}"):
        run_training(tiny_cfg(f"train.{name}.enabled=true"), resume=False)
    assert not (tmp_path / "out").exists()


def test_real_wandb_offline(tiny_cfg, tmp_path):
    pytest.importorskip("wandb")
    run_training(tiny_cfg(*STEPS, *WANDB, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*STEPS, *WANDB), resume=True)
    run_id = (tmp_path / "out" / "wandb_run.txt").read_text().strip()
    files = list((tmp_path / "out").glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files and all(path.stat().st_size > 0 for path in files)


def test_real_mlflow_in_a_local_store(tiny_cfg, tmp_path, monkeypatch):
    client_class = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
    uri = f"file:{tmp_path / 'store'}"
    overrides = [*STEPS, "train.mlflow.enabled=true", f'train.mlflow.tracking_uri="{uri}"']
    run_training(tiny_cfg(*overrides, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*overrides), resume=True)
    client = client_class(tracking_uri=uri)
    run_id = (tmp_path / "out" / "mlflow_run.txt").read_text().strip()
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run_id, "total_loss")]
    assert steps == [1, 2, 3, 5]
    assert client.get_metric_history(run_id, "bbox/AP")
