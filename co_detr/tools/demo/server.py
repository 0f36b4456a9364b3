"""The demo's web page: one page, its static files, and `detect`, which takes an image file.

`Detector` turns the bytes of a file into what the page shows; `create_app` and `listen` serve it.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import os
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from flask import Flask, Response, render_template, request
from PIL import Image
from waitress import create_server
from werkzeug.exceptions import (
    Forbidden,
    HTTPException,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)

from co_detr.data.images import is_deep, orientation_of
from co_detr.errors import ConfigError, DataError, UserError
from co_detr.tools.draw.boxes import class_colors, text_color
from co_detr.tools.predict.predictor import Predictor
from co_detr.tools.predict.results import Classes, ImageResult

MEGABYTES = 64  # of an image file

# What strangers may send: decoders that are much used and kept safe; none of them
# starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_JPEG_QUALITY = 92
_THREADS = 16  # most of them wait for the model; see `Detector`
_UPLOAD_TYPE = "application/octet-stream"

# The browser itself then refuses to load anything from elsewhere or to send anything there.
_POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Upload:
    """An image file of a browser.

    Attributes:
        name: of the file, for messages and the json.
        content: its bytes.
        shown_size: (width, height) in which the browser can show it; None: it cannot.
    """

    name: str
    content: bytes
    shown_size: tuple[int, int] | None


@dataclass(frozen=True)
class Detection:
    """What was found in an image.

    Attributes:
        coco: an annotation file with scores, of one image; see `ImageResult`.
        seconds: what the model took.
        picture: the image as the model saw it, as a data URL; None: the browser shows it so.
    """

    coco: dict[str, list[dict[str, Any]]]
    seconds: float
    picture: str | None


class Detector:
    """Detects in one image after the other, in the order in which they come.

    One thread does all of it: images of several users would slow each other down, and each thread
    that calls a model gets a set of worker threads of its own.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __call__(self, upload: Upload) -> Detection:
        """Waits for its turn, then detects.

        Raises:
            DataError: if the bytes are no image that can be read.
        """
        return self._thread.submit(self._detect, upload).result()

    def _detect(self, upload: Upload) -> Detection:
        reader = self.predictor.reader
        image = reader.open(io.BytesIO(upload.content), upload.name, FORMATS)
        # The browser knows nothing of the range of values that the model is for.
        scaled = is_deep(image)
        # Some browsers apply the EXIF orientation only to JPEG files.
        turned = image.format != "JPEG" and orientation_of(image) != 1
        try:
            sample = self.predictor.prepare(image)
        except DataError as error:
            raise DataError(f"{upload.name}: {error.sentence}") from error
        start = perf_counter()
        ((_, _, found),) = self.predictor.stream([(None, sample)])
        seconds = perf_counter() - start
        classes = Classes.numbered(self.predictor.class_names)
        coco = ImageResult.of(1, upload.name, found, classes).content(classes)
        height, width = sample.rgb.shape[:2]
        as_shown = upload.shown_size == (width, height) and not (turned or scaled)
        return Detection(coco, seconds, None if as_shown else _data_url(sample.rgb))


def _data_url(rgb: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def create_app(
    predictor: Predictor, score: float, title: str, hosts: Collection[str] = ()
) -> Flask:
    """The application.

    Args:
        hosts: names under which the page may be opened, beside IP addresses, localhost and the
            name of this machine. A page of the web could point its own name at this machine to get
            around the browser's rule that it reaches only its own server.
        score: where the slider starts, from 0 to 1. The page gets all boxes that `predictor`
            gives and leaves out those below the slider by itself.
        title: names the model on the page.
    """
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MEGABYTES * 2**20
    detector = Detector(predictor)
    settings = {"classes": _classes(predictor), "megabytes": MEGABYTES, "uploadType": _UPLOAD_TYPE}

    @app.before_request
    def require_known_host() -> None:
        if not _is_known(request.host, hosts):
            raise Forbidden(
                "the page does not go by this name: open it under the IP address of its machine, "
                "or start demo.py with --allow-host NAME."
            )

    @app.get("/")
    def page() -> str:
        return render_template("page.html", settings=settings, score=score, title=title)

    @app.post("/detect")
    def detect() -> dict[str, Any]:
        # A page of another origin cannot send this type without being asked, and is not allowed.
        if request.mimetype != _UPLOAD_TYPE:
            raise UnsupportedMediaType(f"send the image file as {_UPLOAD_TYPE}.")
        name = os.path.basename(request.args.get("name", "")) or "image"
        return asdict(detector(Upload(name, request.get_data(), _shown_size())))

    @app.errorhandler(Exception)
    def explain(error: Exception) -> tuple[dict[str, str], int]:
        if isinstance(error, RequestEntityTooLarge):
            return {"error": f"the file is larger than {MEGABYTES} MB: make it smaller."}, 413
        if isinstance(error, HTTPException):
            return {"error": str(error.description)}, error.code or 500
        if isinstance(error, UserError):
            return {"error": error.sentence}, 400 if isinstance(error, DataError) else 500
        app.logger.error("a request failed", exc_info=error)
        name = type(error).__name__
        return {"error": f"the model failed ({name}): its terminal shows where."}, 500

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return app


def _classes(predictor: Predictor) -> list[dict[str, str]]:
    """Name and colors of the classes, in their order; those that predict.py draws."""
    colors = class_colors(predictor.class_names)
    return [
        {
            "name": name,
            "color": "#{:02x}{:02x}{:02x}".format(*colors[name]),
            "text": text_color(colors[name]),
        }
        for name in predictor.class_names
    ]


def _shown_size() -> tuple[int, int] | None:
    size = [request.args.get(key, type=int) for key in ("width", "height")]
    return None if None in size else (size[0], size[1])


def _is_known(host: str, names: Collection[str]) -> bool:
    """Whether a Host header, with or without a port, is an address or a name of this page."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = ("localhost", socket.gethostname(), *names)
        return name in {host.lower() for host in own}
    return True


def listen(app: Flask, host: str, port: int) -> Any:
    """Waitress's server on an address; its `run` serves until it is interrupted.

    Raises:
        ConfigError: if one cannot listen there.
    """
    try:
        return create_server(
            app,
            host=host,
            port=port,
            threads=_THREADS,
            max_request_body_size=app.config["MAX_CONTENT_LENGTH"] + 1,
        )
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the page cannot listen on {host}:{port} ({reason}): choose another --port or --host."
        ) from error
