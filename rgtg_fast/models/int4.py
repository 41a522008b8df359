"""Weights in 4 bits: linear layers that PyTorch's own int4 product serves, on CUDA in bfloat16 and on the CPU.

A quarter of the bytes of bfloat16 is read for each token. The products are PyTorch's `_weight_int4pack_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rgtg_fast.errors import RGTGError

# The name of these weights, as an option and in descriptions.
INT4 = "int4"
# Numbers of a row that share a scale and a zero point: the largest that divides the row.
GROUPS = (128, 64, 32)
# Rows of a weight come in tiles of 8 on CUDA and of 16 on the CPU.
_ROWS = 16
# Tiles of 16 numbers that are packed next to each other: the largest that fits.
_INNER_TILES = (8, 4, 2)
_LEVELS = 15


class Int4Linear(nn.Module):
    """A linear layer whose weight is stored in 4 bits, with a scale and a zero point for each group of a row.

        weight ≈ (q − 8) · scale + zero,    q in 0 … 15,    scale = (max − min) / 15,    zero = min + 8 · scale

    Scales and zero points have the layer's dtype. The weight is packed for the device that it is on: a layer cannot be
    moved.

    Args:
        linear: the layer whose weight is rounded.

    Raises:
        RGTGError: its shape, dtype or device does not fit.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        reason = unsupported(weight)
        if reason:
            raise RGTGError(f"weights='int4' does not serve this layer: {reason}")
        self.out_features, self.in_features = weight.shape
        self.group = next(size for size in GROUPS if self.in_features % size == 0)
        q, scales = quantized(weight, self.group)
        inner = next(tiles for tiles in _INNER_TILES if self.in_features % (16 * tiles) == 0)
        if weight.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), inner)
        else:
            # Two numbers a byte, the first in its high half.
            packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], inner)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output [..., out] of input [..., in]."""
        rows = x.reshape(-1, self.in_features)
        on_cpu = rows.device.type == "cpu"
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        out = product(rows.contiguous(), self.packed, self.group, self.scales).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        scales = fn(self.scales)
        if scales.dtype != self.scales.dtype or scales.device != self.scales.device:
            raise RGTGError(
                f"weights='int4' are packed for {self.scales.dtype} on {self.scales.device}: load the model again for "
                f"{scales.dtype} on {scales.device}"
            )
        return super()._apply(fn, recurse)


def unsupported(weight: torch.Tensor) -> str:
    """Why a weight [N, K] cannot be stored in 4 bits; empty where it can."""
    N, K = weight.shape
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device}: use cpu or cuda"
    if weight.device.type == "cuda" and weight.dtype != torch.bfloat16:
        return f"it is {weight.dtype} on CUDA: use bfloat16"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is {weight.dtype}: use float32, bfloat16 or float16"
    if N % _ROWS or K % GROUPS[-1]:
        return f"it is [{N}, {K}]: outputs must be a multiple of {_ROWS} and inputs of {GROUPS[-1]}"
    return ""


def quantized(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] rounded to 4 bits.

    Args:
        weight: [N, K], any floating dtype.
        group: numbers of a row that share a scale; divides K.

    Returns:
        q: [N, K] uint8, 0 to 15.
        scales: [K / group, N, 2] of the weight's dtype, scale and zero point.
    """
    groups = weight.float().unflatten(-1, (-1, group))  # [N, K / group, group]
    low, high = groups.amin(-1), groups.amax(-1)
    # Rounded to the dtype before they are used, so that the numbers are the nearest to what is stored.
    scale = ((high - low) / _LEVELS).clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    q = ((groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1) + 8).round().clamp(0, _LEVELS)
    return q.flatten(1).to(torch.uint8), torch.stack([scale.T, zero.T], -1).contiguous()


def dequantized(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] float32 that `quantized` stands for."""
    groups = q.float().unflatten(-1, (len(scales), -1))
    scale, zero = scales.float().permute(2, 1, 0).unsqueeze(-1)
    return ((groups - 8) * scale + zero).flatten(1)
