"""Calls csrc/topk_logprobs.cpp."""

from __future__ import annotations

import torch

from .._extension import array, dense, kernels, optional_array


def cpp(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B = logits.shape[0]
    logits = dense(logits)
    guidance = None if guidance is None else dense(guidance)
    beta = None if beta is None else beta.contiguous()
    logprobs = torch.empty((B, k), dtype=torch.float32)
    tokens = torch.empty((B, k), dtype=torch.int64)
    entropy = torch.empty((B,), dtype=torch.float32)
    kernels().topk_logprobs(
        torch.get_num_threads(),
        array(logits),
        optional_array(guidance),
        optional_array(beta),
        *(array(x) for x in (logprobs, tokens, entropy)),
    )
    return logprobs, tokens, entropy
