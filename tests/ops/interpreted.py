"""Runs tests in a process of their own, where Triton's interpreter serves tensors on the CPU.

Triton decides when it is imported whether to interpret its kernels, for the whole process: by TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch

from rgtg_fast.ops import _triton
from tests.conftest import poisoned


def missing_reason() -> str:
    """Why the kernels cannot be interpreted here; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: the Triton kernels are NOT tested (pip install triton)"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        return (
            "Triton 3.6's interpreter fails with numpy 2.4: the kernels are NOT interpreted; use numpy < 2.4"
        )
    return ""


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Makes a test of a module, whose arguments can be pickled, run in the process that interprets."""

    @functools.wraps(test)
    def forwarded(**arguments: Any) -> None:
        if _triton.interpreted():
            test(**arguments)
        else:
            _process().submit(_call, test.__module__, test.__name__, arguments).result()

    return forwarded


def _call(module: str, test: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), test)(**arguments)


@functools.cache
def _process() -> ProcessPoolExecutor:
    """The process, which lives as long as this one."""
    pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
        pool.submit(_begin).result()
    return pool


def _begin() -> None:
    # The interpreter computes with numpy, which warns of the NaN and overflows that are tested, and of its own habits.
    warnings.simplefilter("ignore")
    _round_bfloat16()
    torch.empty = poisoned  # pyright: ignore[reportAttributeAccessIssue]


def _round_bfloat16() -> None:
    """The interpreter keeps bfloat16 as 16 bits, multiplies those as integers and rounds to zero: mend both."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(x, source, target, rounding)

    interpreter.InterpreterBuilder.create_dot, interpreter._convert_float = create_dot, convert_float
