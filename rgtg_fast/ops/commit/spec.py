"""Inputs, shapes and tolerances of commit, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._registry import OpSpec, Tolerance
from .launch import KERNELS
from .reference import reference


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Ragged rows, the second of which stands still; slots past a row's length hold NaN."""
    L, B, G, S, T, D = (shape[name] for name in "LBGSTD")
    random = torch.Generator().manual_seed(seed)
    row = torch.arange(B)
    lengths = (row * 7) % T
    empty = (torch.arange(T) >= lengths[:, None])[None, :, None, :, None]

    def cache() -> torch.Tensor:
        return torch.randn(L, B, G, T, D, generator=random).masked_fill(empty, float("nan")).to(device, dtype)

    return {
        "k_new": torch.randn(L, B, G, S, D, generator=random).to(device, dtype),
        "v_new": torch.randn(L, B, G, S, D, generator=random).to(device, dtype),
        "k_cache": cache(),
        "v_cache": cache(),
        "lengths": lengths.to(device),
        "choice": torch.where(row == 1, -1, (row * 3) % S).to(device),
    }


# Numbers are moved, not computed.
EXACT = Tolerance(0.0, 0.0)

SPEC = OpSpec(
    name="commit",
    reference=reference,
    make_inputs=make_inputs,
    shapes=(
        {"L": 1, "B": 1, "G": 1, "S": 1, "T": 1, "D": 1},
        {"L": 2, "B": 3, "G": 2, "S": 4, "T": 9, "D": 5},
        {"L": 30, "B": 1, "G": 3, "S": 10, "T": 512, "D": 64},
        {"L": 30, "B": 8, "G": 3, "S": 40, "T": 64, "D": 64},
    ),
    tolerances={
        torch.float64: EXACT,
        torch.float32: EXACT,
        torch.bfloat16: EXACT,
        torch.float16: EXACT,
    },
    kernels=KERNELS,
)
