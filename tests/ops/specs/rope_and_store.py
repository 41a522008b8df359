"""Inputs, shapes, tolerances and compiled kernels of rope_and_store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Queries, keys and values as parts of one product; the outputs are windows of a longer cache."""
    B, S, H, G, D = (shape[name] for name in "BSHGD")
    R = shape.get("R", D)
    random = torch.Generator().manual_seed(seed)
    product = torch.randn(B, S, (H + 2 * G) * D, generator=random).to(device, dtype)
    q, k, v = product.split([H * D, G * D, G * D], -1)
    angles = 100 * torch.rand(B, S, R // 2, generator=random).repeat(1, 1, 2)
    caches = torch.full((2, B, G, S + 3, D), 7.0, dtype=dtype, device=device)
    norms = shape.get("norms", False)
    weights = 1 + 0.1 * torch.randn(2, D, generator=random)
    return {
        "q": q.unflatten(-1, (H, D)),
        "k": k.unflatten(-1, (G, D)),
        "v": v.unflatten(-1, (G, D)),
        "cos": angles.cos().to(device, dtype),
        "sin": angles.sin().to(device, dtype),
        "k_new": caches[0, :, :, 2 : 2 + S],
        "v_new": caches[1, :, :, 2 : 2 + S],
        "q_norm": weights[0].to(device, dtype) if norms else None,
        "k_norm": weights[1].to(device, dtype) if norms else None,
        "eps": 1e-6,
        "offset": shape.get("offset", 0.0),
    }


def _signature(
    kernel: Any, dtype: torch.dtype, D: int, norms: bool = False, offset: bool = False
) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = dict.fromkeys(("p_q", "p_k", "p_v", "p_cos", "p_sin", "p_k_new", "p_v_new"), pointer)
    arguments |= dict.fromkeys(("p_q_norm", "p_k_norm"), pointer if norms else "None") | {"p_out": pointer}
    arguments |= dict.fromkeys("SHG", "i32") | dict.fromkeys("DR", "i32:16")
    strides = (
        "q_b",
        "q_s",
        "q_h",
        "k_b",
        "k_s",
        "k_g",
        "v_b",
        "v_s",
        "v_g",
        "cos_b",
        "cos_s",
        "sin_b",
        "sin_s",
    )
    new = [f"{name}_new_{size}" for name in "kv" for size in "bgs"]
    arguments |= dict.fromkeys((*strides, *new), "i64:16")
    arguments |= {"eps": "fp32", "offset": "fp32", "OFFSET": str(int(offset))}
    return signature(arguments, kernel.configuration(D))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    signatures = (
        *(_signature(kernel, torch.bfloat16, D) for D in (64, 128, 256)),
        _signature(kernel, torch.bfloat16, 128, norms=True),
        _signature(kernel, torch.bfloat16, 256, norms=True, offset=True),
        *(_signature(kernel, dtype, 128, norms=True) for dtype in (torch.float16, torch.float32)),
    )
    return (KernelSpec("rope_and_store_kernel", signatures),)


SPEC = OpSpec(
    name="rope_and_store",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "S": 1, "H": 1, "G": 1, "D": 2},
        {"B": 2, "S": 5, "H": 9, "G": 3, "D": 64},
        {"B": 3, "S": 4, "H": 4, "G": 2, "D": 12, "norms": True},
        {"B": 1, "S": 10, "H": 32, "G": 8, "D": 128},
        {"B": 2, "S": 3, "H": 6, "G": 1, "D": 20, "R": 8},
        {"B": 2, "S": 1, "H": 4, "G": 4, "D": 256, "norms": True, "offset": 1.0},
    ),
    # Both products and their sum are each rounded to the dtype, after a norm three more times.
    tolerances={
        torch.float64: Tolerance(1e-13, 1e-12),
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(8e-3, 1.6e-2),
        torch.float16: Tolerance(1e-3, 2e-3),
    },
    compiled=compiled,
)
