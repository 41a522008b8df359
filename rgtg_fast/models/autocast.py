"""Keeps a caller's autocast context out of the models' own computations, whose dtypes are chosen at load time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

_KINDS = ("cpu", "cuda")
_Function = TypeVar("_Function", bound="Callable[..., Any]")


def without_autocast(function: _Function) -> _Function:
    """Runs a function, or every step of a generator function, as if no autocast context were open.

    Under autocast the parts of a forward that torch computes would round to bfloat16 and the fused kernels would not.
    What a generator's caller runs between two steps keeps the context.

    Example:
        >>> @without_autocast
        ... def product():
        ...     return (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product()
        torch.float32
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disabled():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        steps = function(*args, **kwargs)
        try:
            while True:
                with _disabled():
                    step = next(steps, steps)
                if step is steps:
                    return
                yield step
        finally:
            steps.close()

    return generate if inspect.isgeneratorfunction(function) else call  # pyright: ignore[reportReturnType]


def _disabled() -> ExitStack:
    stack = ExitStack()
    for kind in _KINDS:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
