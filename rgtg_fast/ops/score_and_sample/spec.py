"""Inputs, shapes and tolerances of score_and_sample, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._registry import OpSpec, Tolerance
from ..resample.spec import make_inputs as drawn
from .launch import KERNELS
from .reference import reference


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """States of very different sizes, which the norm must even out; the draw's arguments as in `resample`."""
    B, K, E = shape["B"], shape["K"], shape["E"]
    random = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-2, 3, (B, K, 1), generator=random)
    rest = drawn({"B": B, "K": K}, torch.float64 if dtype == torch.float64 else torch.float32, device, seed)
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


SPEC = OpSpec(
    name="score_and_sample",
    reference=reference,
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
    kernels=KERNELS,
)
