"""How the kernel of resample is launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, signature

# Candidates at a time: the usual k in one warp without a barrier, a vocabulary in 16 candidates a thread.
BLOCKS = {64: 1, 512: 4, 4096: 8}


def configuration(K: int) -> dict[str, object]:
    """Block shapes for K candidates."""
    block = next((n for n in BLOCKS if n >= K), max(BLOCKS))
    # Products and sums are rounded one by one, as the specification says.
    return {"BLOCK": block, "num_warps": BLOCKS[block], "enable_fp_fusion": False}


def _signature(dtype: torch.dtype, K: int) -> dict[str, str]:
    arguments = {"p_logprobs": f"*{TYPES[dtype]}:16", "p_rewards": f"*{TYPES[dtype]}:16"}
    arguments |= {
        "p_beta": "*fp32:16",
        "p_temperature": "*fp32:16",
        "p_seed": "*i64:16",
        "p_position": "*i64:16",
    }
    arguments |= {"p_choice": "*i64:16", "p_logprob": "*fp32:16"}
    arguments |= {"K": "i32", "stride_logprobs": "i64", "stride_rewards": "i64"}
    return signature(arguments, configuration(K))


KERNELS = (
    KernelSpec(
        "resample_kernel",
        tuple(
            _signature(dtype, K) for K in BLOCKS for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
    ),
)
