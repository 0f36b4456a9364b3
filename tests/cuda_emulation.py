"""A GPU made of the CPU: tensors that say they are on ``cuda:0`` and are computed on the host.

What a machine without a GPU can find out with it:

* tensors of two devices that meet in one operation, as on a GPU an error;
* how often, and where, the host would wait for the device;
* which types CUDA's autocast gives, which are not those of the CPU's.

It is a dispatch mode, so it sees what C++ does as well: torchvision's operators and our own. Unlike
with PyTorch's fake tensors, values are computed, so that heads whose work depends on them run, too.
Kernels are the CPU's: nothing is said about those of CUDA, memory or time. There is no backward
pass on ``cuda:0``: the autograd engine asks the driver for a device. A device of another name has
one (`register_emulated_device`): that is the device of ``TEST_DEVICE=emulated``; see `device`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from benchmarks.step.waits import innermost_line

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
# How many values come out depends on the values that go in, so the host has to ask.
ASKS_FOR_SIZE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}


def _cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    found = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *found, torch.empty(0, dtype=torch.uint8)


def _softmax(x, dim, half_to_float):
    return aten._softmax(x.float() if half_to_float else x, dim, False)


# What only CUDA has; PyTorch chooses by the device before a dispatch mode sees the call.
REPLACED = {
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten._softmax.default: _softmax,
}


def _with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments or results of an operator with their tensors changed.

    As PyTorch's `tree_map_only`, which took most of the time of the tests that use this.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_with_tensors(inner, change) for inner in value])
    if isinstance(value, dict):
        return {key: _with_tensors(inner, change) for key, inner in value.items()}
    return value


class EmulatedTensor(Tensor):
    """A tensor of the emulated device around one of the host."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device = DEVICE) -> EmulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=device,
            requires_grad=False,
        )
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:
        return f"emulated {self.host!r}"

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, values: EmulatedTensor) -> None:
        Tensor.data.__set__(self, values)
        self.host = values.host

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.host.__reduce_ex__(protocol)  # a file has no such device

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on an emulated tensor outside of the emulation.")


class EmulatedDevice(TorchDispatchMode):
    """Runs what is on the emulated device on the host; ``waits`` counts by kind and place.

    See `innermost_line` for what a place is.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = torch.device(device.type, 0)
        self.waits: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> EmulatedDevice:
        # torch.tensor(values, device=..) is to make a tensor of the host and move it, visibly.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        _with_tensors((args, kwargs), tensors.append)
        emulated = any(isinstance(tensor, EmulatedTensor) for tensor in tensors)
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if not emulated and target != self.device.type:
            return func(*args, **kwargs)
        self._note_waits(func, args, kwargs, emulated, target)
        self._check_devices(func, args, tensors)
        if target is not None:
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        inner_args, inner_kwargs = _with_tensors(
            (args, kwargs), lambda tensor: tensor.host if _is_emulated(tensor) else tensor
        )
        result = REPLACED.get(func, func)(*inner_args, **inner_kwargs)
        if target == "cpu" or (func is aten.copy_.default and not _is_emulated(args[0])):
            return args[0] if func is aten.copy_.default else result.clone()
        wrapped = _with_tensors(result, lambda tensor: EmulatedTensor(tensor, self.device))
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _check_devices(self, func, args, tensors: list[Tensor]) -> None:
        if func in (aten._to_copy.default, aten.copy_.default):
            return
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            tensors = [args[0]]  # indices may lie on the host, which makes it wait
        devices = {_is_emulated(tensor) for tensor in tensors if tensor.dim()}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: tensors of the host and of the device meet.")

    def _note_waits(self, func, args, kwargs, emulated: bool, target: str | None) -> None:
        kind = None
        if func is aten._local_scalar_dense.default:
            kind = "item"
        elif func in ASKS_FOR_SIZE:
            kind = str(func)
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            kind = "repeat_interleave"
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            kind = _index_wait(args[1]) if _is_emulated(args[0]) else None
        elif func is aten._to_copy.default:
            crosses = target is not None and (target != "cpu") != emulated
            kind = "copy" if crosses and not kwargs.get("non_blocking") else None
        elif func is aten.copy_.default:
            crosses = _is_emulated(args[0]) != _is_emulated(args[1])
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            kind = "copy" if crosses and waits else None
        if kind is not None:
            self.waits[kind, innermost_line()] += 1

    def own_waits(self) -> dict[tuple[str, str], int]:
        """Those of `co_detr`."""
        return {key: count for key, count in self.waits.items() if key[1].startswith("co_detr/")}


class EmulatedCuda(EmulatedDevice):
    """The one that says it is a GPU: autocast and all that asks for the type of a device."""

    def __init__(self) -> None:
        super().__init__(DEVICE)
        torch._C._ensureCUDADeviceGuardSet()  # what autograd asks for the device, without one
        # A call that names the device would look for a driver first.
        self._driver = mock.patch.object(torch.cuda, "_lazy_init", lambda: None)

    def __enter__(self) -> EmulatedCuda:
        self._driver.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._driver.stop()


_KEPT: list[torch.library.Library] = []


def register_emulated_device(name: str) -> None:
    """Makes ``name`` a type of device, for `EmulatedDevice`; there is one in a process.

    Needs a PyTorch that knows devices made in Python (2.10 or newer).
    """

    class DeviceModule(backend_registration._DummyBackendModule):
        """What PyTorch asks a type of device for. Autocast may be on, but changes nothing."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(
        rename=name, backend_module=DeviceModule()
    )
    # Of autocast's rules there are none.
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    library.fallback(torch.library.fallthrough_kernel)
    _KEPT.append(library)  # it takes its kernels along
    # The autograd engine has as many queues as the kind of device with most of them; this one's
    # guard says that there are none.
    torch._C._ensureCUDADeviceGuardSet()


def _index_wait(indices: Iterable[Tensor | None]) -> str | None:
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            return "boolean index"
        if index is not None and not _is_emulated(index):
            return "index of the host"
    return None


def _is_emulated(tensor: Tensor) -> bool:
    return isinstance(tensor, EmulatedTensor)


def to_emulated(tensor: Tensor) -> Tensor:
    """A tensor of the host on the emulated device; they share their memory."""
    return EmulatedTensor(tensor.detach())


def emulate(model: nn.Module) -> nn.Module:
    """Moves a model to the emulated device, in place; needs an active `EmulatedCuda`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(to_emulated(parameter), parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_emulated(buffer)
    return model


@contextmanager
def emulated_autocast(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)``, which switches itself off where no GPU is."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
