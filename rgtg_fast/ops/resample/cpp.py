"""Calls csrc/resample.cpp."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._extension import DTYPE_CODES, dense, kernels


def cpp(
    check: Callable[..., None],
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, K = logprobs.shape
    logprobs, rewards = dense(logprobs), dense(rewards)
    beta, temperature = beta.contiguous(), temperature.contiguous()
    seed, position = seed.contiguous(), position.contiguous()
    choice = torch.empty((B,), dtype=torch.int64)
    chosen = torch.empty((B,), dtype=torch.float32)
    legal = kernels().resample(
        torch.get_num_threads(),
        DTYPE_CODES[logprobs.dtype],
        (B, K),
        (logprobs.data_ptr(), logprobs.stride(0)),
        (rewards.data_ptr(), rewards.stride(0)),
        (beta.data_ptr(), temperature.data_ptr(), seed.data_ptr(), position.data_ptr()),
        (choice.data_ptr(), chosen.data_ptr()),
    )
    if not legal:
        check(logprobs, rewards, beta, temperature, seed, position)
    return choice, chosen
