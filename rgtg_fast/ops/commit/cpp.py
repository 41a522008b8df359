"""Calls csrc/commit.cpp."""

from __future__ import annotations

import torch

from .._extension import array, dense, kernels


def cpp(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    k_new, v_new, choice = dense(k_new), dense(v_new), choice.contiguous()
    kernels().commit(
        torch.get_num_threads(),
        *(array(x) for x in (k_new, v_new, k_cache, v_cache, lengths, choice)),
    )
