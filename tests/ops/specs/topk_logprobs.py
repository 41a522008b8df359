"""Inputs, shapes, tolerances and compiled kernels of topk_logprobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rgtg_fast.ops.topk_logprobs import MAX_K, MAX_SEGMENTS, SEGMENTS, largest_k
from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Logits with the spread of a language model's; `guided` adds guidance and one row with beta = 0.

    Generated on the device, so the numbers of a seed depend on the device.
    """
    B, V = shape["B"], shape["V"]
    random = torch.Generator(device).manual_seed(seed)
    logits = (4 * torch.randn(B, V, generator=random, device=device)).to(dtype)
    guidance = beta = None
    if shape.get("guided", False):
        guidance = torch.randn(B, V, generator=random, device=device)
        beta = torch.linspace(0, 2, B).to(device)
    return {"logits": logits, "k": shape["k"], "guidance": guidance, "beta": beta}


def _arguments(dtype: torch.dtype, guided: bool, **others: str) -> dict[str, str]:
    arguments = {"p_logits": f"*{TYPES[dtype]}:16"}
    arguments |= dict.fromkeys(("p_guidance", "p_beta"), "*fp32:16" if guided else "None")
    arguments |= {"p_segment_keys": "*i32:16", "p_group_keys": "*i32:16", "p_statistics": "*fp32:16"}
    arguments |= {**others, "bits": "i32", "stride_logits": "i64:16"}
    return {**arguments, "stride_guidance": "i64:16" if guided else "i32:16"}


def _segment(kernel: Any, dtype: torch.dtype, V: int, guided: bool = False) -> dict[str, str]:
    return signature(_arguments(dtype, guided, V="i32:16"), kernel.segment_configuration(V))


def _merge(kernel: Any, dtype: torch.dtype, V: int, k: int, guided: bool = False) -> dict[str, str]:
    pointers = {
        "p_picks": "*i32:16",
        "p_logprobs": "*fp32:16",
        "p_tokens": "*i64:16",
        "p_entropy": "*fp32:16",
    }
    sizes = {"V": "i32:16", "segments": "i32", "k": "i32"}
    return signature(_arguments(dtype, guided, **pointers, **sizes), kernel.merge_configuration(V, k))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    # The sizes at which a merge configuration begins: every length and number of segments, with every block of k.
    lengths = (1, 131073, 262145, 524289, 1048577)
    sizes = sorted({(V, min(k, largest_k(V))) for V in lengths for k in kernel.SELECTED})
    return (
        KernelSpec(
            "topk_segment_kernel",
            (
                _segment(kernel, torch.float16, 1024),
                _segment(kernel, torch.float32, 1024),
                *(_segment(kernel, torch.bfloat16, n * MAX_SEGMENTS) for n in SEGMENTS),
                *(_segment(kernel, torch.float32, n * MAX_SEGMENTS, guided=True) for n in SEGMENTS),
            ),
        ),
        KernelSpec(
            "topk_merge_kernel",
            (
                _merge(kernel, torch.float16, 1, 16, guided=True),
                _merge(kernel, torch.float32, 262145, MAX_K, guided=True),
                *(_merge(kernel, torch.bfloat16, V, k) for V, k in sizes),
            ),
        ),
    )


SPEC = OpSpec(
    name="topk_logprobs",
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
    compiled=compiled,
)
