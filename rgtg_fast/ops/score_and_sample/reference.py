"""The specification of score_and_sample in plain PyTorch."""

from __future__ import annotations

import torch

from ..resample import reference as resample


def reference(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = hidden.to(dtype)  # [B, K, E]
    scale = torch.rsqrt(x.square().mean(-1) + eps)  # [B, K]
    weight = (norm.to(dtype) + offset) * head.to(dtype)
    rewards = scale * (x * weight).sum(-1)
    if bias is not None:
        rewards = rewards + bias.to(dtype)
    choice, chosen = resample(logprobs.to(dtype), rewards, beta, temperature, seed, position)
    return rewards, choice, chosen
