"""Op add_rms_norm: adds a block's output to the residual stream and normalizes the sum."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["add_rms_norm", "reference"]

# The widest state that the Triton kernel takes: one program holds a row in registers.
MAX_E = 16384


def reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(0) if residual is None else x + residual
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = (x if residual is None else total).to(dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * (weight.to(dtype) + offset)).to(x.dtype), total
    return wide.to(x.dtype) * weight, total


def outputs(x: torch.Tensor, residual: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized states and the sum, not yet filled; the sum is empty where there is no residual."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return normed, x.new_empty(0) if residual is None else torch.empty_like(normed)


def triton_limit(E: int = 1) -> str:
    """Why the Triton kernel cannot serve this size; empty where it can."""
    return f"its Triton kernel takes E <= {MAX_E}, not {E}" if E > MAX_E else ""


register(
    reference,
    outputs,
    name="add_rms_norm",
    triton_dtypes=frozenset(DTYPE_CODES),
    triton_limit=triton_limit,
    sizes=lambda x, *_: {"E": x.shape[-1]},
)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual connection and RMS norm in one pass.

        total  = x + residual                                                rounded to the dtype
        normed = total / √(mean_e total_e² + eps) · (weight + offset)

    The mean and the quotient are in float32. Without an offset the quotient is rounded to the dtype before the product,
    as Llama's and Qwen's norms do; with one the product is in float32, as Gemma's.

    Args:
        x: `[B, S, E]`, output of an attention or MLP block, any floating dtype.
        residual: `[B, S, E]`, the residual stream before that block, same dtype; None where x is the stream itself.
        weight: `[E]`, weight of the norm, same dtype.
        eps: added to the mean square.
        offset: added to the weight (Gemma: 1).

    Returns:
        normed: `[B, S, E]` of x's dtype, contiguous.
        total: `[B, S, E]` of x's dtype, contiguous; empty where residual is None.

    Raises:
        RGTGError: shapes or dtypes do not fit.

    Source:
        RMS norm: Zhang and Sennrich (arXiv 1910.07467), eq. 4.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import add_rms_norm
        >>> x = torch.tensor([[[1.0, 3.0]]])
        >>> add_rms_norm(x, torch.tensor([[[2.0, 1.0]]]), torch.ones(2), eps=3.5)
        (tensor([[[0.7500, 1.0000]]]), tensor([[[3., 4.]]]))
    """
    op = "add_rms_norm"
    if x.ndim != 3 or x.shape[-1] == 0:
        raise RGTGError(f"{op}: x has shape {list(x.shape)}: use [B, S, E] with E >= 1")
    _checks.floating(op, "x", x)
    _checks.shaped(op, "weight", weight, "[E]", (x.shape[-1],))
    _checks.of_dtype(op, "weight", weight, x.dtype)
    if residual is not None:
        _checks.shaped(op, "residual", residual, "[B, S, E]", tuple(x.shape))
        _checks.of_dtype(op, "residual", residual, x.dtype)
    _checks.together(op, x, residual=residual, weight=weight)
    return torch.ops.rgtg_fast.add_rms_norm(x, residual, weight, eps, offset)
