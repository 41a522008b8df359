"""Inputs, shapes, tolerances and compiled kernels of resample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Temperatures from 0 up, one row with beta = 0, seeds and positions of more than 32 bits."""
    B, K = shape["B"], shape["K"]
    random = torch.Generator().manual_seed(seed)
    logprobs = (2 * torch.randn(B, K, generator=random)).log_softmax(-1)
    row = torch.arange(B)
    return {
        "logprobs": logprobs.to(device, dtype),
        "rewards": torch.randn(B, K, generator=random).to(device, dtype),
        "beta": (0.5 * ((row + 1) % 5).float()).to(device),
        "temperature": (0.4 * ((row + 1) % 4).float()).to(device),
        "seed": (row * 0x1234567890 - 7).to(device),
        "position": (row * 0x987654321 + seed).to(device),
    }


def _signature(kernel: Any, dtype: torch.dtype, K: int) -> dict[str, str]:
    arguments = {"p_logprobs": f"*{TYPES[dtype]}:16", "p_rewards": f"*{TYPES[dtype]}:16"}
    arguments |= {
        "p_beta": "*fp32:16",
        "p_temperature": "*fp32:16",
        "p_seed": "*i64:16",
        "p_position": "*i64:16",
    }
    arguments |= {"p_choice": "*i64:16", "p_logprob": "*fp32:16"}
    arguments |= {"K": "i32", "stride_logprobs": "i64", "stride_rewards": "i64"}
    return signature(arguments, kernel.configuration(K))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    signatures = tuple(_signature(kernel, dtype, K) for K in kernel.BLOCKS for dtype in dtypes)
    return (KernelSpec("resample_kernel", signatures),)


SPEC = OpSpec(
    name="resample",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "K": 1},
        {"B": 1, "K": 10},
        {"B": 8, "K": 5},
        {"B": 64, "K": 40},
        {"B": 5, "K": 1003},
        {"B": 4, "K": 49152},
    ),
    # 16-bit inputs are rounded before the comparison, and everything after is float32.
    tolerances={
        torch.float64: Tolerance(1e-12, 1e-11),
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(1e-6, 2e-6),
        torch.float16: Tolerance(1e-6, 2e-6),
    },
    compiled=compiled,
)
