"""How many files a reader of one training step opens, and how often one leads to the next."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

import co_detr
from tests.modeling.builders import make_batch, tiny_model

PACKAGE = f"{Path(co_detr.__file__).parent}/"
MOST_FILES, MOST_CHANGES = 16, 59

pytestmark = pytest.mark.cpu_only("counts calls, which are the same on every device")


def files_of_calls(function):
    """The file of every call of a function of the package, in order.

    What has no name of its own (comprehensions, lambdas) is read where it stands and not counted.
    """
    files = []

    def note(frame, event, _argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name[0] != "<":
            files.append(code.co_filename.removeprefix(PACKAGE))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def test_a_training_step_is_read_in_few_files():
    """Forward pass of K = 2 and two images; a change is a call in another file than the last."""
    model, batch = tiny_model(2), make_batch()
    torch.manual_seed(0)
    with EventStorage():
        files = files_of_calls(lambda: model(batch))
    changes = sum(first != second for first, second in zip(files, files[1:], strict=False))
    assert len(files) > 400
    assert len(set(files)) <= MOST_FILES, sorted(set(files))
    assert changes <= MOST_CHANGES, changes
