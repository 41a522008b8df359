"""The specification of commit in plain PyTorch."""

from __future__ import annotations

import torch


def reference(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    T = k_cache.shape[3]
    if T == 0:
        return
    moves = choice >= 0  # [B]
    rows = torch.arange(len(choice), device=choice.device)
    slot, chosen = lengths.clamp(max=T - 1), choice.clamp(min=0)
    for new, cache in ((k_new, k_cache), (v_new, v_cache)):
        # A row that stands still writes back what it has, so that nothing waits for the device.
        kept = cache[:, rows, :, slot]  # [B, L, G, D]
        cache[:, rows, :, slot] = torch.where(moves[:, None, None, None], new[:, rows, :, chosen], kept)
    lengths += moves
