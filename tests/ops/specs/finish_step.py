"""Inputs, shapes, tolerances and compiled kernels of finish_step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import EXACT, TYPES, KernelSpec, OpSpec, signature


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Rows that go on, end by a token or a limit, have ended, have no candidate, or a reward that is no number."""
    B, K, Z = shape["B"], shape["K"], shape["Z"]
    random = torch.Generator().manual_seed(seed)
    row = torch.arange(B)
    rewards = torch.randn(B, K, generator=random)
    choice = torch.randint(0, K, (B,), generator=random)
    # Not that of the chosen candidate, so that all results can be compared.
    rewards[row % 7 == 3, (choice[row % 7 == 3] + 1) % K] = float("nan")
    rewards[row % 7 == 5, K - 1] = float("inf")
    candidates = torch.randint(0, 40, (B, K), generator=random)
    return {
        "logprobs": torch.randn(B, K, generator=random).log_softmax(-1).to(device, dtype),
        "rewards": rewards.to(device, dtype),
        "candidates": candidates.to(device),
        "choice": torch.where(row % 5 == 4, -1, choice).to(device),
        "chosen_logprob": torch.randn(B, generator=random).to(device),
        "tokens": torch.where(row % 6 == 1, -1, row).to(device),
        "position": (3 * row).to(device),
        "limit": (3 * row + torch.where(row % 4 == 2, 1, 9)).to(device),
        "widths": (1 + row % K).to(device) if shape.get("ragged") else None,
        "eos": torch.arange(0, 2 * Z, 2).to(device),
    }


def _signature(kernel: Any, dtype: torch.dtype, K: int, ragged: bool = False) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {
        "p_logprobs": pointer,
        "p_rewards": pointer,
        "p_candidates": "*i64:16",
        "p_choice": "*i64:16",
    }
    arguments |= {
        "p_chosen_logprob": "*fp32:16",
        "p_tokens": "*i64:16",
        "p_position": "*i64:16",
        "p_limit": "*i64:16",
    }
    arguments |= {"p_widths": "*i64:16" if ragged else "None", "p_eos": "*i64:16"}
    arguments |= {"p_decision": "*fp64:16", "p_accepted": "*i64:16", "B": "i32", "K": "i32", "Z": "i32"}
    arguments |= dict.fromkeys(("stride_logprobs", "stride_rewards", "stride_candidates"), "i64")
    return signature(arguments, kernel.configuration(K))


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    signatures = (
        _signature(kernel, torch.float32, 10),
        _signature(kernel, torch.float32, 40, ragged=True),
        _signature(kernel, torch.float32, 128256),
        *(_signature(kernel, dtype, 10) for dtype in (torch.bfloat16, torch.float16)),
    )
    return (KernelSpec("finish_step_kernel", signatures),)


SPEC = OpSpec(
    name="finish_step",
    make_inputs=make_inputs,
    shapes=(
        {"B": 1, "K": 1, "Z": 0},
        {"B": 9, "K": 5, "Z": 2},
        {"B": 33, "K": 40, "Z": 3, "ragged": True},
        {"B": 8, "K": 300, "Z": 20},
        {"B": 7, "K": 5003, "Z": 1, "ragged": True},
    ),
    tolerances=EXACT,
    compiled=compiled,
)
