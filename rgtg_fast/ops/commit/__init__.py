"""Op commit: appends the chosen token's keys and values to the prefix, in every layer at once."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._registry import register

__all__ = ["commit", "reference"]

# Values are copied bitwise.
DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


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
        # A row that does not move writes back what it has: no branch, so no synchronization with the device.
        current = cache[:, rows, :, slot]  # [B, L, G, D]
        cache[:, rows, :, slot] = torch.where(moves[:, None, None, None], new[:, rows, :, chosen], current)
    lengths += moves


def outputs(*_: Any) -> None:
    """Nothing is returned: the op writes in place."""


def check(k_new: torch.Tensor, k_cache: torch.Tensor, lengths: torch.Tensor, choice: torch.Tensor) -> None:
    """Refuses choices that are not a new token, and rows whose cache is full."""
    S, T = k_new.shape[3], k_cache.shape[3]
    for row, (length, chosen) in enumerate(zip(lengths.tolist(), choice.tolist(), strict=True)):
        if not -1 <= chosen < S:
            raise RGTGError(f"commit: choice[{row}]={chosen} is not a new token (S={S}): use -1 to {S - 1}")
        if chosen >= 0 and not 0 <= length < T:
            raise RGTGError(
                f"commit: lengths[{row}]={length} leaves no free slot in the cache (T={T}): "
                "stop the row or use a longer cache"
            )


register(
    reference,
    outputs,
    name="commit",
    check=check,
    writes=("k_cache", "v_cache", "lengths"),
    cpp_dtypes=DTYPES,
    triton_dtypes=DTYPES,
)


def commit(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    """Appends the chosen new token to every row's prefix, in all layers at once.

        k_cache[:, b, :, lengths[b]] = k_new[:, b, :, choice[b]],  the same for v,  lengths[b] += 1

    A row with choice −1 does not change: its cache and its length keep every bit. Of keys, values and caches only the
    last dimension need be contiguous.

    Args:
        k_new: `[L, B, G, S, D]`, keys of the new tokens, any floating dtype.
        v_new: `[L, B, G, S, D]`, values of the new tokens, same dtype.
        k_cache: `[L, B, G, T, D]`, keys of the prefix, same dtype; written in place.
        v_cache: `[L, B, G, T, D]`, values of the prefix, same dtype; written in place.
        lengths: `[B]` int64, tokens of each row's prefix; written in place.
        choice: `[B]` int64, index of the new token to append, or −1.

    Raises:
        RGTGError: shapes or dtypes do not fit; on the CPU also: a choice is not below S, or a row's cache is
            full, and then nothing is written.

    Source:
        Replaces the k-fold, re-ordered cache of ARGS (arXiv 2402.01694).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import commit
        >>> k_new = v_new = torch.tensor([5.0, 6.0]).view(1, 1, 1, 2, 1)
        >>> k_cache, v_cache, lengths = *torch.zeros(2, 1, 1, 1, 3, 1), torch.tensor([1])
        >>> commit(k_new, v_new, k_cache, v_cache, lengths, choice=torch.tensor([1]))
        >>> k_cache.flatten(), lengths
        (tensor([0., 6., 0.]), tensor([2]))
    """
    op = "commit"
    if k_new.ndim != 5 or k_cache.ndim != 5:
        raise RGTGError(
            f"{op}: k_new has shape {list(k_new.shape)} and k_cache {list(k_cache.shape)}: use 5 dimensions"
        )
    _checks.floating(op, "k_new", k_new)
    L, B, G, S, D = k_new.shape
    T = k_cache.shape[3]
    _checks.shaped(op, "v_new", v_new, "[L, B, G, S, D]", (L, B, G, S, D))
    _checks.shaped(op, "k_cache", k_cache, "[L, B, G, T, D]", (L, B, G, T, D))
    _checks.shaped(op, "v_cache", v_cache, "[L, B, G, T, D]", (L, B, G, T, D))
    for name, x in (("v_new", v_new), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.of_dtype(op, name, x, k_new.dtype)
    for name, x in (("lengths", lengths), ("choice", choice)):
        _checks.shaped(op, name, x, "[B]", (B,))
        _checks.of_dtype(op, name, x, torch.int64)
    if D > 1 and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1):
        raise RGTGError(
            f"{op}: k_cache and v_cache are written in place: their last dimension must be contiguous"
        )
    _checks.together(op, k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache, lengths=lengths, choice=choice)
    _checks.written(op, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    torch.ops.rgtg_fast.commit(k_new, v_new, k_cache, v_cache, lengths, choice)
