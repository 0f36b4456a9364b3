"""Files from servers that stop in the middle, stall, send somewhere else, or say what is not so."""

import hashlib
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from co_detr import Predictor, model_zoo
from co_detr.checkpoint import fetching
from co_detr.checkpoint.fetching import fetch, local_file
from co_detr.checkpoint.saving import Checkpointer
from co_detr.errors import CheckpointError
from co_detr.files import INCOMPLETE
from co_detr.model_zoo.table import ZooEntry


def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"weight": torch.arange(20000.0)}}, buffer)
    return buffer.getvalue()


CONTENT = _checkpoint()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at every path, as well as it is told to.

    Attributes:
        cut: bytes that a connection sends before it ends, in turn; then all.
        etag: of the file; "": the server says nothing of its version.
        ranges: whether it can go on from a byte.
        length: what it says of the whole size; None: the truth.
        status: of its answers.
        redirect: an address that it sends the client to, with `linked` as the hub's checksum.
        stall: seconds that it waits in the middle.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges = CONTENT, '"one"', True
        self.cut: list[int] = []
        self.length: int | None = None
        self.status, self.stall = 200, 0.0
        self.redirect = self.linked = ""
        self.requests: list[dict[str, str]] = []

    def address(self, name: str = "weights.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/folder/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers) | {"path": self.path})
        if server.redirect and self.path.startswith(("/folder", "/owner")):
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.send_header("X-Linked-Etag", f'"{server.linked}"')
            self.end_headers()
            return
        start, status = 0, server.status
        known = self.headers.get("If-Range") in (None, server.etag)
        if server.ranges and known and "Range" in self.headers:
            start, status = int(self.headers["Range"][len("bytes=") : -1]), 206
            if start >= len(server.content):
                self.send_error(416)
                return
        body = server.content[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(server.length or len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        sent = body[: server.cut.pop(0)] if server.cut else body
        self.wfile.write(sent[: len(sent) // 2])
        self.wfile.flush()
        time.sleep(server.stall)
        self.wfile.write(sent[len(sent) // 2 :])


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", model_zoo.FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "PAUSE", 0.01)
    monkeypatch.setattr(fetching, "PATIENCE", 5.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_a_file_is_fetched_once(server, tmp_path):
    path = fetch(server.address())
    assert Path(path) == tmp_path / "cache" / "folder" / "weights.pth"
    assert Path(path).read_bytes() == CONTENT and _left(tmp_path) == {"weights.pth"}
    assert local_file(server.address()) == path and len(server.requests) == 1


def test_a_connection_that_breaks_is_taken_up_where_it_ended(server, tmp_path):
    server.cut = [1000, 50000, 0]
    assert Path(fetch(server.address())).read_bytes() == CONTENT
    starts = [request.get("Range") for request in server.requests]
    assert starts == [None, "bytes=1000-", "bytes=51000-", "bytes=51000-"]
    assert _left(tmp_path) == {"weights.pth"}


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    server.cut = [1000] + [0] * fetching.ATTEMPTS
    with pytest.raises(CheckpointError, match=f"ended after 1000 of {len(CONTENT)} bytes"):
        fetch(server.address())
    assert _left(tmp_path) == {f"weights.pth{INCOMPLETE}", f"weights.pth.version{INCOMPLETE}"}
    server.requests.clear()
    assert Path(fetch(server.address())).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == ["bytes=1000-"]
    assert _left(tmp_path) == {"weights.pth"}


def test_parts_of_two_versions_do_not_become_one_file(server):
    server.cut = [1000] + [0] * fetching.ATTEMPTS
    with pytest.raises(CheckpointError):
        fetch(server.address())
    server.etag = '"two"'
    server.content = server.content[:500] + b"x" * 500 + server.content[1000:]
    assert Path(fetch(server.address())).read_bytes() == server.content


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_version_it_begins_again_and_leaves_nothing(server, tmp_path, etag):
    server.etag = etag
    server.cut = [1000] * 10
    with pytest.raises(CheckpointError, match="cannot be fetched") as caught:
        fetch(server.address())
    assert f"put it at {tmp_path / 'cache' / 'folder' / 'weights.pth'}." in str(caught.value)
    assert not any("Range" in request for request in server.requests) and not _left(tmp_path)


def test_a_server_that_cannot_go_on_sends_the_whole_file(server):
    server.ranges, server.cut = False, [1000]
    assert Path(fetch(server.address())).read_bytes() == CONTENT


def test_a_whole_file_that_had_not_got_its_name_yet(server, tmp_path):
    folder = tmp_path / "cache" / "folder"
    folder.mkdir(parents=True)
    (folder / f"weights.pth{INCOMPLETE}").write_bytes(CONTENT)
    (folder / f"weights.pth.version{INCOMPLETE}").write_text(server.etag)
    assert Path(fetch(server.address())).read_bytes() == CONTENT
    assert len(server.requests) == 2 and _left(tmp_path) == {"weights.pth"}


def test_a_server_that_stalls_ends_in_one_sentence(server, monkeypatch, tmp_path):
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    monkeypatch.setattr(fetching, "ATTEMPTS", 2)
    server.stall, server.etag = 0.5, ""
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(.*timed out\): fetch it by"):
        fetch(server.address())
    assert not _left(tmp_path)


def test_a_size_that_is_too_large(server, tmp_path):
    server.length, server.etag = len(CONTENT) + 100, ""
    with pytest.raises(CheckpointError, match=f"after {len(CONTENT)} of {len(CONTENT) + 100} byt"):
        fetch(server.address())
    assert not _left(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.pth", CONTENT), ("a.pkl", b"\x80\x02}q\x00."), ("b.bin", b"")]
)
def test_a_file_without_its_end_is_not_kept(server, tmp_path, name, content):
    server.content = content
    server.length = max(len(content) - 1, 0)
    with pytest.raises(CheckpointError, match="its end is missing"):
        fetch(server.address(name))
    assert not _left(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page came instead"),
        (b"version https://git-lfs.github.com/spec/v1\n", "the pointer of a large file"),
    ],
)
def test_what_is_no_checkpoint_is_not_kept(server, tmp_path, content, problem):
    server.content = content
    with pytest.raises(CheckpointError, match=problem):
        fetch(server.address())
    assert not _left(tmp_path)


def test_the_checksum_decides(server, tmp_path):
    with pytest.raises(CheckpointError, match=f"its SHA-256 is {SHA256}, not 00ff"):
        fetch(server.address(), sha256="00ff" * 16)
    with pytest.raises(CheckpointError, match="not 01234567"):  # torchvision's names have it
        fetch(server.address("resnet50-01234567.pth"))
    assert not _left(tmp_path)
    assert fetch(server.address(f"resnet50-{SHA256[:8]}.pth"))
    assert fetch(server.address(), sha256=SHA256)


@pytest.mark.parametrize(
    ("status", "part"),
    [(404, "answers 404"), (403, "ask for access and set HF_TOKEN to your token, or fetch it")],
)
def test_a_refusal_is_not_asked_again(server, tmp_path, status, part):
    server.status = status
    with pytest.raises(CheckpointError, match=part):
        fetch(server.address())
    assert len(server.requests) == 1 and not _left(tmp_path)


def test_a_busy_server_is_asked_again(server):
    server.status = 503
    with pytest.raises(CheckpointError, match="answers 503"):
        fetch(server.address())
    assert len(server.requests) == fetching.ATTEMPTS


def test_without_a_network(server, tmp_path):
    address = server.address()
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match=r"\(.*refused\): fetch it by other means and put it"):
        fetch(address)
    assert not _left(tmp_path)


def test_the_hub_says_which_checksum_it_has_and_gets_the_token_alone(server, monkeypatch, tmp_path):
    hub = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub + "/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.redirect, server.linked = f"http://localhost:{server.server_port}/store", SHA256
    path = local_file("hf://owner/name/sub/weights.pth")
    assert Path(path) == tmp_path / "cache/owner/name/resolve/main/sub/weights.pth"
    asked, stored = server.requests
    assert asked["path"] == "/owner/name/resolve/main/sub/weights.pth"
    assert asked["Authorization"] == "Bearer secret" and "Authorization" not in stored
    server.linked = "0" * 64
    with pytest.raises(CheckpointError, match="hf://owner/name@v1/w.pth cannot be .* another file"):
        local_file("hf://owner/name@v1/w.pth")
    with pytest.raises(CheckpointError, match="write hf://OWNER/REPOSITORY/FILE"):
        local_file("hf://name/weights.pth")


def test_processes_that_ask_at_once_fetch_one_file(server, tmp_path):
    server.stall = 0.2
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(server.address()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(server.requests) == 1
    assert _left(tmp_path) == {"weights.pth"}


def test_a_full_disk_or_a_forbidden_folder(server, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(fetching, "get_cache_dir", lambda: str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="cannot be written to .*: make room there or set FV"):
        fetch(server.address())


def test_training_and_prediction_take_addresses_and_names(server, monkeypatch, tmp_path):
    model = nn.Linear(1, 1, bias=False)
    buffer = io.BytesIO()
    torch.save({"model": {"weight": torch.tensor([[7.0]])}}, buffer)
    server.content = buffer.getvalue()
    Checkpointer(model, str(tmp_path)).load(server.address())
    assert model.weight.item() == 7
    entry = ZooEntry("quickstart", "", checkpoint="a.pth", page="p", url=server.address("a.pth"))
    monkeypatch.setitem(model_zoo.ZOO, "quickstart", entry)
    assert local_file("quickstart").endswith("folder/a.pth")
    with pytest.raises(CheckpointError, match="no_such does not exist: name an existing file"):
        local_file("no_such")
    with pytest.raises(CheckpointError, match="gone.pth does not exist: set train.init_checkpoint"):
        Checkpointer(model, str(tmp_path)).load("gone.pth")
    with pytest.raises(CheckpointError, match="holds no state dict|lacks|not fit"):
        Predictor("quickstart", device="cpu")  # what came is no detector
