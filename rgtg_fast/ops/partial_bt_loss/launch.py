"""How the kernels of partial_bt_loss are launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, signature

# In the order of the numbers that the kernels know them by.
MODES = ("eos", "hold", "truncate")
WEIGHTS = ("prefix", "pair")

# Prefixes at a time: an answer of a few hundred tokens in one or two rounds.
BLOCK = 256
# Pairs whose sums are added up at a time.
SUMS = 1024


def pair_configuration(mode: str, weight: str) -> dict[str, object]:
    """Constants of the kernel that takes one pair."""
    return {
        "MODE": MODES.index(mode),
        "PAIR": WEIGHTS.index(weight),
        "BLOCK": BLOCK,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def sum_configuration() -> dict[str, object]:
    """Constants of the kernel that adds up the pairs."""
    return {"BLOCK": SUMS, "num_warps": 4, "enable_fp_fusion": False}


def _pair_signature(dtype: torch.dtype, mode: str, weight: str, normalizer: bool) -> dict[str, str]:
    arguments = {
        "p_rewards": f"*{TYPES[dtype]}:16",
        "p_offsets": "*i64:16",
        "p_normalizer": "*fp32:16" if normalizer else "None",
        "p_sums": "*fp32:16",
        "p_gradient": "*fp32:16",
        "M": "i32",
        "N": "i32",
    }
    return signature(arguments, pair_configuration(mode, weight))


KERNELS = (
    KernelSpec(
        "pair_kernel",
        (
            *(_pair_signature(torch.float32, mode, weight, False) for mode in MODES for weight in WEIGHTS),
            _pair_signature(torch.float32, "hold", "prefix", True),
            _pair_signature(torch.bfloat16, "hold", "prefix", True),
            _pair_signature(torch.float16, "hold", "prefix", True),
        ),
    ),
    KernelSpec(
        "sum_kernel",
        (signature({"p_sums": "*fp32:16", "p_loss": "*fp32:16", "N": "i32"}, sum_configuration()),),
    ),
)
