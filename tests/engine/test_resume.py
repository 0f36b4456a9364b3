"""Training that stops and resumes equals training that does not stop."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import read_yaml
from co_detr.engine.train import run_training
from co_detr.engine.writers import purge_events
from co_detr.errors import CheckpointError
from tests.engine.kill_and_resume import tensorboard_events
from tests.engine.tiny_detector import TinyDetector
from tests.modeling.builders import shrink
from tests.paths import config_path


def _losses(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("matching.loss_cls", "roi.loss_bbox", "total_loss", "grad_norm", "lr")
    return {
        line["iteration"]: [line[key] for key in keys] for line in lines if "total_loss" in line
    }


def _final_state(output_dir):
    return torch.load(output_dir / "model_final.pth")


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_equals_uninterrupted(tiny_cfg, tmp_path, workers):
    # Dropout uses the torch generator, augmentation NumPy's, and images come in two shapes.
    common = ["model.dropout=0.3", "lr_multiplier.drops=[0.5]"]
    torch.manual_seed(0)
    run_training(tiny_cfg(*common, output="whole"), resume=False)

    workers_too = f"dataloader.train.num_workers={workers}"
    torch.manual_seed(0)
    # Ends after 5 of 6 iterations, of which the checkpoint has 3.
    interrupted = tiny_cfg(*common, workers_too, output="parts")
    with pytest.raises(KeyboardInterrupt):
        run_training(_stopping_at(interrupted, 5), resume=False)
    torch.manual_seed(123)
    run_training(tiny_cfg(*common, workers_too, output="parts"), resume=True)

    # The interrupted run had logged two iterations more than it had saved.
    assert tensorboard_events(tmp_path / "whole") == tensorboard_events(tmp_path / "parts")
    whole, parts = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert sorted(whole) == list(range(6))
    assert whole == parts
    expected, actual = _final_state(tmp_path / "whole"), _final_state(tmp_path / "parts")
    assert actual["iteration"] == 5
    for name, value in expected["model"].items():
        assert torch.equal(value, actual["model"][name]), name
    moments = expected["trainer"]["optimizer"]["state"]
    for index, state in moments.items():
        other = actual["trainer"]["optimizer"]["state"][index]
        assert torch.equal(state["exp_avg_sq"], other["exp_avg_sq"])


def _stopping_at(cfg, iteration):
    """The config with a mapper that interrupts the run when it would load that iteration."""
    cfg.dataloader.train.mapper = {
        "_target_": InterruptingMapper,
        "mapper": cfg.dataloader.train.mapper,
        "samples": iteration * cfg.train.effective_batch_size,
    }
    cfg.dataloader.train.num_workers = 0
    return cfg


class InterruptingMapper:
    def __init__(self, mapper, samples):
        self.mapper = mapper
        self.samples = samples

    def __call__(self, record):
        if self.samples == 0:
            raise KeyboardInterrupt
        self.samples -= 1
        return self.mapper(record)


@pytest.mark.slow
def test_resuming_a_finished_run_only_evaluates(tiny_cfg, tmp_path):
    first = run_training(tiny_cfg("train.max_iter=3"), resume=False)
    before = (tmp_path / "out" / "model_final.pth").read_bytes()
    (tmp_path / "out" / "metrics.json").unlink()
    again = run_training(tiny_cfg("train.max_iter=3"), resume=True)
    assert again == first
    assert (tmp_path / "out" / "model_final.pth").read_bytes() == before
    assert (tmp_path / "out" / "metrics.json").exists()


def test_only_the_newest_checkpoints_are_kept_across_a_resume(tiny_cfg, tmp_path):
    keep = ["train.checkpointer.period=1", "train.checkpointer.max_to_keep=2"]
    run_training(tiny_cfg(*keep, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*keep, "train.max_iter=5"), resume=True)
    names = sorted(path.name for path in (tmp_path / "out").glob("model_0*"))
    assert names == ["model_0000003.pth", "model_0000004.pth"]


def test_resume_warns_when_the_order_of_images_changes(tiny_cfg, caplog):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    run_training(tiny_cfg("train.effective_batch_size=2", "train.max_iter=4"), resume=True)
    assert "another total_batch_size" in caplog.text


def _group_settings(output_dir):
    groups = _final_state(output_dir)["trainer"]["optimizer"]["param_groups"]
    return [(group["initial_lr"], group["weight_decay"], list(group["betas"])) for group in groups]


def test_settings_of_the_optimizer_take_effect_on_a_resume(tiny_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    new = ["optimizer.lr=1e-6", "optimizer.weight_decay=0.5", "optimizer.betas=[0.8,0.99]"]
    run_training(tiny_cfg(*new), resume=True)
    out = tmp_path / "out"
    rates = sorted(_group_settings(out))
    assert rates == [(pytest.approx(1e-7), 0.5, [0.8, 0.99]), (1e-6, 0.5, [0.8, 0.99])]
    assert max(_losses(out)[5][4:]) <= 1e-6 < 1e-3 <= max(_losses(out)[2][4:])
    assert "lr: 0.01 -> 1e-06" in caplog.text
    assert "; betas: [0.9, 0.999] -> [0.8, 0.99]; weight_decay: 0.0001 -> 0.5." in caplog.text
    assert "optimizer.lr: 0.01 -> 1e-06" in caplog.text  # of config.yaml
    config = read_yaml(str(out / "config.yaml"))
    assert config["optimizer"]["lr"] == 1e-6 and config["optimizer"]["weight_decay"] == 0.5


def test_a_resume_with_other_settings_equals_a_hand_made_one(tiny_cfg, tmp_path):
    """Moments of the checkpoint, everything else of the config: compared with torch's own AdamW."""
    run_training(tiny_cfg("train.max_iter=3", "train.clip_grad.max_norm=null"), resume=False)
    before = _final_state(tmp_path / "out")
    cfg = tiny_cfg("optimizer.lr=1e-4", "train.max_iter=4", "train.clip_grad.max_norm=null")
    run_training(cfg, resume=True)
    after = _final_state(tmp_path / "out")
    names = before["trainer"]["optimizer_layout"]["parameters"]
    for index, name in enumerate(names):
        old = before["trainer"]["optimizer"]["state"][index]
        new = after["trainer"]["optimizer"]["state"][index]
        gradient = (new["exp_avg"] - 0.9 * old["exp_avg"]) / 0.1
        parameter = torch.nn.Parameter(before["model"][name].clone())
        parameter.grad = gradient
        rate = 1e-5 if name.startswith("backbone.") else 1e-4
        expected = torch.optim.AdamW([parameter], lr=rate, weight_decay=1e-4)
        expected.state[parameter] = {key: value.clone() for key, value in old.items()}
        expected.step()
        torch.testing.assert_close(after["model"][name], parameter.detach(), rtol=0, atol=2e-6)


