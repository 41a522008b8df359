"""Inputs, shapes and tolerances of tree_attention, for tests and benchmarks."""

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
    """Ragged prefixes from T down to about T/2 (`lengths` overrides); slots past a row's length hold NaN.

    Numbers are drawn on the device, which has its own for a seed.
    """
    B, H, G, S, T, D = (shape[name] for name in "BHGSTD")
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=device)

    lengths = torch.tensor(shape.get("lengths", [T - b * T // (2 * B) for b in range(B)]), dtype=torch.int64)
    lengths = lengths.to(device)
    empty = (torch.arange(T, device=device) >= lengths[:, None])[:, None, :, None]
    k_cache = normal(B, G, T, D).masked_fill(empty, float("nan"))
    v_cache = normal(B, G, T, D).masked_fill(empty, float("nan"))
    mask = shape.get("mask")
    ancestors = None
    if mask == "chain":
        ancestors = torch.tensor([(2 << s) - 1 if s < 63 else -1 for s in range(S)]).expand(B, S)
    elif mask == "tree":
        # Token s descends from token (s − 1) // 2, a binary tree; and one token of the first row sees
        # nothing new.
        masks = [1]
        for s in range(1, S):
            masks.append(masks[(s - 1) // 2] | 1 << s)
        ancestors = torch.tensor([m - (1 << 64) if m >> 63 else m for m in masks]).repeat(B, 1)
        ancestors[0, -1] = 0
    return {
        "q": normal(B, H, S, D).to(dtype),
        "k": normal(B, G, S, D).to(dtype),
        "v": normal(B, G, S, D).to(dtype),
        "k_cache": k_cache.to(dtype),
        "v_cache": v_cache.to(dtype),
        "lengths": lengths,
        "ancestors": None if ancestors is None else ancestors.to(device),
        "scale": D**-0.5,
        "causal": mask == "causal",
    }


def _shape(B: int, H: int, G: int, S: int, T: int, D: int, **more: Any) -> dict[str, Any]:
    return {"B": B, "H": H, "G": G, "S": S, "T": T, "D": D, **more}


SPEC = OpSpec(
    name="tree_attention",
    reference=reference,
    make_inputs=make_inputs,
    shapes=(
        _shape(1, 1, 1, 1, 0, 1),
        _shape(1, 9, 3, 1, 512, 64),
        _shape(1, 9, 3, 10, 512, 64),
        _shape(2, 9, 3, 40, 700, 64),
        _shape(3, 4, 4, 5, 130, 16, lengths=[0, 130, 1]),
        _shape(2, 6, 2, 7, 33, 40, mask="tree"),
        _shape(2, 8, 1, 64, 257, 32, mask="chain"),
        _shape(1, 4, 2, 64, 20, 24, mask="tree"),
        _shape(2, 2, 2, 3, 19, 5),
        _shape(2, 4, 2, 11, 300, 128),
        _shape(1, 2, 1, 256, 70, 80),
        _shape(1, 2, 1, 2, 2500, 16),
        _shape(1, 4, 2, 3, 600, 256, mask="chain"),
        _shape(1, 9, 3, 300, 0, 64, mask="causal"),
        _shape(3, 4, 2, 37, 90, 48, mask="causal", lengths=[0, 90, 41]),
        _shape(2, 3, 3, 70, 5, 20, mask="causal"),
    ),
    # 16-bit inputs are rounded before the comparison; the output is rounded once more.
    tolerances={
        torch.float64: Tolerance(1e-12, 1e-11),
        torch.float32: Tolerance(2e-6, 4e-6),
        torch.bfloat16: Tolerance(4e-3, 8e-3),
        torch.float16: Tolerance(5e-4, 1e-3),
    },
    kernels=KERNELS,
)
