"""The specification of advance in plain PyTorch."""

from __future__ import annotations

import torch

# What `fault` says where it is no token.
OK, NO_CANDIDATE = -1, -2


def reference(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    candidates: torch.Tensor,
    choice: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    limit: torch.Tensor,
    widths: torch.Tensor | None,
    eos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    at = choice.clamp_min(0).unsqueeze(-1)
    token = candidates.gather(-1, at)  # [B, 1]
    bad = ~(rewards < torch.inf)  # NaN, or an infinity that would drown every other candidate
    if widths is not None:
        bad &= torch.arange(bad.shape[1], device=bad.device) < widths.unsqueeze(-1)
    found, first = bad.to(torch.uint8).max(-1, keepdim=True)
    none = torch.where(choice < 0, NO_CANDIDATE, OK).unsqueeze(-1)
    fault = torch.where(found > 0, candidates.gather(-1, first), none)
    parts = (token, logprobs.gather(-1, at), rewards.gather(-1, at), drawn.unsqueeze(-1), fault)
    packed = torch.stack([part.squeeze(-1).to(torch.float64) for part in parts])
    ended = tokens < 0
    kept = choice.masked_fill(ended, -1)
    ends = (token == eos).any(-1) | (position + 1 >= limit)
    position.add_(1)
    tokens.copy_(token.squeeze(-1).masked_fill(ends | ended, -1))
    return packed, kept
