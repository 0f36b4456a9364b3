"""tools/average_checkpoints.py: the mean of weights of one model, and refusals of others."""

from pathlib import Path

import pytest
import torch

from co_detr.errors import exit_code
from co_detr.tools.average_checkpoints import parse_arguments
from co_detr.tools.average_checkpoints import run as run_tool


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "backbone.weight": torch.randn(4, 3, generator=generator),
        "auxiliary.roi.bias": torch.randn(5, generator=generator).half(),
        "steps": torch.tensor(seed),
    }


@pytest.fixture
def average(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Saves the contents, runs the tool on them; returns status, messages and the result."""

    def run(*contents: dict, flags: tuple[str, ...] = ()) -> tuple[int, str, dict]:
        paths = [str(tmp_path / f"{number}.pth") for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            torch.save(content, path)
        output = tmp_path / "average.pth"
        options = parse_arguments([*paths, "--output", str(output), *flags])
        status = exit_code(lambda: run_tool(options))
        said = capsys.readouterr()
        return status, said.out + said.err, torch.load(output) if output.exists() else {}

    return run


def test_it_is_the_mean(average) -> None:
    one, two = weights(1), weights(2)
    names = ["cell", "plate"]
    status, said, found = average(*({"model": w, "class_names": names} for w in (one, two)))
    assert status == 0 and found["class_names"] == names
    assert len(found["averaged_from"]) == 2
    for name in ("backbone.weight", "auxiliary.roi.bias"):
        expected = ((one[name].double() + two[name].double()) / 2).to(one[name].dtype)
        assert torch.equal(found["model"][name], expected)
    assert found["model"]["steps"] == 2
    assert "| backbone" in said and "| auxiliary.roi" in said


def test_equal_weights_stay_bit_for_bit(average) -> None:
    one = weights(1)
    _, said, found = average(*[{"model": one}] * 3)
    assert all(torch.equal(found["model"][name], value) for name, value in one.items())
    assert "| backbone      | 0.00 %" in said


def test_the_averaged_set_of_each_file(average) -> None:
    ema = [{"n_averaged": 3} | {f"module.{k}": v for k, v in weights(n).items()} for n in (1, 2)]
    contents = [{"model": weights(5), "ema": own} for own in ema]
    mean = (weights(1)["backbone.weight"] + weights(2)["backbone.weight"]) / 2
    assert torch.allclose(average(*contents)[2]["model"]["backbone.weight"], mean)
    raw = average(*contents, flags=("--weights", "raw", "--force"))[2]["model"]
    assert torch.equal(raw["backbone.weight"], weights(5)["backbone.weight"])
    status, said, _ = average(contents[0], {"model": weights(5)}, flags=("--force",))
    assert status == 2 and "1.pth has none: average what is alike" in said


def test_what_is_of_another_model_is_refused(average) -> None:
    one = {"model": weights(1), "class_names": ["cell"]}
    assert "at least two" in average(one)[1]
    status, said, _ = average(one, one | {"class_names": ["disc"]})
    assert status == 2 and "was trained on the classes (disc)" in said
    larger = {**weights(1), "auxiliary.roi.bias": torch.zeros(6), "mask_head.weight": torch.ones(1)}
    status, said, found = average(one, one | {"model": larger})
    assert status == 2 and not found and said.count("\n") == 1
    assert "2 tensors, in auxiliary.roi, mask_head (the first: auxiliary.roi.bias)" in said


def test_files_are_not_replaced_unasked(average) -> None:
    one = {"model": weights(1)}
    assert average(one, one)[0] == 0
    status, said, _ = average(one, one)
    assert status == 2 and "exists: choose another --output" in said
