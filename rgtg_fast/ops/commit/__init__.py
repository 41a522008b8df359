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
    slots: torch.Tensor | None,
) -> None:
    T = k_cache.shape[3]
    if T == 0:
        return
    moves = choice >= 0  # [B]
    rows = torch.arange(len(choice), device=choice.device)
    kept = rows if slots is None else slots
    position = (lengths if slots is None else lengths[slots]).clamp(max=T - 1)
    chosen = choice.clamp(min=0)
    for new, cache in ((k_new, k_cache), (v_new, v_cache)):
        # A row that does not move writes back what it has: no branch, so no synchronization with the device.
        current = cache[:, kept, :, position]  # [B, L, G, D]
        cache[:, kept, :, position] = torch.where(
            moves[:, None, None, None], new[:, rows, :, chosen], current
        )
    if slots is None:
        lengths += moves
    else:
        lengths.index_add_(0, slots, moves.to(lengths.dtype))


def outputs(*_: Any) -> None:
    """Nothing is returned: the op writes in place."""


def check(
    k_new: torch.Tensor,
    k_cache: torch.Tensor,
    lengths: torch.Tensor,
    choice: torch.Tensor,
    slots: torch.Tensor | None,
) -> None:
    """Refuses slots that the cache does not have or that two rows share, wrong choices, and full prefixes."""
    S, N, T = k_new.shape[3], k_cache.shape[1], k_cache.shape[3]
    if slots is not None:
        _checks.slots("commit", slots, N, distinct=True)
    kept, every = range(N) if slots is None else slots.tolist(), lengths.tolist()
    for row, (slot, chosen) in enumerate(zip(kept, choice.tolist(), strict=True)):
        if not -1 <= chosen < S:
            raise RGTGError(f"commit: choice[{row}]={chosen} is not a new token (S={S}): use -1 to {S - 1}")
        if chosen >= 0 and not 0 <= every[slot] < T:
            raise RGTGError(
                f"commit: lengths[{slot}]={every[slot]} leaves no free position in the cache (T={T}): "
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
    slots: torch.Tensor | None = None,
) -> None:
    """Appends the chosen new token to every row's prefix, in all layers at once.

        k_cache[:, b, :, lengths[b]] = k_new[:, b, :, choice[b]],  the same for v,  lengths[b] += 1

    With `slots`, row b's prefix is in slot slots[b] of the cache: read k_cache[:, slots[b]] and lengths[slots[b]]
    above; the other slots do not change. A row with choice −1 does not change: its cache and its length keep every bit.
    Of keys, values and caches only the last dimension need be contiguous.

    Args:
        k_new: `[L, B, G, S, D]`, keys of the new tokens, any floating dtype.
        v_new: `[L, B, G, S, D]`, values of the new tokens, same dtype.
        k_cache: `[L, N, G, T, D]`, keys of the prefixes, same dtype; N = B without `slots`; written in place.
        v_cache: `[L, N, G, T, D]`, values of the prefixes, same dtype; written in place.
        lengths: `[N]` int64, tokens of the prefix in each slot; written in place.
        choice: `[B]` int64, index of the new token to append, or −1.
        slots: `[B]` int64, the slot of each row's prefix, 0 to N − 1 and all different; None: row b is in slot b.

    Raises:
        RGTGError: shapes or dtypes do not fit; on the CPU also: a choice is not below S, a row's cache is full, or a
            slot is outside the cache or named twice, and then nothing is written.

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
    N, legend = (B, "B") if slots is None else (k_cache.shape[1], "N")
    T = k_cache.shape[3]
    _checks.shaped(op, "v_new", v_new, "[L, B, G, S, D]", (L, B, G, S, D))
    _checks.shaped(op, "k_cache", k_cache, f"[L, {legend}, G, T, D]", (L, N, G, T, D))
    _checks.shaped(op, "v_cache", v_cache, f"[L, {legend}, G, T, D]", (L, N, G, T, D))
    for name, x in (("v_new", v_new), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.of_dtype(op, name, x, k_new.dtype)
    _checks.shaped(op, "lengths", lengths, f"[{legend}]", (N,))
    _checks.of_dtype(op, "lengths", lengths, torch.int64)
    for name, x in (("choice", choice), ("slots", slots)):
        if x is not None:
            _checks.shaped(op, name, x, "[B]", (B,))
            _checks.of_dtype(op, name, x, torch.int64)
    if D > 1 and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1):
        raise RGTGError(
            f"{op}: k_cache and v_cache are written in place: their last dimension must be contiguous"
        )
    _checks.together(
        op, k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache, lengths=lengths, choice=choice, slots=slots
    )
    _checks.written(op, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    torch.ops.rgtg_fast.commit(k_new, v_new, k_cache, v_cache, lengths, choice, slots)
