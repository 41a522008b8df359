"""Inputs, shapes and tolerances of partial_bt_loss, for tests and benchmarks."""

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
    """N pairs of answers of 1 to T tokens (both equally long for "eos"), margins of both signs."""
    N, T, mode = shape["N"], shape["T"], shape.get("mode", "hold")
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (N, 2), generator=random)
    lengths[0] = torch.tensor([T, 1])
    if mode == "eos":
        lengths[:, 1] = lengths[:, 0]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    rewards = 2 * torch.randn(int(offsets[-1]), generator=random)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "rewards": rewards.to(device, dtype),
        "offsets": offsets.to(device),
        "mode": mode,
        "weight": shape.get("weight", "prefix"),
        "normalizer": torch.tensor(12.5, device=device, dtype=wide) if shape.get("normalizer") else None,
    }


SPEC = OpSpec(
    name="partial_bt_loss",
    reference=reference,
    make_inputs=make_inputs,
    shapes=(
        {"N": 1, "T": 1, "mode": "eos"},
        {"N": 3, "T": 9, "mode": "hold"},
        {"N": 5, "T": 70, "mode": "truncate", "weight": "pair"},
        {"N": 8, "T": 300, "mode": "hold", "weight": "pair", "normalizer": True},
        {"N": 4, "T": 600, "mode": "eos", "normalizer": True},
        {"N": 700, "T": 20, "mode": "truncate"},
    ),
    # Sums in float32 (C++: in float64) of terms that are all positive; 16-bit rewards are exact in float32.
    tolerances={
        torch.float64: Tolerance(1e-13, 1e-13),
        torch.float32: Tolerance(2e-6, 2e-6),
        torch.bfloat16: Tolerance(2e-6, 2e-6),
        torch.float16: Tolerance(2e-6, 2e-6),
    },
    kernels=KERNELS,
)
