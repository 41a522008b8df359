"""Op invariant_linear: a linear layer whose rows do not depend on how many there are."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["invariant_linear", "reference"]


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # Each row by itself: a library's product of several may add in another order.
    wide, shift = weight.double(), None if bias is None else bias.double()
    rows = [functional.linear(row.double(), wide, shift) for row in x.flatten(0, 1).split(1)]
    return (
        torch.cat([x.new_empty((0, len(weight)), dtype=torch.float64), *rows])
        .to(x.dtype)
        .view(*x.shape[:2], len(weight))
    )


def outputs(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result, not yet filled."""
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


register(
    reference,
    outputs,
    name="invariant_linear",
    triton_dtypes=frozenset(DTYPE_CODES),
)


def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer whose result for a row has the same bits beside any other rows.

        out = x weightᵀ + bias

    A library chooses its kernel, and with it the order of a sum, by the number of rows. Here the order follows from the
    weight's shape alone. Sums are in float32 (in the reference, float64); the result is rounded once. The kernel is
    made for few rows: 64 are one pass over the weight.

    Args:
        x: `[B, S, K]`, any floating dtype.
        weight: `[N, K]`, same dtype. Of both only the last dimension need be contiguous.
        bias: `[N]`, same dtype, or None.

    Returns:
        `[B, S, N]` of x's dtype, contiguous.

    Raises:
        RGTGError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import invariant_linear
        >>> invariant_linear(torch.ones(1, 1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 0.0]))
        tensor([[[3.5000, 7.0000]]])
    """
    op = "invariant_linear"
    if x.ndim != 3 or weight.ndim != 2:
        raise RGTGError(
            f"{op}: x has shape {list(x.shape)} and weight {list(weight.shape)}: use [B, S, K] and [N, K]"
        )
    _checks.floating(op, "x", x)
    N, K = weight.shape
    _checks.shaped(op, "x", x, "[B, S, K]", (*x.shape[:2], K))
    _checks.of_dtype(op, "weight", weight, x.dtype)
    if bias is not None:
        _checks.shaped(op, "bias", bias, "[N]", (N,))
        _checks.of_dtype(op, "bias", bias, x.dtype)
    _checks.together(op, x, weight=weight, bias=bias)
    return torch.ops.rgtg_fast.invariant_linear(x, weight, bias)
