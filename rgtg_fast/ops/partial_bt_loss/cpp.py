"""Calls csrc/partial_bt_loss.cpp."""

from __future__ import annotations

import torch

from .._extension import array, kernels
from .launch import MODES


def cpp(
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    mode: str,
    weight: str,
    normalizer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards, offsets = rewards.to(dtype).contiguous(), offsets.contiguous()
    loss, gradient = torch.empty((), dtype=dtype), torch.empty(rewards.shape[0], dtype=dtype)
    kernels().partial_bt_loss(
        torch.get_num_threads(),
        array(rewards),
        array(offsets),
        MODES.index(mode),
        weight == "pair",
        None if normalizer is None else float(normalizer),
        array(loss),
        array(gradient),
    )
    return loss, gradient
