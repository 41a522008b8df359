"""The specification of topk_logprobs in plain PyTorch."""

from __future__ import annotations

import torch


def reference(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = logits if logits.dtype == torch.float64 else logits.float()  # [B, V]
    logprobs = x.log_softmax(-1)
    # Ordering by logit is ordering by log-probability without the rounding of the subtraction: candidates
    # that differ never tie, on any backend.
    score = x
    if guidance is not None and beta is not None:
        weight = beta.to(x.dtype)[:, None]
        score = torch.where(weight == 0, x, x + weight * guidance.to(x.dtype))
    # Stable: ties go to the lowest token id. NaN counts as the largest, so it is seen and not lost.
    tokens = score.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    p = logprobs.exp()
    entropy = -torch.where(p == 0, 0, p * logprobs).sum(-1)
    return logprobs.gather(-1, tokens), tokens, entropy
