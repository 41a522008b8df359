"""Finds the C++ extension `rgtg_fast._C`, warns once where it is missing, and calls its kernels."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Codes of the dtypes that all kernels take; csrc/common.hpp has the same table.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# With those that only some kernels take.
_CODES = {**DTYPE_CODES, torch.float64: 3, torch.int64: 4, torch.int8: 5}

# The extension's description of a tensor: address, dtype code, shape, strides in elements.
Array = tuple[int, int, tuple[int, ...], tuple[int, ...]]

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("rgtg_fast._C"), ""
    except ImportError as error:
        return None, str(error)


def _installed_elsewhere() -> Path | None:
    """A later folder of the module path with a copy of this package that has its kernels, where this one has not."""
    for entry in sys.path:
        copy = Path(entry).resolve() / PACKAGE.name
        if copy != PACKAGE and any((copy / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return copy.parent
    return None


def remedy() -> str:
    """How to install the kernels, in one line."""
    installed = _installed_elsewhere()
    if installed is not None:
        return (
            f"Python runs the source tree {PACKAGE.parent}, and the copy in {installed} has them: build them in the "
            "tree too (there: pip install -e .), or start Python in another folder"
        )
    return (
        "install a C++17 compiler (g++ or clang++), then rgtg-fast again (in its folder: "
        "pip install --force-reinstall --no-deps -e .)"
    )


@functools.cache
def _warn() -> None:
    warnings.warn(
        f"rgtg_fast: {missing_reason()}; falling back to the slower PyTorch reference: {remedy()}",
        stacklevel=2,
    )


def missing_reason() -> str:
    """Why the extension is missing, in one clause; empty where it is not."""
    module, error = _import()
    return "" if module is not None else f"the C++ kernels are not installed ({error})"


def load(warn: bool = True) -> ModuleType | None:
    """The extension, or None with one warning per process where it is missing."""
    module, _ = _import()
    if module is None and warn:
        _warn()
    return module


def kernels() -> ModuleType:
    """The extension, where the caller has made sure that it is installed."""
    module, error = _import()
    if module is None:
        raise ImportError(error)
    return module


def instruction_set() -> str | None:
    """The instruction set that the C++ kernels run with; None where they are missing."""
    module, _ = _import()
    return None if module is None else module.isa()


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last dimension, which the kernels require; copied only if necessary."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def array(x: torch.Tensor) -> Array:
    """The description of a tensor that the extension reads and checks. The caller keeps the tensor alive."""
    return x.data_ptr(), _CODES.get(x.dtype, -1), x.shape, x.stride()


def optional_array(x: torch.Tensor | None) -> Array | None:
    """The same; None for None."""
    return None if x is None else array(x)


def run(name: str, arguments: tuple[Any, ...], outputs: Any, written: frozenset[int]) -> None:
    """Calls an op's C++ kernel: `_C.<name>(threads, *arguments, *outputs)`, tensors as `Array`.

    Inputs get a contiguous last dimension, as from `dense`; this runs several times per token and calls little.

    Args:
        name: the op's name.
        arguments: its arguments in their order, tensors and others.
        outputs: the tensors that it fills: one, a tuple, or None.
        written: indices of the arguments that it writes in place: these are never copied.
    """
    described, copies = [], []
    for i, x in enumerate(arguments):
        if not isinstance(x, torch.Tensor):
            described.append(x)
            continue
        shape, strides = x.shape, x.stride()
        if strides and strides[-1] != 1 and shape[-1] > 1 and i not in written:
            x = x.contiguous()
            copies.append(x)  # alive until the kernel returns
            strides = x.stride()
        described.append((x.data_ptr(), _CODES.get(x.dtype, -1), shape, strides))
    if outputs is not None:
        described += map(array, outputs if isinstance(outputs, tuple) else (outputs,))
    _kernel(name)(torch.get_num_threads(), *described)


@functools.cache
def _kernel(name: str) -> Callable[..., None]:
    return getattr(kernels(), name)
