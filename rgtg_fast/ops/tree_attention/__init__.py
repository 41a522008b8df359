"""Op tree_attention: new tokens attend to a shared prefix and to the new tokens that a mask names."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["reference", "tree_attention"]

# Bits of a mask.
MAX_MASKED = 64
# The largest head that the Triton kernels take.
MAX_D = 256


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    ancestors: torch.Tensor | None,
    scale: float,
    causal: bool,
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
    prefix = (grouped @ k_cache.mT * scale).masked_fill(~filled[:, None, None, None, :], float("-inf"))

    independent = ancestors is None and not causal
    if independent:
        # A new token attends to no new token but itself, so that a NaN in one candidate stays there.
        new = (grouped * k).sum(-1, keepdim=True) * scale  # [B, G, H/G, S, 1]
    else:
        index = torch.arange(S, device=q.device)
        if ancestors is None:
            visible = (index <= index[:, None]).expand(B, S, S)
        else:
            visible = (ancestors[..., None] >> index) & 1 == 1  # [B, S, S]
        new = (grouped @ k.mT * scale).masked_fill(~visible[:, None, None], float("-inf"))

    scores = torch.cat([prefix, new], -1)
    # A token without anything to attend to (an empty prefix and an empty mask) gives 0, not NaN.
    m = scores.amax(-1, keepdim=True)
    weights = (scores - m.masked_fill(m == float("-inf"), 0)).exp()
    l_sum = weights.sum(-1, keepdim=True)
    weights = weights / l_sum.masked_fill(l_sum == 0, 1)
    out = weights[..., :T] @ v_cache + (weights[..., T:] * v if independent else weights[..., T:] @ v)
    # In memory [B, S, H, D]: what the output projection reads next.
    return out.reshape(B, H, S, D).transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2)


def outputs(q: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result, not yet filled: a view of memory in the order `[B, S, H, D]`."""
    B, H, S, D = q.shape
    return torch.empty((B, S, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def check(k_cache: torch.Tensor, lengths: torch.Tensor) -> None:
    """Refuses prefixes longer than the cache."""
    T = k_cache.shape[2]
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= T:
            raise RGTGError(
                f"tree_attention: lengths[{row}]={length} is outside the cache (T={T}): use 0 to {T}"
            )


def triton_limit(D: int = 1) -> str:
    """Why the Triton kernels cannot serve these sizes; empty where they can."""
    return f"its Triton kernel takes D <= {MAX_D}, not {D}" if D > MAX_D else ""


register(
    reference,
    outputs,
    name="tree_attention",
    check=check,
    cpp_dtypes=frozenset(DTYPE_CODES),
    triton_dtypes=frozenset(DTYPE_CODES),
    triton_limit=triton_limit,
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
    """Attention of S new tokens to their row's prefix and to the new tokens that a mask names.

        out[b, h, s] = Σ_t softmax_t( scale · q[b, h, s] · key_t ) value_t

    where t runs over the row's prefix, slots 0 to lengths[b] − 1 of the cache, and over the new tokens visible to s:
    s alone (no mask: k candidates for one position), tokens 0 to s (`causal`: a prompt), or the tokens whose bit is set
    (`ancestors`: a tree). Head h reads the keys and values of head h // (H/G). The prefix is read once for all new
    tokens and all heads of a group; accumulation is in float32.

    Of every tensor only the last dimension need be contiguous.

    Args:
        q: `[B, H, S, D]`, queries, any floating dtype.
        k: `[B, G, S, D]`, keys of the new tokens, same dtype; G divides H.
        v: `[B, G, S, D]`, values of the new tokens, same dtype.
        k_cache: `[B, G, T, D]`, keys of the prefix, same dtype. Slots from lengths[b] on are never used, whatever they
            contain.
        v_cache: `[B, G, T, D]`, values of the prefix, likewise.
        lengths: `[B]` int64, tokens of each row's prefix, 0 ≤ lengths[b] ≤ T.
        ancestors: `[B, S]` int64 bit masks, or None; bit j of ancestors[b, s]: new token j is visible to s. S ≤ 64. A
            token to which nothing is visible yields zeros.
        scale: factor of the scores; 1/√D where None.
        causal: new tokens 0 to s are visible to s.

    Returns:
        `[B, H, S, D]` of q's dtype, a view of memory laid out `[B, S, H, D]`.

    Raises:
        RGTGError: shapes, dtypes, lengths or masks do not fit.

    Source:
        Tree attention: SpecInfer (arXiv 2305.09781), §4; split softmax merged by log-sum-exp: FlashAttention-2
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
        ancestors = ancestors.contiguous()
    _checks.together(op, q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, lengths=lengths, ancestors=ancestors)
    if scale is None:
        scale = D**-0.5
    return torch.ops.rgtg_fast.tree_attention(q, k, v, k_cache, v_cache, lengths, ancestors, scale, causal)
