"""Weights in 8 bits: linear layers that the native engine's own product serves, on the CPU beside bfloat16.

Half of the bytes of bfloat16 are read for each token. Activations stay bfloat16, and sums float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from rgtg_fast.errors import RGTGError

# The name of these weights, as an option and in descriptions.
INT8 = "int8"
_LARGEST = 127
# Rows of a weight that are widened to float32 at once.
_ROWS = 1024


class Int8Linear(nn.Linear):
    """A linear layer whose weight is stored in 8 bits, with a scale for each row.

        weight ≈ q · scale,    q in −127 … 127,    scale = max |weight| / 127

    The parameter `weight` holds q. The native engine reads it in place; `forward` is for the model's own modules, with
    which the engine is compared at load time.

    Args:
        linear: the layer whose weight is rounded; its bias is shared.

    Attributes:
        scale: [out] float32, whatever dtype the module is cast to.

    Raises:
        RGTGError: its dtype, device or values do not fit.
    """

    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        weight = linear.weight.detach()
        reason = unsupported(weight)
        if reason:
            raise RGTGError(f"weights='int8' does not serve this layer: {reason}")
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        q, scale = quantized(weight)
        self.weight = nn.Parameter(q, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Output [..., out] of input [..., in], in the input's dtype."""
        out = functional.linear(input, self.weight.to(input.dtype)) * self.scale
        return (out if self.bias is None else out + self.bias).to(input.dtype)

    def dequantized(self) -> torch.Tensor:
        """The weight [out, in] float32 that the layer stands for."""
        return self.weight.detach().float() * self.scale.unsqueeze(-1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def keeping_scale(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            return tensor.to(found.device) if tensor is self.scale else found

        return super()._apply(keeping_scale, recurse)


def unsupported(weight: torch.Tensor) -> str:
    """Why a weight [N, K] cannot be stored in 8 bits; empty where it can."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device}: use device='cpu'"
    if weight.dtype != torch.bfloat16:
        return f"it is {weight.dtype}: use dtype='bfloat16'"
    if not all(part.isfinite().all() for part in weight.split(_ROWS)):
        return "it holds NaN or an infinity: check the model's files"
    return ""


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] rounded to 8 bits.

    Args:
        weight: [N, K], finite, any floating dtype.

    Returns:
        q: [N, K] int8, −127 to 127.
        scale: [N] float32.
    """
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight))
    for part, whole, factor in zip(weight.split(_ROWS), q.split(_ROWS), scale.split(_ROWS), strict=True):
        wide = part.float()
        factor.copy_((wide.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
        whole.copy_((wide / factor.unsqueeze(-1)).round().clamp(-_LARGEST, _LARGEST))
    return q, scale
