"""The specification of tree_attention in plain PyTorch."""

from __future__ import annotations

import torch


def reference(
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
    G, T = k_cache.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).view(B, G, H // G, S, D)
    k, v = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]  # [B, G, 1, S, D]

    # Slots past a row's length may hold anything, NaN included: they are cleared, not only masked.
    filled = torch.arange(T, device=q.device) < lengths[:, None]  # [B, T]
    slots = filled[:, None, :, None]
    k_cache = torch.where(slots, k_cache.to(dtype), 0)[:, :, None]  # [B, G, 1, T, D]
    v_cache = torch.where(slots, v_cache.to(dtype), 0)[:, :, None]
    old = (grouped @ k_cache.mT * scale).masked_fill(~filled[:, None, None, None, :], float("-inf"))

    alone = ancestors is None and not causal
    if alone:
        # Each new token sees no new token but itself, so that a NaN in one candidate stays there.
        new = (grouped * k).sum(-1, keepdim=True) * scale  # [B, G, H/G, S, 1]
    else:
        index = torch.arange(S, device=q.device)
        if ancestors is None:
            seen = (index <= index[:, None]).expand(B, S, S)
        else:
            seen = (ancestors[..., None] >> index) & 1 == 1  # [B, S, S]
        new = (grouped @ k.mT * scale).masked_fill(~seen[:, None, None], float("-inf"))

    scores = torch.cat([old, new], -1)
    # A token that sees nothing at all (an empty prefix and an empty mask) attends to nothing: 0, not NaN.
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak.masked_fill(peak == float("-inf"), 0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    out = weights[..., :T] @ v_cache + (weights[..., T:] * v if alone else weights[..., T:] @ v)
    # In memory [B, S, H, D]: what the output projection reads next.
    return out.reshape(B, H, S, D).transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2)
