"""Reads checkpoint files without running anything that is in them, and finds the weights in them.

A pickle can name any function and have it called while it is read. Here only functions that build
tensors, arrays and plain containers can be named; a file that names another one is refused, unless
the caller says ``unsafe``.
"""

from __future__ import annotations

import codecs
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from co_detr.errors import CheckpointError, ConfigError
from co_detr.moved import RENAMED_MODULES

logger = logging.getLogger(__name__)

AVERAGED = "ema"  # a checkpoint's key of averaged weights: what `AveragedModel.state_dict` gives
UNSAFE_SWITCH = "--unsafe (tools) or train.init_checkpoint_unsafe=true (training)"

Weights = Literal["ema", "raw"]

_WRAPPERS = ("state_dict", "model")
_MODULE = "module."  # before the names of a model that was saved inside of another module
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
# Where numpy's pickles look for its functions; the first name is that of numpy 1.
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_TYPES = (np.ndarray, np.dtype)
_NUMPY_KINDS = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"


class RefusedGlobalError(pickle.UnpicklingError):
    """A pickle names a function that is not known to be harmless."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it refers to {name}")
        self.name = name


def read_checkpoint(path: str, unsafe: bool = False) -> dict[str, Any]:
    """Reads a local ``.safetensors``, ``.pkl`` (Detectron2, Detectron) or PyTorch file.

    Args:
        path: the file.
        unsafe: run what the file wants to run. Only for files whose author you trust.

    Returns:
        The content, a dict. Of ``.pkl`` and ``.safetensors`` files in Detectron2's form: ``model``
        (tensors or arrays), and where known ``__author__`` and ``matching_heuristics``.

    Raises:
        CheckpointError: if the file cannot be read, holds no dict or wants to run code.
    """
    try:
        if path.endswith(".safetensors"):
            content = {"model": _read_safetensors(path)}
        elif path.endswith(".pkl"):
            content = _detectron_form(_read_pickle(path, unsafe))
        else:
            content = _read_torch(path, unsafe)
    except RefusedGlobalError as error:
        raise CheckpointError(
            f"checkpoint {path} was refused because it refers to {error.name}, which could run "
            "any code: get it from somebody you trust, or, if you trust whoever made this one, "
            f"load it with {UNSAFE_SWITCH}."
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be opened ({error.strerror}): name a file that you can read."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({_first_sentence(error)}): it is damaged or not a "
            "checkpoint; fetch or write it again."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path} holds no state dict but an object of type "
            f'{type(content).__name__}: save the model as {{"model": model.state_dict()}}.'
        )
    if path.endswith(".pyth"):
        return _pycls_form(content, path)
    return dict(content)


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What lies under ``state_dict`` or ``model``, however often wrapped; else the dict itself."""
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return unwrap(checkpoint[wrapper])
    return checkpoint


