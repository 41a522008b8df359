"""Keeps a caller's autocast context out of the models' own computations, whose dtypes are chosen at load time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KINDS = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within, no autocast context is open; a function is decorated by `@without_autocast()`.

    Under autocast the parts of a forward that torch computes would round to bfloat16 and the fused kernels would not.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast():
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    with ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
