"""Checkpoints by path, address, hub path or name of a model: a file on this machine, fetched once.

===============================  ==================================================================
``output/run/model_final.pth``   a file of yours
``https://host/file.pth``        also ``http://`` and ``file://``
``hf://owner/repository/file``   of the Hugging Face hub; ``hf://owner/repository@revision/file``
``co_dino_r50``                  released weights of a model of the zoo
``detectron2://...``             whatever else Detectron2's `PathManager` knows
===============================  ==================================================================

What is fetched stays in Detectron2's cache, ``$FVCORE_CACHE`` or ``~/.torch/iopath_cache``. A file
gets its name when it is whole: connections that break or stall are taken up where they ended, and
the checksum, where one is known, is compared.
"""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import re
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from tqdm import tqdm

from co_detr.errors import CheckpointError, first_line
from co_detr.files import INCOMPLETE, sha256_of

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # connections in a row that bring nothing new before a fetch is given up
PATIENCE = 30.0  # seconds without a byte until a connection counts as broken
PAUSE = 1.0  # seconds before the second attempt; doubles

_HUB = "https://huggingface.co"
_HUB_VARIABLE, _TOKEN_VARIABLE = "HF_ENDPOINT", "HF_TOKEN"  # as the hub's own library has them
_HUB_PATH = re.compile(r"hf://([^/@]+)/([^/@]+)(?:@([^/]+))?/(.+)")
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')
# torchvision's convention: the checksum begins with what stands behind the last hyphen.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
_CHUNK = 1 << 20
_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)  # statuses of a busy server


def local_file(source: str | os.PathLike[str], remedy: str = "name an existing file") -> str:
    """The path of a checkpoint on this machine, which is fetched if need be.

    Args:
        source: see the table above. A file of that name comes first.
        remedy: what to do about a file that does not exist.

    Raises:
        CheckpointError: if there is no such file, or it cannot be fetched; says where it can be put
            by hand.
    """
    path = os.fspath(source)
    if os.path.isfile(path):
        return path
    scheme = urlsplit(path).scheme if "://" in path else ""
    if scheme in ("http", "https", "file", "hf"):
        return fetch(path)
    if scheme:
        try:
            return PathManager.get_local_path(path)
        except Exception as error:  # its handlers raise what they like
            raise CheckpointError(
                f"checkpoint {path} cannot be fetched ({first_line(error)}): {remedy}."
            ) from error
    if not os.path.dirname(path):
        # The zoo reads checkpoints, too, so that it cannot be imported above.
        from co_detr.model_zoo import ZOO, resolve_checkpoint

        if path in ZOO:
            return resolve_checkpoint(path)
    raise CheckpointError(f"checkpoint {path} does not exist: {remedy}.")


def fetch(source: str, sha256: str | None = None) -> str:
    """Fetches a file unless it is there already.

    Several processes may ask for one file: the first fetches it, the others wait. While it is not
    whole it is called ``<path>.incomplete``; that is kept when connections end before their time,
    and the next call goes on from there, if the server still has the same file and says so.

    Args:
        source: ``https://``, ``http://``, ``file://`` or ``hf://``.
        sha256: of the file, hexadecimal; None: what the hub says of it, or its name
            (``resnet50-0676ba61.pth``), if they do.

    Returns:
        where it is in Detectron2's cache.

    Raises:
        CheckpointError: if it cannot be fetched, is not the file that it should be, or no file of
            weights at all.
    """
    address = _hub_address(source) if source.startswith("hf://") else source
    path = Path(get_cache_dir()) / unquote(urlsplit(address).path).lstrip("/")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with _alone(path):
                if not path.is_file():
                    _Download(source, address, path, sha256).run()
    except OSError as error:  # of the disk: those of the network have become sentences
        raise CheckpointError(
            f"checkpoint {source} cannot be written to {path} "
            f"({error.strerror or first_line(error)}): make room there or set FVCORE_CACHE to "
            "another folder."
        ) from error
    return str(path)


