"""How the kernel of score_and_sample is launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, signature
from ..resample.launch import BLOCKS

# Candidates and numbers of their states that are added up at a time: two sums of 32 registers a thread.
BLOCK_C, BLOCK_E = 16, 512
# For few candidates, and for small models: no wider than what there is to add up.
FEW_C, FEW_E = 4, 128


def configuration(K: int, E: int) -> dict[str, object]:
    """Block shapes for K candidates with states of E numbers."""
    return {
        "BLOCK_C": FEW_C if K <= FEW_C else BLOCK_C,
        "BLOCK_E": FEW_E if E <= FEW_E else BLOCK_E,
        "BLOCK": next((n for n in BLOCKS if n >= K), max(BLOCKS)),
        "num_warps": 8,
        # The draw rounds products and sums one by one, as the specification says.
        "enable_fp_fusion": False,
    }


def _signature(dtype: torch.dtype, K: int, E: int, biased: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {"p_hidden": pointer, "p_norm": pointer, "p_head": pointer}
    arguments |= {"p_bias": pointer if biased else "None", "p_logprobs": "*fp32:16", "p_beta": "*fp32:16"}
    arguments |= {"p_temperature": "*fp32:16", "p_seed": "*i64:16", "p_position": "*i64:16"}
    arguments |= {"p_rewards": "*fp32:16", "p_choice": "*i64:16", "p_logprob": "*fp32:16"}
    arguments |= {"K": "i32", "E": "i32:16", "eps": "fp32", "offset": "fp32"}
    arguments |= {"hidden_b": "i64:16", "hidden_k": "i64:16", "stride_logprobs": "i64"}
    return signature(arguments, configuration(K, E))


KERNELS = (
    KernelSpec(
        "score_and_sample_kernel",
        (
            *(_signature(torch.bfloat16, K, E) for K in (4, 10) for E in (128, 4096)),
            _signature(torch.bfloat16, 256, 4096, biased=True),
            *(_signature(torch.bfloat16, 1000, E) for E in (128, 4096)),
            _signature(torch.bfloat16, 256, 128),
            _signature(torch.float16, 10, 4096),
            _signature(torch.float32, 10, 4096),
        ),
    ),
)
