"""Inputs, shapes and tolerances of topk_logprobs, for tests and benchmarks."""

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
    """Logits with the spread of a language model's; `guided` adds guidance and one row with beta = 0.

    Numbers are drawn on the device, which has its own for a seed.
    """
    B, V = shape["B"], shape["V"]
    random = torch.Generator(device).manual_seed(seed)
    logits = (4 * torch.randn(B, V, generator=random, device=device)).to(dtype)
    guidance = beta = None
    if shape.get("guided", False):
        guidance = torch.randn(B, V, generator=random, device=device)
        beta = torch.linspace(0, 2, B).to(device)
    return {"logits": logits, "k": shape["k"], "guidance": guidance, "beta": beta}


SPEC = OpSpec(
    name="topk_logprobs",
    reference=reference,
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "V": 1, "k": 1},
        {"B": 3, "V": 32, "k": 32},
        {"B": 2, "V": 1001, "k": 5, "guided": True},
        {"B": 1, "V": 49152, "k": 10},
        {"B": 8, "V": 49152, "k": 40},
        {"B": 4, "V": 49152, "k": 10, "guided": True},
        {"B": 2, "V": 20000, "k": 20000},
        {"B": 1, "V": 128256, "k": 256},
    ),
    # The inputs are rounded before the comparison, and everything after is float32.
    tolerances={
        torch.float64: Tolerance(1e-12, 1e-11),
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(1e-6, 2e-6),
        torch.float16: Tolerance(1e-6, 2e-6),
    },
    kernels=KERNELS,
)
