"""Inputs, shapes, tolerances and compiled kernels of act_and_mul."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Both halves of one product, some numbers large enough for either end of the activation."""
    B, S, F = shape["B"], shape["S"], shape["F"]
    random = torch.Generator().manual_seed(seed)
    both = (3 * torch.randn(B, S, 2 * F, generator=random)).to(device, dtype)
    both[..., :: max(1, F // 3)] *= 20
    gate, up = both.split(F, -1)
    return {"gate": gate, "up": up, "activation": shape.get("activation", "silu")}


def _signature(kernel: Any, dtype: torch.dtype, F: int, gelu: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {"p_gate": pointer, "p_up": pointer, "p_out": pointer, "S": "i32", "F": "i32:16"}
    arguments |= dict.fromkeys(("gate_b", "gate_s", "up_b", "up_s"), "i64:16") | {"GELU": str(int(gelu))}
    return signature(arguments, kernel.configuration(F))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    signatures = tuple(
        _signature(kernel, dtype, 14336, gelu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for gelu in (False, True)
    )
    return (KernelSpec("act_and_mul_kernel", signatures),)


SPEC = OpSpec(
    name="act_and_mul",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "S": 1, "F": 1},
        {"B": 3, "S": 5, "F": 40, "activation": "gelu_tanh"},
        {"B": 1, "S": 10, "F": 1536},
        {"B": 2, "S": 3, "F": 1100, "activation": "gelu_tanh"},
        {"B": 1, "S": 2, "F": 8192},
    ),
    # The activation and the product are each rounded to the dtype.
    tolerances={
        torch.float64: Tolerance(1e-13, 1e-12),
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(6e-3, 1.2e-2),
        torch.float16: Tolerance(8e-4, 1.6e-3),
    },
    compiled=compiled,
)
