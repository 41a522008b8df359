"""Calls csrc/tree_attention.cpp."""

from __future__ import annotations

import torch

from .._extension import array, dense, kernels, optional_array


def cpp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    ancestors: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    B, H, S, D = q.shape
    q, k, v, k_cache, v_cache = dense(q), dense(k), dense(v), dense(k_cache), dense(v_cache)
    lengths = lengths.contiguous()
    ancestors = None if ancestors is None else ancestors.contiguous()
    out = torch.empty((B, S, H, D), dtype=q.dtype).transpose(1, 2)
    kernels().tree_attention(
        torch.get_num_threads(),
        *(array(x) for x in (q, k, v, k_cache, v_cache, out, lengths)),
        optional_array(ancestors),
        scale,
        causal,
    )
    return out
