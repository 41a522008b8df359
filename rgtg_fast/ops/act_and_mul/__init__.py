"""Op act_and_mul: the activation of a gated MLP (SwiGLU, GeGLU)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ...errors import RGTGError, shown
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["ACTIVATIONS", "act_and_mul", "reference"]

ACTIVATIONS = ("silu", "gelu_tanh")


def reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return (functional.silu(gate) * up).contiguous()
    return (functional.gelu(gate, approximate="tanh") * up).contiguous()


def outputs(gate: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result, not yet filled."""
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


register(
    reference,
    outputs,
    name="act_and_mul",
    triton_dtypes=frozenset(DTYPE_CODES),
)


def act_and_mul(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The inner activation of a gated MLP, in one launch.

        silu:       out = gate · σ(gate) · up                                                 (SwiGLU)
        gelu_tanh:  out = ½ gate (1 + tanh(√(2/π) (gate + 0.044715 gate³))) · up              (GeGLU)

    The activation is computed in float32 and rounded to the dtype before the product.

    Args:
        gate: `[B, S, F]`, output of the gate projection, any floating dtype.
        up: `[B, S, F]`, output of the up projection, same dtype. Of both only the last dimension need be contiguous:
            they may be halves of one product.
        activation: `"silu"` or `"gelu_tanh"`.

    Returns:
        `[B, S, F]` of gate's dtype, contiguous.

    Raises:
        RGTGError: shapes or dtypes do not fit, or the activation is unknown.

    Source:
        Gated MLPs: Shazeer (arXiv 2002.05202), eq. 6.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import act_and_mul
        >>> act_and_mul(torch.tensor([[[0.0, 50.0]]]), torch.tensor([[[3.0, 2.0]]]))
        tensor([[[  0., 100.]]])
    """
    op = "act_and_mul"
    if gate.ndim != 3:
        raise RGTGError(f"{op}: gate has shape {list(gate.shape)}: use [B, S, F]")
    if activation not in ACTIVATIONS:
        raise RGTGError(
            f"{op}: activation={shown(activation)} is unknown: use one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    _checks.floating(op, "gate", gate)
    _checks.shaped(op, "up", up, "[B, S, F]", tuple(gate.shape))
    _checks.of_dtype(op, "up", up, gate.dtype)
    _checks.together(op, gate, up=up)
    return torch.ops.rgtg_fast.act_and_mul(gate, up, activation)
