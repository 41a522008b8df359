"""Inputs, shapes, tolerances and compiled kernels of partial_bt_loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rgtg_fast.ops.partial_bt_loss import MODES, WEIGHTS
from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """N pairs of answers of 1 to T tokens (both equally long for "eos"), margins of both signs."""
    N, T, mode = shape["N"], shape["T"], shape.get("mode", "repeat_last")
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


def _pair_signature(
    kernel: Any, dtype: torch.dtype, mode: str, weight: str, normalizer: bool
) -> dict[str, str]:
    arguments = {
        "p_rewards": f"*{TYPES[dtype]}:16",
        "p_offsets": "*i64:16",
        "p_normalizer": "*fp32:16" if normalizer else "None",
        "p_sums": "*fp32:16",
        "p_gradient": "*fp32:16",
        "M": "i32",
        "N": "i32",
    }
    return signature(arguments, kernel.pair_configuration(mode, weight))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    pairs = [(torch.float32, mode, weight, False) for mode in MODES for weight in WEIGHTS]
    pairs += [
        (dtype, "repeat_last", "prefix", True) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    sums = {"p_sums": "*fp32:16", "p_loss": "*fp32:16", "N": "i32"}
    return (
        KernelSpec("pair_kernel", tuple(_pair_signature(kernel, *pair) for pair in pairs)),
        KernelSpec("sum_kernel", (signature(sums, kernel.sum_configuration()),)),
    )


SPEC = OpSpec(
    name="partial_bt_loss",
    make_inputs=make_inputs,
    shapes=(
        {"N": 1, "T": 1, "mode": "eos"},
        {"N": 3, "T": 9, "mode": "repeat_last"},
        {"N": 5, "T": 70, "mode": "truncate", "weight": "pair"},
        {"N": 8, "T": 300, "mode": "repeat_last", "weight": "pair", "normalizer": True},
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
    compiled=compiled,
)
