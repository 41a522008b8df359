"""The product of bf16 matrices as the instruction TDPBF16PS (AMX) computes it, number by number.

Intel's manual gives the order: for 32 columns of both operands, the products of the even and of the odd columns are
added up apart, from zero on, by fused multiply-adds; the two sums are added, then their sum to the result. Every step
rounds to nearest even, takes subnormal inputs as zero and flushes subnormal results to zero.
"""

from __future__ import annotations

import torch
from torch.nn import functional

COLUMNS = 32
SMALLEST_NORMAL = 2.0**-126


def flushed(x: torch.Tensor) -> torch.Tensor:
    """x [...] float32 with zeros for subnormal numbers."""
    return torch.where(x.abs() < SMALLEST_NORMAL, torch.zeros_like(x).copysign(x), x)


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in one rounding, for float32 a and b that hold bf16 numbers and any float32 c.

    Their product has 16 bits: the float64 sum is exact unless c is far from it, where it cannot lie near the middle of
    two float32 numbers.
    """
    return flushed((a.double() * b.double() + c.double()).float())


def product_of_tiles(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """y [M, N] float32 of x [M, K] and w [N, K], both bfloat16."""
    missing = -x.shape[1] % COLUMNS
    x, w = (functional.pad(flushed(part.float()), (0, missing)) for part in (x, w))
    y = torch.zeros(len(x), len(w))
    for start in range(0, x.shape[1], COLUMNS):
        sums = [torch.zeros_like(y), torch.zeros_like(y)]
        for k in range(start, start + COLUMNS):
            sums[k % 2] = fused_multiply_add(x[:, None, k], w[None, :, k], sums[k % 2])
        y = flushed(y + flushed(sums[0] + sums[1]))
    return y