def _hub_address(path: str) -> str:
    found = _HUB_PATH.fullmatch(path)
    if found is None:
        raise CheckpointError(
            f"checkpoint {path} is no path of the hub: write hf://OWNER/REPOSITORY/FILE, or "
            "hf://OWNER/REPOSITORY@REVISION/FILE."
        )
    owner, repository, revision, file = found.groups()
    hub = os.environ.get(_HUB_VARIABLE, _HUB).rstrip("/")
    return f"{hub}/{owner}/{repository}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of the block; the lock ends with the process."""
    lock = path.with_name(f"{path.name}.lock")
    while True:
        with open(lock, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Who had it before has removed it.
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


class _BrokenError(Exception):
    """The connection brought less than it should: worth another try."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers what the hub says of a file before it sends the client on to where it is stored."""

    def __init__(self) -> None:
        self.sha256: str | None = None

    def redirect_request(
        self, req: Any, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        self.sha256 = self.sha256 or _linked_checksum(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _linked_checksum(headers: HTTPMessage) -> str | None:
    """SHA-256 that the hub gives for a large file."""
    found = _SHA256.fullmatch(headers.get("X-Linked-Etag", ""))
    return found[1] if found else None


@dataclass
class _Download:
    """One file on its way.

    Attributes:
        source, sha256: see `fetch`.
        address: what `source` stands for.
        path: where it is going to be.
        version: what the server calls this version of the file (its ETag), by which a partial file
            may be continued; None: it does not say.
    """

    source: str
    address: str
    path: Path
    sha256: str | None
    version: str | None = None

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}{INCOMPLETE}")

    @property
    def partial_version(self) -> Path:
        """Beside a partial file: the version that it is a part of."""
        return self.path.with_name(f"{self.path.name}.version{INCOMPLETE}")

    def run(self) -> None:
        """Brings the file whole and checked under its name."""
        logger.info("Fetching %s to %s", self.source, self.path)
        if self.partial_version.is_file():
            self.version = self.partial_version.read_text(encoding="utf-8")
        fruitless, reason = 0, ""
        while fruitless < ATTEMPTS:
            if fruitless:
                time.sleep(PAUSE * 2 ** (fruitless - 1))
            before = self._size()
            try:
                self._connect()
                return self._finish()
            except HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    self._remove()  # there is nothing behind what is here: begin again
                elif error.code not in _WORTH_ANOTHER_TRY:
                    self._fail(reason, error.code)
            except (URLError, HTTPException, TimeoutError, ConnectionError, _BrokenError) as error:
                reason = first_line(getattr(error, "reason", None) or error)
            if self.address.startswith("file:"):
                break
            fruitless = 0 if self._size() > before else fruitless + 1
        self._fail(reason)

    def _finish(self) -> None:
        self._check()
        with open(self.partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        self._remove()

    def _connect(self) -> None:
        """Adds what one connection brings to the partial file.

        Raises:
            _BrokenError: if that is not all.
        """
        have = self._size() if self.version else 0
        request = urllib.request.Request(self.address, headers={"User-Agent": "co_detr"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", self.version or "")
        hub = os.environ.get(_HUB_VARIABLE, _HUB).rstrip("/")
        if (token := os.environ.get(_TOKEN_VARIABLE)) and self.address.startswith(f"{hub}/"):
            # Not for the place that the hub redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        redirects = _Redirects()
        opener = urllib.request.build_opener(redirects)
        with opener.open(request, timeout=PATIENCE) as response:
            continues = getattr(response, "status", None) == HTTPStatus.PARTIAL_CONTENT
            self.sha256 = self.sha256 or redirects.sha256 or _linked_checksum(response.headers)
            self._remember(response.headers.get("ETag"))
            length = response.headers.get("Content-Length", "")
            start = have if continues else 0
            total = start + int(length) if length.isdigit() else None
            with (
                open(self.partial, "ab" if continues else "wb") as file,
                tqdm(
                    desc=self.path.name,
                    total=total,
                    initial=start,
                    unit="B",
                    unit_scale=True,
                    disable=None,  # without a terminal
                ) as progress,
            ):
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    progress.update(len(chunk))
        if total is not None and self._size() < total:
            raise _BrokenError(f"the connection ended after {self._size()} of {total} bytes")

    def _remember(self, version: str | None) -> None:
        # A weak one (W/) promises equal meaning, not equal bytes.
        self.version = None if version is None or version.startswith("W/") else version
        if self.version is None:
            self.partial_version.unlink(missing_ok=True)
        else:
            self.partial_version.write_text(self.version, encoding="utf-8")

    def _size(self) -> int:
        return self.partial.stat().st_size if self.partial.is_file() else 0

    def _check(self) -> None:
        expected = self.sha256
        if expected is None and (named := _HASH_IN_NAME.search(self.path.name)):
            expected = named[1]
        if expected is not None:
            digest = sha256_of(self.partial)
            if not digest.startswith(expected):
                self._remove()
                self._fail(
                    f"it is another file than it should be: its SHA-256 is {digest}, not {expected}"
                )
        elif problem := _defect(self.partial):
            self._remove()
            self._fail(problem)

    def _remove(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.partial_version.unlink(missing_ok=True)

    def _fail(self, reason: str, status: int = HTTPStatus.OK) -> NoReturn:
        if self.version is None:  # no later call could go on from it
            self._remove()
        advice = ""
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            advice = f"ask for access and set {_TOKEN_VARIABLE} to your token, or "
        it = "it" if self.source == self.address else self.address
        raise CheckpointError(
            f"checkpoint {self.source} cannot be fetched ({reason}): {advice}fetch {it} by other "
            f"means and put it at {self.path}."
        )


def _defect(path: Path) -> str:
    """What shows that a file without a checksum is not whole or no checkpoint; "": nothing."""
    with open(path, "rb") as file:
        start = file.read(512)
        size = file.seek(0, os.SEEK_END)
        if start.lstrip()[:1] == b"<":
            return "a web page came instead of the file"
        if start.startswith(b"version https://git-lfs"):
            return "the pointer of a large file in Git came instead of the file"
        cut = not size
        if start.startswith(b"PK\x03\x04"):  # PyTorch's; its directory is at the end
            cut = not zipfile.is_zipfile(file)
        elif path.name.removesuffix(INCOMPLETE).endswith(".pkl"):
            file.seek(-1, os.SEEK_END)
            cut = file.read() != pickle.STOP
        return f"its end is missing: {size} bytes came" if cut else ""
