"""Calls csrc/topk_logprobs.cpp."""

from __future__ import annotations

import torch

from .._extension import DTYPE_CODES, dense, kernels, pointer


def cpp(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, V = logits.shape
    logits = dense(logits)
    guidance = None if guidance is None else dense(guidance)
    beta = None if beta is None else beta.contiguous()
    logprobs = torch.empty((B, k), dtype=torch.float32)
    tokens = torch.empty((B, k), dtype=torch.int64)
    entropy = torch.empty((B,), dtype=torch.float32)
    kernels().topk_logprobs(
        torch.get_num_threads(),
        DTYPE_CODES[logits.dtype],
        (B, V, k),
        (logits.data_ptr(), logits.stride(0)),
        (pointer(guidance), 0 if guidance is None else guidance.stride(0)),
        pointer(beta),
        (logprobs.data_ptr(), tokens.data_ptr(), entropy.data_ptr()),
    )
    return logprobs, tokens, entropy
