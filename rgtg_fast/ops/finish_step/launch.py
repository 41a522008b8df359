"""How the kernel of advance is launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, signature

# Candidates whose rewards are looked at together, with their warps.
BLOCKS = {64: 1, 4096: 8}


def configuration(K: int) -> dict[str, object]:
    """Block shape for K candidates."""
    block = next((n for n in BLOCKS if n >= K), max(BLOCKS))
    return {"BLOCK": block, "num_warps": BLOCKS[block]}


def _signature(dtype: torch.dtype, K: int, ragged: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {
        "p_logprobs": pointer,
        "p_rewards": pointer,
        "p_candidates": "*i64:16",
        "p_choice": "*i64:16",
    }
    arguments |= {"p_drawn": "*fp32:16", "p_tokens": "*i64:16", "p_position": "*i64:16", "p_limit": "*i64:16"}
    arguments |= {"p_widths": "*i64:16" if ragged else "None", "p_eos": "*i64:16"}
    arguments |= {"p_packed": "*fp64:16", "p_kept": "*i64:16", "B": "i32", "K": "i32", "Z": "i32"}
    arguments |= dict.fromkeys(("stride_logprobs", "stride_rewards", "stride_candidates"), "i64")
    return signature(arguments, configuration(K))


KERNELS = (
    KernelSpec(
        "finish_step_kernel",
        (
            _signature(torch.float32, 10),
            _signature(torch.float32, 40, ragged=True),
            _signature(torch.float32, 128256),
            _signature(torch.bfloat16, 10),
            _signature(torch.float16, 10),
        ),
    ),
)
