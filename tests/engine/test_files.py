"""Files are on the disk before they have their name, and their name before the writer goes on."""

import os

import pytest

from co_detr.files import INCOMPLETE, remove_incomplete, write_error_of, written_whole


def test_the_order_of_what_reaches_the_disk(tmp_path, monkeypatch):
    done = []
    replace, fsync = os.replace, os.fsync

    def noting_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("fsync", os.path.basename(path), os.path.getsize(path)))
        fsync(descriptor)

    def noting_replace(source, target):
        done.append(("replace", os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with written_whole(str(tmp_path / "a.txt")) as file:
        file.write("content")
    assert done[0] == ("fsync", f"a.txt{INCOMPLETE}", 7)
    assert done[1] == ("replace", f"a.txt{INCOMPLETE}", "a.txt")
    assert done[2][:2] == ("fsync", tmp_path.name)
    assert (tmp_path / "a.txt").read_text() == "content"


def test_a_failure_leaves_the_former_file(tmp_path):
    (tmp_path / "a.txt").write_text("former")
    with pytest.raises(KeyboardInterrupt), written_whole(str(tmp_path / "a.txt")) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "former"


def test_only_incomplete_files_are_removed(tmp_path):
    for name in ("a.pth", "a.tmp", f"b.pth{INCOMPLETE}"):
        (tmp_path / name).write_text("")
    assert remove_incomplete(str(tmp_path)) == [f"b.pth{INCOMPLETE}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.tmp"]


def test_the_reason_behind_a_wrapped_error():
    reason = OSError(28, "No space left on device")
    try:
        try:
            raise reason
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch does)
    except RuntimeError as error:
        assert write_error_of(error) is reason
    assert write_error_of(RuntimeError("another one")) is None
