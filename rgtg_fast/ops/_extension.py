"""Finds the C++ extension `rgtg_fast._C`, and says so once where it is missing."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

# The dtype codes that all kernels take; csrc/common.hpp holds the same table.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Those that only some do.
_CODES = {**DTYPE_CODES, torch.float64: 3, torch.int64: 4}

# What the extension knows of a tensor: address, dtype code, shape, strides in elements.
Array = tuple[int, int, tuple[int, ...], tuple[int, ...]]

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("rgtg_fast._C"), ""
    except ImportError as error:
        return None, str(error)


def _installed_elsewhere() -> Path | None:
    """A folder further down the module path whose copy of this package has its kernels, where this one has not."""
    for entry in sys.path:
        copy = Path(entry).resolve() / PACKAGE.name
        if copy != PACKAGE and any((copy / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return copy.parent
    return None


def remedy() -> str:
    """What brings the kernels, in one line."""
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
    warnings.warn(f"rgtg_fast: {missing_reason()}; the slower reference serves: {remedy()}", stacklevel=2)


def missing_reason() -> str:
    """Why there is no extension, in one clause; empty where there is one."""
    module, error = _import()
    return "" if module is not None else f"the C++ kernels are not installed ({error})"


def load(warn: bool = True) -> ModuleType | None:
    """The extension, or None with one warning per process where it is missing."""
    module, _ = _import()
    if module is None and warn:
        _warn()
    return module


def kernels() -> ModuleType:
    """The extension, where the caller has made sure that it is there."""
    module, error = _import()
    if module is None:
        raise ImportError(error)
    return module


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last dimension, all that the kernels ask for; copied only if need be."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def array(x: torch.Tensor) -> Array:
    """What the extension reads of a tensor and checks. The caller holds the tensor as long as it is in use."""
    return x.data_ptr(), _CODES.get(x.dtype, -1), x.shape, x.stride()


def optional_array(x: torch.Tensor | None) -> Array | None:
    """The same; None for None."""
    return None if x is None else array(x)
