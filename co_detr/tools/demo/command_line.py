"""The command line of demo.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from co_detr.errors import ConfigError
from co_detr.tools.predict.command_line import (
    add_amp_argument,
    add_device_argument,
    add_image_arguments,
    add_mask_argument,
    add_model_arguments,
    add_view_arguments,
    check_view_arguments,
    predictor_of,
)

LOCAL_HOST = "127.0.0.1"

EPILOG = """
examples:
  this machine     python demo.py --config-file output/mine/config.yaml \\
                       --checkpoint output/mine/model_final.pth
  a remote one     the same there, and here: ssh -L 7860:localhost:7860 THAT_MACHINE
  your network     add --host 0.0.0.0; everybody there can use the page, without a password

The page needs no network and loads nothing from elsewhere. Ctrl+C stops it.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of demo.py."""
    parser = argparse.ArgumentParser(
        description="Serves a web page: drop an image, see its boxes and masks, move the score "
        "slider.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_device_argument(parser)
    add_amp_argument(parser)
    add_image_arguments(parser)
    add_mask_argument(parser)
    add_view_arguments(parser)
    add = parser.add_argument
    add("--score", type=float, default=0.3, help="where the slider starts (default: 0.3)")
    add("--port", type=int, default=7860, help="port of the page (default: 7860)")
    add("--host", default=LOCAL_HOST, help=f"address to listen on (default: {LOCAL_HOST})")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which browsers open the page, as behind a proxy; can be repeated",
    )
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Serves the page until Ctrl+C.

    Raises:
        UserError: if an argument is wrong, a package is missing or the port is taken.
    """
    require_packages()
    from co_detr.tools.demo.server import create_app, listen

    if not 0 <= options.score <= 1:
        raise ConfigError(f"--score {options.score} must be from 0 to 1.")
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port} must be from 1 to 65535.")
    check_view_arguments(options)
    # The slider starts from all boxes, so that none is missing when it moves.
    predictor = predictor_of(options, score_threshold=0.0)
    if predictor.reader.channels != 3:
        raise ConfigError(
            f"the model is for images of {predictor.reader.channels} channels, which browsers do "
            "not show: use predict.py."
        )
    hosts = [options.host, *options.allow_host]
    app = create_app(predictor, options.score, _title(options), hosts)
    server = listen(app, options.host, options.port)
    where = "localhost" if options.host in (LOCAL_HOST, "0.0.0.0", "::") else options.host
    print(f"Open http://{where}:{options.port} in a browser; Ctrl+C stops the page.", flush=True)
    if options.host not in (LOCAL_HOST, "localhost"):
        print("Everybody who reaches this machine can use it, without a password.", flush=True)
    server.run()  # ends at Ctrl+C


def require_packages() -> None:
    """Raises a ConfigError if a package of the extra `demo` is missing."""
    try:
        import flask  # noqa: F401
        import waitress  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"demo.py needs Flask and waitress, which cannot be imported ({error}): install them "
            "with pip install flask waitress."
        ) from error


def _title(options: argparse.Namespace) -> str:
    files = [options.config_file, options.checkpoint]
    names = [os.path.basename(file) for file in files if file]
    return ", ".join([*names, options.detector] if options.detector else names)