def plain_state(checkpoint: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The state dict inside a loaded file, as tensors, without wrappers and prefixes.

    Raises:
        CheckpointError: if there is none.
    """
    state = unwrap(checkpoint)
    named = all(isinstance(key, str) for key in state)
    if not (state and named and all(isinstance(v, Tensor | np.ndarray) for v in state.values())):
        found = shorten([str(key) for key in checkpoint]) or "nothing"
        raise CheckpointError(
            f"checkpoint {path} holds no state dict, only {found}: name a file that training "
            "wrote, ours or the reference's, or save the model as "
            '{"model": model.state_dict()}.'
        )
    return {key.removeprefix(_MODULE): torch.as_tensor(value) for key, value in state.items()}


def stored_class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The classes that a loaded file, ours or official, says it was trained on; None if silent."""
    meta = checkpoint.get("meta")
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else checkpoint.get("class_names")
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if is_list and names else None


def has_averaged(content: Mapping[str, Any]) -> bool:
    """Whether a loaded checkpoint of this project has averaged weights."""
    averaged = content.get(AVERAGED)
    return isinstance(averaged, Mapping) and "n_averaged" in averaged


def choose_weights(content: Mapping[str, Any], weights: Weights, path: str) -> dict[str, Any]:
    """A loaded checkpoint whose ``model`` is the chosen set of weights, where it has two.

    Args:
        content: what the file holds.
        weights: "ema" for the averaged ones, "raw" for those that the optimizer works on.
        path: of the file, for the log.

    Raises:
        ConfigError: if ``weights`` is neither.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f'train.init_checkpoint_weights={weights} must be "ema" or "raw".')
    if not has_averaged(content):
        return dict(content)
    if weights == "raw":
        logger.info("%s: its raw weights are used, not the averaged ones (EMA).", path)
        return dict(content)
    averaged = content[AVERAGED]
    logger.info(
        "%s: its averaged weights (EMA of %d steps) are used; "
        "train.init_checkpoint_weights=raw takes the others.",
        *(path, int(averaged["n_averaged"])),
    )
    state = {
        key.removeprefix(_MODULE): value
        for key, value in averaged.items()
        if key.startswith(_MODULE)
    }
    return {**content, "model": state}


def shorten(keys: Sequence[str], limit: int = 8) -> str:
    """The first ``limit`` of ``keys``, and how many more there are."""
    shown = ", ".join(keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


def _read_torch(path: str, unsafe: bool) -> Any:
    with open(path, "rb") as file:
        start = file.read(64)
    if not start.startswith((_ZIP, _PICKLE)):
        raise ValueError(f"it begins with {start[:24]!r}, as no PyTorch file does")
    if unsafe:
        return torch.load(path, map_location="cpu", weights_only=False)
    with _harmless_globals():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if refused := _REFUSED.search(str(error)):
                raise RefusedGlobalError(refused[1]) from error
            if start.startswith(_PICKLE):
                _read_pickle(path, unsafe=False)  # names what a plain pickle refers to
            # torch's advice to try without protection is not for a damaged file.
            raise ValueError("its pickle cannot be decoded") from error


def _read_pickle(path: str, unsafe: bool) -> Any:
    with open(path, "rb") as file:
        unpickler = pickle.Unpickler if unsafe else _ArrayUnpickler
        try:
            return unpickler(file, encoding="latin1").load()
        except RefusedGlobalError:
            raise
        except pickle.UnpicklingError as error:
            raise ValueError(f"its pickle cannot be decoded: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows plain containers and numpy arrays."""

    def __init__(self, file: IO[bytes], *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self.known = {
            f"{function.__module__}.{function.__name__}": function for function in _harmless()
        }

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        found = self.known.get(f"{module}.{name}")
        if found is None:
            raise RefusedGlobalError(f"{module}.{name}")
        return found


def _harmless() -> list[Callable[..., Any]]:
    multiarray = np.zeros(1).__reduce__()[0].__module__
    assert multiarray in _NUMPY_MODULES, multiarray
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    return [
        *(_under(module, "scalar", scalar) for module in _NUMPY_MODULES),
        *(_under(module, "_reconstruct", reconstruct) for module in _NUMPY_MODULES),
        _under("_codecs", "encode", codecs.encode),
        *_NUMPY_TYPES,
        *(type(np.dtype(kind)) for kind in _NUMPY_KINDS.split()),
        OrderedDict,
    ]


def _under(module: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the name by which files call it; torch before 2.6 reads the name off."""

    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__module__, renamed.__name__, renamed.__qualname__ = module, name, name
    return renamed


@contextmanager
def _harmless_globals() -> Iterator[None]:
    """`torch.serialization.safe_globals`, which torch 2.4 lacks."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(_harmless())
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _read_safetensors(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # Half-precision files only save space; the model's own precision is float32.
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


def _detectron_form(content: Any) -> Any:
    """Detectron2's own pickles say what they are; the others are Detectron's (Caffe2)."""
    if not isinstance(content, Mapping) or ("model" in content and "__author__" in content):
        return content
    blobs = content.get("blobs", content)  # backbones alone have none
    weights = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _pycls_form(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(content.get("model_state"), Mapping):
        raise CheckpointError(
            f"checkpoint {path} holds no model_state, as files of pycls (.pyth) do: rename it if "
            "it is another program's."
        )
    return {"model": content["model_state"], "__author__": "pycls", "matching_heuristics": True}


_NUMBERED_SOURCE = re.compile(r"(module\.)?queries\.(\d+)\.(.+)")


def with_present_names(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Tensors of a file of an earlier version by the names that the model gives them.

    Modules of auxiliary heads were renamed (`co_detr.moved.RENAMED_MODULES`). Version 0.1 numbers
    query sources; the numbers are places in the order of the config. A stripped file has one source
    only, the one of inference, as number 0.

    Args:
        state: by name; names of averaged weights may begin with ``module.``.
    """
    state = _with_present_modules(state, model)
    found = {key: match for key in state if (match := _NUMBERED_SOURCE.fullmatch(key))}
    names = getattr(model, "query_names", [])
    if found and names:
        places = {int(match[2]) for match in found.values()}
        if names.index(model.queries.inference) not in places:
            names = [model.queries.inference]
    present = {
        key: f"{match[1] or ''}queries.{names[int(match[2])]}.{match[3]}"
        for key, match in found.items()
        if int(match[2]) < len(names)
    }
    return {present.get(key, key): value for key, value in state.items()}


def _with_present_modules(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    own = {name for name, _ in model.named_modules()}  # a head of the user's may keep the old name
    renamed = {}
    for key, value in state.items():
        prefix = _MODULE if key.startswith(_MODULE) else ""
        *parts, leaf = key.removeprefix(prefix).split(".")
        if parts[:1] == ["auxiliary"] and ".".join(parts) not in own:
            key = ".".join([*(RENAMED_MODULES.get(part, part) for part in parts), leaf])
            key = prefix + key
        renamed[key] = value
    return renamed