def test_other_groups_of_parameters_keep_their_moments(tiny_cfg, tmp_path):
    """Another factor for the backbone puts the parameters into other groups, in another order."""
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    before = _final_state(tmp_path / "out")["trainer"]
    for factor, prefixes in ((1.0, "[backbone.]"), (0.5, "[locate.]")):
        run_training(
            tiny_cfg(
                "train.max_iter=3",
                f"optimizer.params.lr_factor_func.factor={factor}",
                f"optimizer.params.lr_factor_func.prefixes={prefixes}",
                output="out",
            ),
            resume=True,
        )
        # Nothing was trained: what would be saved is what was loaded.
        cfg = tiny_cfg(
            "train.max_iter=4",
            "optimizer.lr=0",
            f"optimizer.params.lr_factor_func.factor={factor}",
            f"optimizer.params.lr_factor_func.prefixes={prefixes}",
        )
        shutil.copytree(tmp_path / "out", tmp_path / f"copy{factor}")
        cfg.train.output_dir = str(tmp_path / f"copy{factor}")
        run_training(cfg, resume=True)
        after = _final_state(tmp_path / f"copy{factor}")["trainer"]
        old, new = (
            {
                name: checkpoint["optimizer"]["state"][index]
                for index, name in enumerate(checkpoint["optimizer_layout"]["parameters"])
            }
            for checkpoint in (before, after)
        )
        assert old.keys() == new.keys()
        for name, moments in old.items():
            assert new[name]["exp_avg"].shape == moments["exp_avg"].shape
            kept = 0.999 * moments["exp_avg_sq"]
            assert torch.all(new[name]["exp_avg_sq"] >= kept * (1 - 1e-5)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sgd", "the optimizer is torch.optim.sgd.SGD but the checkpoint was trained with torch"),
        ("optimizer.amsgrad=true", "optimizer.amsgrad=true needs moments"),
        ("frozen", "classify.bias is not trained any more; 0 new, 2 gone"),
        ("model.channels=9", "or start a new run with train.init_checkpoint set to the checkpoint"),
    ],
)
@pytest.mark.parametrize("version", ["today", "earlier"])
def test_what_cannot_be_resumed_is_one_sentence(tiny_cfg, tmp_path, change, message, version):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    if version == "earlier":
        path = tmp_path / "out" / "model_final.pth"
        content = torch.load(path)
        del content["trainer"]["optimizer_layout"]
        torch.save(content, path)
        message = message.replace("trained with torch", "trained with another one")
        message = message.replace("classify.bias is", "other groups of parameters than").split(
            " not"
        )[0]
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    cfg = tiny_cfg(*([change] if "=" in change else []))
    if change == "sgd":
        cfg.optimizer = {"_target_": torch.optim.SGD, "params": cfg.optimizer.params, "lr": 1.0}
    if change == "frozen":
        cfg.model._target_ = FrozenDetector
    with pytest.raises(CheckpointError) as caught:
        run_training(cfg, resume=True)
    assert message in caught.value.sentence and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


