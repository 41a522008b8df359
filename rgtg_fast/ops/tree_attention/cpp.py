"""Calls csrc/tree_attention.cpp."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._extension import DTYPE_CODES, dense, kernels, pointer


def cpp(
    check: Callable[..., None],
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
    legal = kernels().tree_attention(
        torch.get_num_threads(),
        DTYPE_CODES[q.dtype],
        (B, H, k.shape[1], S, k_cache.shape[2], D),
        tuple((x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, k_cache, v_cache, out)),
        lengths.data_ptr(),
        pointer(ancestors),
        scale,
        causal,
    )
    if not legal:
        check(q, k, v, k_cache, v_cache, lengths, ancestors, scale, causal)
    return out
