"""Calls csrc/resample.cpp."""

from __future__ import annotations

import torch

from .._extension import array, dense, kernels


def cpp(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B = logprobs.shape[0]
    logprobs, rewards = dense(logprobs), dense(rewards)
    beta, temperature = beta.contiguous(), temperature.contiguous()
    seed, position = seed.contiguous(), position.contiguous()
    choice = torch.empty((B,), dtype=torch.int64)
    chosen = torch.empty((B,), dtype=torch.float32)
    kernels().resample(
        torch.get_num_threads(),
        *(array(x) for x in (logprobs, rewards, beta, temperature, seed, position, choice, chosen)),
    )
    return choice, chosen
