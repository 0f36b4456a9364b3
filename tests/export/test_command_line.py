"""tools/export.py from the outside."""

import importlib.util
from pathlib import Path

import pytest
import torch

from co_detr.checkpoint.detector import load_detector
from co_detr.errors import ExportError
from co_detr.tools.export.command_line import check

TOOL = Path(__file__).resolve().parents[2] / "tools" / "export.py"


@pytest.fixture
def export(trained, tmp_path):
    """Runs the tool; returns its exit status and the file it was to write."""
    spec = importlib.util.spec_from_file_location("export_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object):
        file = tmp_path / "out.pt2"
        options = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
        options += ["--format", "torch_export", "--output", str(file)]
        return module.main([*options, *map(str, arguments)]), file

    return call


def test_export_and_check(export, trained, photos, capsys):
    status, file = export("--image-size", "96x128", "--check", *photos)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "5 classes, boxes and masks, images padded to 96x128." in printed
    assert f"agrees with the model on {len(photos)} images" in printed

    other = load_detector(trained.config, trained.checkpoint)
    with torch.no_grad():
        other.model.decoder.box_heads[-1].layers[-1].bias += 0.5
    with pytest.raises(ExportError, match="differs from the model .* on 4 of 4 images"):
        check(file, other, photos)


def test_errors_are_one_sentence(export, tmp_path, capsys):
    status, file = export("--check", tmp_path / "none.png")
    assert status == 2 and not file.exists()
    assert "none.png does not exist." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export("--image-size", "wide")
    assert "'wide' is not HEIGHTxWIDTH" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export("--image-size", "64x64", "--dynamic")


def test_other_detectors_than_the_decoder_are_refused(export, capsys):
    for arguments in (["--detector", "roi"], ["--set", "model.evaluate_with=cascade"]):
        status, file = export(*arguments)
        assert status == 2 and not file.exists()
        assert "cannot be exported: a file can hold the decoder alone" in capsys.readouterr().err
