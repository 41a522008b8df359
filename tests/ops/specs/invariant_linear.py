"""Inputs, shapes, tolerances and compiled kernels of invariant_linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Rows of which each is a part of a wider tensor."""
    B, S, N, K = (shape[name] for name in "BSNK")
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, 2 * K, generator=random).to(device, dtype)
    weight = torch.randn(N, K, generator=random) / K**0.5
    bias = torch.randn(N, generator=random)
    return {
        "x": x[..., :K],
        "weight": weight.to(device, dtype),
        "bias": bias.to(device, dtype) if shape.get("bias") else None,
    }


def _signature(kernel: Any, dtype: torch.dtype, M: int, biased: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {
        "p_x": pointer,
        "p_weight": pointer,
        "p_bias": pointer if biased else "None",
        "p_out": pointer,
    }
    arguments |= {"p_parts": "*fp32:16", "p_tickets": "*i32:16", "M": "i32"} | dict.fromkeys("NK", "i32:16")
    arguments |= {"S": "i32", "x_b": "i64:16", "x_s": "i64:16", "weight_n": "i64:16", "span": "i32:16"}
    return signature(arguments, kernel.configuration(M, dtype))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    signatures = (
        *(_signature(kernel, torch.bfloat16, M) for M in (1, 20, 40)),
        _signature(kernel, torch.bfloat16, 10, biased=True),
        *(_signature(kernel, torch.float16, M) for M in (10, 64)),
        *(_signature(kernel, torch.float32, M) for M in (10, 64)),
    )
    return (KernelSpec("invariant_linear_kernel", signatures),)


SPEC = OpSpec(
    name="invariant_linear",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "S": 1, "N": 1, "K": 1},
        {"B": 3, "S": 5, "N": 70, "K": 300, "bias": True},
        {"B": 1, "S": 10, "N": 64, "K": 1536},
        {"B": 7, "S": 10, "N": 40, "K": 576},
        {"B": 2, "S": 1, "N": 130, "K": 2100, "bias": True},
    ),
    # One rounding of the result.
    tolerances={
        torch.float64: Tolerance(1e-13, 1e-12),
        torch.float32: Tolerance(2e-6, 4e-6),
        torch.bfloat16: Tolerance(3e-3, 6e-3),
        torch.float16: Tolerance(4e-4, 8e-4),
    },
    compiled=compiled,
)
