"""Inputs, shapes, tolerances and compiled kernels of add_rms_norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """States of very different sizes; with `every`, x is a part of a wider tensor."""
    B, S, E = shape["B"], shape["S"], shape["E"]
    random = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-2, 3, (B, S, 1), generator=random)
    x = size * torch.randn(B, S, shape.get("every", 1) * E, generator=random)
    residual = size * torch.randn(B, S, E, generator=random)
    return {
        "x": x.to(device, dtype)[..., :E],
        "residual": residual.to(device, dtype) if shape.get("residual", True) else None,
        "weight": (1 + 0.1 * torch.randn(E, generator=random)).to(device, dtype),
        "eps": 1e-5,
        "offset": shape.get("offset", 0.0),
    }


def _signature(kernel: Any, dtype: torch.dtype, E: int, added: bool, offset: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    given = pointer if added else "None"
    arguments = {
        "p_x": pointer,
        "p_residual": given,
        "p_weight": pointer,
        "p_normed": pointer,
        "p_total": given,
    }
    arguments |= {"S": "i32", "E": "i32:16"}
    arguments |= dict.fromkeys(("x_b", "x_s", "residual_b", "residual_s"), "i64:16")
    arguments |= {"eps": "fp32", "offset": "fp32", "OFFSET": str(int(offset))}
    return signature(arguments, kernel.configuration(E))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    signatures = (
        *(_signature(kernel, torch.bfloat16, E, added=True) for E in (576, 2048, 4096, 8192)),
        _signature(kernel, torch.bfloat16, 4096, added=False),
        _signature(kernel, torch.bfloat16, 2048, added=True, offset=True),
        *(_signature(kernel, dtype, 4096, added=True) for dtype in (torch.float16, torch.float32)),
        _signature(kernel, torch.float32, 16384, added=True),
    )
    return (KernelSpec("add_rms_norm_kernel", signatures),)


SPEC = OpSpec(
    name="add_rms_norm",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "S": 1, "E": 1},
        {"B": 3, "S": 5, "E": 40, "offset": 1.0},
        {"B": 1, "S": 10, "E": 576, "residual": False},
        {"B": 2, "S": 3, "E": 1100, "every": 3},
        {"B": 4, "S": 1, "E": 2048, "residual": False, "offset": 1.0},
        {"B": 2, "S": 2, "E": 8192},
    ),
    # The sum, the quotient and the product are each rounded to the dtype.
    tolerances={
        torch.float64: Tolerance(1e-13, 1e-12),
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(6e-3, 1.2e-2),
        torch.float16: Tolerance(8e-4, 1.6e-3),
    },
    compiled=compiled,
)
