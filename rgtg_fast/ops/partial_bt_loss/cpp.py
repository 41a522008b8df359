"""Calls csrc/partial_bt_loss.cpp."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._extension import kernels
from .launch import MODES


def cpp(
    check: Callable[..., None],
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    mode: str,
    weight: str,
    normalizer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards, offsets = rewards.to(dtype).contiguous(), offsets.contiguous()
    loss, gradient = torch.empty((), dtype=dtype), torch.empty(rewards.shape[0], dtype=dtype)
    legal = kernels().partial_bt_loss(
        torch.get_num_threads(),
        dtype == torch.float64,
        (rewards.data_ptr(), rewards.shape[0]),
        (offsets.data_ptr(), offsets.shape[0]),
        MODES.index(mode),
        weight == "pair",
        None if normalizer is None else float(normalizer),
        (loss.data_ptr(), gradient.data_ptr()),
    )
    if not legal:
        check(rewards, offsets, mode, weight, normalizer)
    return loss, gradient
