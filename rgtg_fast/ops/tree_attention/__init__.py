"""Room of tree_attention: new tokens attend to a shared prefix and to those new tokens that a mask names."""

from __future__ import annotations

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from .cpp import cpp
from .launch import reason_against
from .reference import reference
from .spec import SPEC

__all__ = ["SPEC", "reference", "tree_attention"]

# Bits of a mask.
MAX_MASKED = 64


def _fake(
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
    return q.new_empty((B, S, H, D)).transpose(1, 2)


def _check_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    ancestors: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> None:
    T = k_cache.shape[2]
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= T:
            raise RGTGError(
                f"tree_attention: lengths[{row}]={length} is outside the cache (T={T}): use 0 to {T}"
            )


register(
    SPEC,
    "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? ancestors, "
    "float scale, bool causal=False) -> Tensor",
    _fake,
    _check_values,
    cpp,
    frozenset(DTYPE_CODES),
    frozenset(DTYPE_CODES),
    triton_against=reason_against,
    sizes=lambda q, *_: {"D": q.shape[-1]},
)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    ancestors: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of S new tokens to their row's prefix and to those new tokens that a mask names.

        out[b, h, s] = Σ_t softmax_t( scale · q[b, h, s] · key_t ) value_t

    where t runs over the row's prefix, slots 0 to lengths[b] − 1 of the cache, and over the new tokens that
    token s sees: itself alone (no mask: k candidates for one position), tokens 0 to s (`causal`: a prompt),
        or those whose bit
    is set (`ancestors`: a tree). Head h reads the keys and values of head h // (H/G). The prefix is read
    once for all new tokens and all heads of a group; accumulation is in float32.

    Args:
        q: `[B, H, S, D]`, queries, any floating dtype. Of every tensor only the last dimension need be
            contiguous.
        k, v: `[B, G, S, D]`, keys and values of the new tokens, same dtype; G divides H.
        k_cache, v_cache: `[B, G, T, D]`, the prefix, same dtype; slots from lengths[b] on are never used,
            whatever they hold.
        lengths: `[B]` int64, tokens of each row's prefix, 0 ≤ lengths[b] ≤ T.
        ancestors: `[B, S]` int64 bit masks, or None; bit j of ancestors[b, s]: token s sees new token j. S ≤
            64. A token that sees nothing at all yields zeros.
        scale: factor of the scores; 1/√D where None.
        causal: new token s sees new tokens 0 to s.

    Returns:
        `[B, H, S, D]` of q's dtype, a view of memory laid out `[B, S, H, D]`.

    Raises:
        RGTGError: shapes, dtypes, lengths or masks do not fit.

    Source:
        Tree attention: SpecInfer (arXiv 2305.09781), §4; split softmax merged by log-sum-exp:
            FlashAttention-2
        (arXiv 2307.08691), §3.1.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import tree_attention
        >>> q = torch.ones(1, 2, 3, 4)          # 3 candidates, 2 query heads
        >>> k = v = torch.zeros(1, 1, 3, 4)     # that share one key-value head
        >>> k_cache, v_cache = torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
        >>> tree_attention(q, k, v, k_cache, v_cache, lengths=torch.tensor([3]))[0, 0, 0]
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
    """
    op = "tree_attention"
    if q.ndim != 4 or k_cache.ndim != 4:
        raise RGTGError(
            f"{op}: q has shape {list(q.shape)} and k_cache {list(k_cache.shape)}: use 4 dimensions each"
        )
    _checks.floating(op, "q", q)
    B, H, S, D = q.shape
    G, T = k_cache.shape[1], k_cache.shape[2]
    if G < 1 or H < 1 or H % G:
        raise RGTGError(f"{op}: {H} query heads cannot share {G} key-value heads: H must be a multiple of G")
    if D < 1:
        raise RGTGError(f"{op}: heads have {D} numbers: use D >= 1")
    _checks.shaped(op, "k", k, "[B, G, S, D]", (B, G, S, D))
    _checks.shaped(op, "v", v, "[B, G, S, D]", (B, G, S, D))
    _checks.shaped(op, "k_cache", k_cache, "[B, G, T, D]", (B, G, T, D))
    _checks.shaped(op, "v_cache", v_cache, "[B, G, T, D]", (B, G, T, D))
    _checks.shaped(op, "lengths", lengths, "[B]", (B,))
    _checks.of_dtype(op, "lengths", lengths, torch.int64)
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype == q.dtype:
        raise RGTGError(
            f"{op}: dtypes differ (q {q.dtype}, k {k.dtype}, v {v.dtype}, k_cache {k_cache.dtype}, "
            f"v_cache {v_cache.dtype}): use one"
        )
    if ancestors is not None:
        if causal:
            raise RGTGError(f"{op}: ancestors and causal=True exclude each other: give one")
        if S > MAX_MASKED:
            raise RGTGError(f"{op}: S={S} exceeds the {MAX_MASKED} bits of a mask: use S <= {MAX_MASKED}")
        _checks.shaped(op, "ancestors", ancestors, "[B, S]", (B, S))
        _checks.of_dtype(op, "ancestors", ancestors, torch.int64)
    _checks.together(op, q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, lengths=lengths, ancestors=ancestors)
    if scale is None:
        scale = D**-0.5
    return torch.ops.rgtg_fast.tree_attention(q, k, v, k_cache, v_cache, lengths, ancestors, scale, causal)
