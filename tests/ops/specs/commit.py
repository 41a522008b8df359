"""Inputs, shapes, tolerances and compiled kernels of commit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import EXACT, TYPES, KernelSpec, OpSpec, signature, slots_of, spread


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Ragged rows, the second of which stands still; positions past a row's length hold NaN.

    With `slots`, the rows' prefixes are in so many slots, of which the others hold NaN and a full cache.
    Generated on the device, so the numbers of a seed depend on the device.
    """
    L, B, G, S, T, D = (shape[name] for name in "LBGSTD")
    random = torch.Generator(device).manual_seed(seed)
    row = torch.arange(B, device=device)
    lengths = (row * 7) % T
    empty = (torch.arange(T, device=device) >= lengths[:, None])[None, :, None, :, None]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=device)

    arguments = {
        "k_new": normal(L, B, G, S, D).to(dtype),
        "v_new": normal(L, B, G, S, D).to(dtype),
        "k_cache": normal(L, B, G, T, D).masked_fill(empty, float("nan")).to(dtype),
        "v_cache": normal(L, B, G, T, D).masked_fill(empty, float("nan")).to(dtype),
        "lengths": lengths,
        "choice": torch.where(row == 1, -1, (row * 3) % S),
        "slots": slots_of(shape, device),
    }
    slots = arguments["slots"]
    if slots is not None:
        for name in ("k_cache", "v_cache"):
            arguments[name] = spread(arguments[name], slots, shape["slots"], float("nan"), dim=1)
        arguments["lengths"] = spread(lengths, slots, shape["slots"], T)
    return arguments


def _signature(kernel: Any, dtype: torch.dtype, D: int, slots: bool = False) -> dict[str, str]:
    pointer, stride = f"*{TYPES[dtype]}:16", "i64:16"
    arguments = {f"p_{name}": pointer for name in ("k_new", "v_new", "k_cache", "v_cache")}
    arguments |= {
        "p_lengths": "*i64:16",
        "p_choice": "*i64:16",
        "p_slots": "*i64:16" if slots else "None",
        "stride_lengths": "i32",
        "stride_choice": "i32",
    }
    arguments |= {
        "N": "i32" if slots else "None",
        "LG": "i32",
        "G": "i32",
        "S": "i32",
        "T": "i32",
        "D": "i32:16",
    }
    for name in ("k_new", "v_new", "k_cache", "v_cache"):
        arguments |= {f"{name}_{letter}": stride for letter in ("l", "b", "g", "s")}
    return signature(arguments, kernel.configuration(D))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    cases = [(torch.bfloat16, D, False) for D in (64, 128, 256)]
    cases += [(dtype, 128, False) for dtype in (torch.float16, torch.float32, torch.float64)]
    cases += [(torch.bfloat16, 128, True)]
    return (KernelSpec("commit_kernel", tuple(_signature(kernel, *case) for case in cases)),)


SPEC = OpSpec(
    name="commit",
    make_inputs=make_inputs,
    shapes=(
        {"L": 1, "B": 1, "G": 1, "S": 1, "T": 1, "D": 1},
        {"L": 2, "B": 3, "G": 2, "S": 4, "T": 9, "D": 5},
        {"L": 30, "B": 1, "G": 3, "S": 10, "T": 512, "D": 64},
        {"L": 30, "B": 8, "G": 3, "S": 40, "T": 64, "D": 64},
        {"L": 2, "B": 3, "G": 2, "S": 4, "T": 9, "D": 5, "slots": 5},
        {"L": 3, "B": 2, "G": 1, "S": 2, "T": 8, "D": 64, "slots": 2},
    ),
    tolerances=EXACT,
    compiled=compiled,
)
