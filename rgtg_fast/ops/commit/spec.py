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
    """Ragged rows, the second of which stands still; slots past a row's length hold NaN.

    Numbers are drawn on the device, which has its own for a seed.
    """
    L, B, G, S, T, D = (shape[name] for name in "LBGSTD")
    random = torch.Generator(device).manual_seed(seed)
    row = torch.arange(B, device=device)
    lengths = (row * 7) % T
    empty = (torch.arange(T, device=device) >= lengths[:, None])[None, :, None, :, None]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=device)

    return {
        "k_new": normal(L, B, G, S, D).to(dtype),
        "v_new": normal(L, B, G, S, D).to(dtype),
        "k_cache": normal(L, B, G, T, D).masked_fill(empty, float("nan")).to(dtype),
        "v_cache": normal(L, B, G, T, D).masked_fill(empty, float("nan")).to(dtype),
        "lengths": lengths,
        "choice": torch.where(row == 1, -1, (row * 3) % S),
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
