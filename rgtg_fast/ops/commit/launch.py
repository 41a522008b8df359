"""How the kernel of commit is launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, power_of_two, signature

# Numbers that one program moves, of the keys and again of the values: with 32 layers, 8 heads and D = 128, a single
# row is moved by 16 programs of 8 KiB, enough loads in flight that the launch is what takes the time.
TILE = 2048


def configuration(D: int) -> dict[str, object]:
    """Block shapes for a head of `D` numbers: one program moves ROWS heads."""
    width = power_of_two(D, 16)
    return {"BLOCK_D": width, "ROWS": max(1, TILE // width), "num_warps": 4, "enable_fp_fusion": False}


def _signature(dtype: torch.dtype, D: int) -> dict[str, str]:
    pointer, stride = f"*{TYPES[dtype]}:16", "i64:16"
    arguments = {f"p_{name}": pointer for name in ("k_new", "v_new", "k_cache", "v_cache")}
    arguments |= {
        "p_lengths": "*i64:16",
        "p_choice": "*i64:16",
        "stride_lengths": "i32",
        "stride_choice": "i32",
    }
    arguments |= {"LG": "i32", "G": "i32", "S": "i32", "T": "i32", "D": "i32:16"}
    for name in ("k_new", "v_new", "k_cache", "v_cache"):
        arguments |= {f"{name}_{letter}": stride for letter in ("l", "b", "g", "s")}
    return signature(arguments, configuration(D))


KERNELS = (
    KernelSpec(
        "commit_kernel",
        (
            *(_signature(torch.bfloat16, D) for D in (64, 128, 256)),
            _signature(torch.float16, 128),
            _signature(torch.float32, 128),
            _signature(torch.float64, 128),
        ),
    ),
)
