"""Calls csrc/commit.cpp."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._extension import dense, kernels


def cpp(
    check: Callable[..., None],
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    L, B, G, S, D = k_new.shape
    k_new, v_new, choice = dense(k_new), dense(v_new), choice.contiguous()
    legal = kernels().commit(
        torch.get_num_threads(),
        k_new.element_size(),
        (L, B, G, S, k_cache.shape[3], D),
        tuple((x.data_ptr(), *x.stride()[:4]) for x in (k_new, v_new, k_cache, v_cache)),
        (lengths.data_ptr(), lengths.stride(0)),
        choice.data_ptr(),
    )
    if not legal:
        check(k_new, v_new, k_cache, v_cache, lengths, choice)
