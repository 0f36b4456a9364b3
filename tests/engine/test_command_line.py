"""train_net.py explains a user's mistake in one sentence and leaves what was written intact."""

import pytest

from co_detr.errors import CheckpointError, DataError


def _sentence(result):
    assert result.returncode == 2, result.output
    assert "Traceback" not in result.output
    assert len(result.errors()) == 1, result.output
    return result.errors()[0]


def test_misspelt_override(train_net):
    assert "did you mean train.max_iter?" in _sentence(train_net("train.max_itr=3"))


def test_undecodable_image_found_by_a_worker_in_a_resumed_run(train_net, tiny_data, tmp_path):
    arguments = [*tiny_data.overrides(tmp_path / "out"), "dataloader.train.num_workers=1"]
    arguments.append("data.preflight.images=off")  # which would find it before any worker
    first = train_net(*arguments, "train.max_iter=3")
    assert first.returncode == 0, first.output
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("model*.pth")}
    for image in tiny_data.images.iterdir():
        image.write_bytes(image.read_bytes()[:100])
    message = _sentence(train_net(*arguments, "--resume"))
    assert message.startswith(f"error: image {tiny_data.images}") and "cannot be decoded" in message
    for name, content in written.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"


def test_debug_shows_the_traceback(train_net):
    result = train_net("--debug", "train.max_itr=3")
    assert result.returncode != 0 and "Traceback" in result.output


@pytest.mark.parametrize("error", [DataError, CheckpointError])
def test_sentence_of_an_error_from_a_worker(error):
    message = "image a.jpg cannot be decoded: replace it."
    assert error(message).sentence == message
    wrapped = f"Caught X in worker.\nTraceback ...\nco_detr.errors.{error.__name__}: {message}\n"
    assert error(wrapped).sentence == message
