"""Inputs, shapes and tolerances of advance, for tests and benchmarks."""

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
    """Rows that go on, end by a token or a limit, have ended, have no candidate, or a reward that is no number."""
    B, K, Z = shape["B"], shape["K"], shape["Z"]
    random = torch.Generator().manual_seed(seed)
    row = torch.arange(B)
    rewards = torch.randn(B, K, generator=random)
    choice = torch.randint(0, K, (B,), generator=random)
    # Not that of the chosen candidate, so that all results can be compared.
    rewards[row % 7 == 3, (choice[row % 7 == 3] + 1) % K] = float("nan")
    rewards[row % 7 == 5, K - 1] = float("inf")
    candidates = torch.randint(0, 40, (B, K), generator=random)
    return {
        "logprobs": torch.randn(B, K, generator=random).log_softmax(-1).to(device, dtype),
        "rewards": rewards.to(device, dtype),
        "candidates": candidates.to(device),
        "choice": torch.where(row % 5 == 4, -1, choice).to(device),
        "drawn": torch.randn(B, generator=random).to(device),
        "tokens": torch.where(row % 6 == 1, -1, row).to(device),
        "position": (3 * row).to(device),
        "limit": (3 * row + torch.where(row % 4 == 2, 1, 9)).to(device),
        "widths": (1 + row % K).to(device) if shape.get("ragged") else None,
        "eos": torch.arange(0, 2 * Z, 2).to(device),
    }


# Numbers are moved, not computed.
EXACT = Tolerance(0.0, 0.0)

SPEC = OpSpec(
    name="finish_step",
    reference=reference,
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "K": 1, "Z": 0},
        {"B": 9, "K": 5, "Z": 2},
        {"B": 33, "K": 40, "Z": 3, "ragged": True},
        {"B": 8, "K": 300, "Z": 20},
        {"B": 7, "K": 5003, "Z": 1, "ragged": True},
    ),
    tolerances={
        torch.float64: EXACT,
        torch.float32: EXACT,
        torch.bfloat16: EXACT,
        torch.float16: EXACT,
    },
    kernels=KERNELS,
)
