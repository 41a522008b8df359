"""Inputs, shapes, tolerances and compiled kernels of score_and_sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature
from tests.ops.specs.resample import make_inputs as resample_inputs


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """States of very different sizes, which the norm must even out; the draw's arguments as in `resample`."""
    B, K, E = shape["B"], shape["K"], shape["E"]
    random = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-2, 3, (B, K, 1), generator=random)
    rest = resample_inputs(
        {"B": B, "K": K}, torch.float64 if dtype == torch.float64 else torch.float32, device, seed
    )
    rest.pop("rewards")
    return {
        "hidden": (size * torch.randn(B, K, E, generator=random)).to(device, dtype),
        "norm": (1 + 0.1 * torch.randn(E, generator=random)).to(device, dtype),
        "head": (torch.randn(E, generator=random) / E**0.5).to(device, dtype),
        "bias": torch.randn(1, generator=random).to(device, dtype) if shape.get("bias") else None,
        **rest,
        "eps": 1e-5,
        "offset": shape.get("offset", 0.0),
    }


def _signature(kernel: Any, dtype: torch.dtype, K: int, E: int, biased: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {"p_hidden": pointer, "p_norm": pointer, "p_head": pointer}
    arguments |= {"p_bias": pointer if biased else "None", "p_logprobs": "*fp32:16", "p_beta": "*fp32:16"}
    arguments |= {"p_temperature": "*fp32:16", "p_seed": "*i64:16", "p_position": "*i64:16"}
    arguments |= {"p_rewards": "*fp32:16", "p_choice": "*i64:16", "p_logprob": "*fp32:16"}
    arguments |= {"K": "i32", "E": "i32:16", "eps": "fp32", "offset": "fp32"}
    arguments |= {"hidden_b": "i64:16", "hidden_k": "i64:16", "stride_logprobs": "i64"}
    return signature(arguments, kernel.configuration(K, E))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    signatures = (
        *(_signature(kernel, torch.bfloat16, K, E) for K in (4, 10) for E in (128, 4096)),
        _signature(kernel, torch.bfloat16, 256, 4096, biased=True),
        *(_signature(kernel, torch.bfloat16, 1000, E) for E in (128, 4096)),
        _signature(kernel, torch.bfloat16, 256, 128),
        *(_signature(kernel, dtype, 10, 4096) for dtype in (torch.float16, torch.float32)),
    )
    return (KernelSpec("score_and_sample_kernel", signatures),)


SPEC = OpSpec(
    name="score_and_sample",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "K": 1, "E": 1},
        {"B": 3, "K": 5, "E": 40, "bias": True, "offset": 1.0},
        {"B": 1, "K": 10, "E": 2048},
        {"B": 8, "K": 10, "E": 576},
        {"B": 5, "K": 40, "E": 1100, "bias": True},
        {"B": 2, "K": 70, "E": 33},
    ),
    # 16-bit inputs are rounded before the comparison, and everything after is float32.
    tolerances={
        torch.float64: Tolerance(1e-12, 1e-11),
        torch.float32: Tolerance(2e-6, 4e-6),
        torch.bfloat16: Tolerance(2e-6, 4e-6),
        torch.float16: Tolerance(2e-6, 4e-6),
    },
    compiled=compiled,
)