class FrozenDetector(TinyDetector):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.classify.requires_grad_(False)


def test_where_a_run_began_stays_in_its_config(tiny_cfg, tmp_path, caplog):
    run_training(tiny_cfg("train.max_iter=3", output="first"), resume=False)
    first = str(tmp_path / "first" / "model_final.pth")
    run_training(tiny_cfg("train.max_iter=3", f"train.init_checkpoint={first}"), resume=False)
    run_training(tiny_cfg("train.init_checkpoint=other.pth", "train.max_iter=4"), resume=True)
    assert "train.init_checkpoint=other.pth has no effect" in caplog.text
    caplog.clear()
    run_training(tiny_cfg("train.max_iter=5"), resume=True)
    assert "has no effect" not in caplog.text
    assert read_yaml(str(tmp_path / "out" / "config.yaml"))["train"]["init_checkpoint"] == first


def test_an_unchanged_resume_tells_no_changes(tiny_cfg, caplog):
    caplog.set_level("INFO")
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    run_training(tiny_cfg("train.max_iter=3"), resume=True)
    assert "differ from" not in caplog.text and "changed:" not in caplog.text


def test_event_files_are_purged_and_stay_readable(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=4"), resume=False)
    (file,) = (tmp_path / "out").glob("events.out.tfevents.*")
    whole = tensorboard_events(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-5])  # as a run that is killed leaves it
    purge_events(str(tmp_path / "out"), lambda name, iteration: iteration < 2 and name != "lr")
    kept = tensorboard_events(tmp_path / "out")
    assert kept == [line for line in whole if line[1] < 2 and line[0] != "lr"] != []
    reader = EventAccumulator(str(tmp_path / "out")).Reload()
    assert [scalar.step for scalar in reader.Scalars("total_loss")] == [0, 1]
    purge_events(str(tmp_path / "out"), lambda name, iteration: False)
    assert not list((tmp_path / "out").glob("events*"))


def test_a_new_run_in_the_folder_begins_its_curves(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=4"), resume=False)
    run_training(tiny_cfg("train.max_iter=2"), resume=False)
    reader = EventAccumulator(str(tmp_path / "out")).Reload()
    assert [scalar.step for scalar in reader.Scalars("total_loss")] == [0, 1]


@pytest.mark.slow
def test_a_training_of_version_0_1_goes_on(tiny_data, tmp_path):
    """Query sources had numbers there, also in the names that the optimizer's state keeps."""

    def numbered(name):
        return name.replace("queries.matching.", "queries.0.")

    def train(output, max_iter, resume=False):
        cfg = load_config(
            config_path("deformable_detr_r50"),
            [*tiny_data.overrides(tmp_path / output), f"train.max_iter={max_iter}"],
        )
        cfg.model.num_classes = 2
        cfg.dataloader.test.mapper.augmentations.short_edge = 64
        cfg.dataloader.train.mapper.augmentations.update(short_edges=[64], crop_probability=0.0)
        cfg.train.update(effective_batch_size=2, eval_period=0)
        torch.manual_seed(0)
        run_training(shrink(cfg), resume)
        return tmp_path / output / "model_final.pth"

    whole = torch.load(train("whole", 3))["model"]
    path = train("parts", 2)
    content = torch.load(path)
    content["model"] = {numbered(key): value for key, value in content["model"].items()}
    layout = content["trainer"]["optimizer_layout"]
    layout["parameters"] = [numbered(name) for name in layout["parameters"]]
    assert "queries.0.content.weight" in layout["parameters"]
    torch.save(content, path)
    resumed = torch.load(train("parts", 3, resume=True))["model"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
