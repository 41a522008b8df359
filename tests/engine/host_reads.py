"""Finds what would make the host wait for a device, on a machine that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Ops whose result, or its shape, is known to the host alone; with `lift_fresh`, numbers from the host become a tensor.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
    "bincount",
}
# Methods that read a tensor's memory on the host without an op.
READING = {"tolist", "numpy", "__array__", "cpu", "item"}


class HostReadError(AssertionError):
    """Something in the guarded block would have waited for the device."""


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in WAITING:
            raise HostReadError(f"{func} waits for the device")
        if name in ("index", "index_put", "index_put_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise HostReadError(f"{func} by a mask waits for the device")
        if name == "repeat_interleave" and isinstance(args[-1], torch.Tensor):
            raise HostReadError(f"{func} by a tensor waits for the device")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            raise HostReadError(f"Tensor.{func.__name__} reads on the host")
        return func(*args, **(kwargs or {}))


class Guard:
    """Refuses host reads within `watched`, but for what `allowed` wraps."""

    def __init__(self) -> None:
        self.on = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        self.on = True
        try:
            with _Methods(), _Ops():
                yield
        finally:
            self.on = False

    def allowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which may read: the copies that a GPU makes without the host."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **kwargs)

        return call
