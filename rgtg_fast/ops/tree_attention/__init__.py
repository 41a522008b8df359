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
# Larger windows are cut to this; no cache is as long.
MAX_WINDOW = 2**31 - 1
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
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> torch.Tensor:
    B, H, S, D = q.shape
    G, T = k_cache.shape[1:3]
    if slots is not None:
        k_cache, v_cache, lengths = k_cache[slots], v_cache[slots], lengths[slots]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).view(B, G, H // G, S, D)
    k, v = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]  # [B, G, 1, S, D]

    # Positions that no token of a row sees may hold anything, NaN included: they are cleared, not only masked.
    position = torch.arange(T, device=q.device)
    filled = position < lengths[:, None]  # [B, T]
    if window:
        filled = filled & (position > lengths[:, None] - window)
    kept = filled[:, None, :, None]
    k_cache = torch.where(kept, k_cache.to(dtype), 0)[:, :, None]  # [B, G, 1, T, D]
    v_cache = torch.where(kept, v_cache.to(dtype), 0)[:, :, None]
    seen = filled[:, None]  # [B, 1 or S, T]
    depth = _depth(q, ancestors, causal) if window else None
    if depth is not None:
        seen = seen & (position > (lengths[:, None] + depth - window)[..., None])
    prefix = _capped(grouped @ k_cache.mT * scale, softcap).masked_fill(~seen[:, None, None], float("-inf"))

    independent = ancestors is None and not causal
    if independent:
        # A new token attends to no new token but itself, so that a NaN in one candidate stays there.
        new = _capped((grouped * k).sum(-1, keepdim=True) * scale, softcap)  # [B, G, H/G, S, 1]
    else:
        index = torch.arange(S, device=q.device)
        if ancestors is None:
            visible = (index <= index[:, None]).expand(B, S, S)
        else:
            visible = (ancestors[..., None] >> index) & 1 == 1  # [B, S, S]
        if depth is not None:
            visible = visible & (depth[:, None, :] > depth[..., None] - window)
        new = _capped(grouped @ k.mT * scale, softcap).masked_fill(~visible[:, None, None], float("-inf"))

    scores = torch.cat([prefix, new], -1)
    # A token without anything to attend to (an empty prefix and an empty mask) gives 0, not NaN.
    m = scores.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.to(dtype).view(G, H // G, 1, 1)
    if sink is not None:
        m = torch.maximum(m, sink)
    m = m.masked_fill(m == float("-inf"), 0)
    weights = (scores - m).exp()
    l_sum = weights.sum(-1, keepdim=True)
    if sink is not None:
        l_sum = l_sum + (sink - m).exp()
    weights = weights / l_sum.masked_fill(l_sum == 0, 1)
    out = weights[..., :T] @ v_cache + (weights[..., T:] * v if independent else weights[..., T:] @ v)
    # In memory [B, S, H, D]: what the output projection reads next.
    return out.reshape(B, H, S, D).transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2)


def _capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _depth(q: torch.Tensor, ancestors: torch.Tensor | None, causal: bool) -> torch.Tensor | None:
    """Positions between a row's prefix and each new token, [1 or B, S]; None: 0 for all."""
    if causal:
        return torch.arange(q.shape[2], device=q.device)[None]
    if ancestors is None:
        return None
    bits = ancestors[..., None] >> torch.arange(MAX_MASKED, device=q.device) & 1
    return (bits.sum(-1) - 1).clamp(min=0)


def outputs(q: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result, not yet filled: a view of memory in the order `[B, S, H, D]`."""
    B, H, S, D = q.shape
    return torch.empty((B, S, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def check(k_cache: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None) -> None:
    """Refuses slots that the cache does not have, and prefixes longer than the cache."""
    N, T = k_cache.shape[0], k_cache.shape[2]
    if slots is not None:
        _checks.slots("tree_attention", slots, N)
    read, every = range(N) if slots is None else slots.tolist(), lengths.tolist()
    for slot in read:
        if not 0 <= every[slot] <= T:
            raise RGTGError(
                f"tree_attention: lengths[{slot}]={every[slot]} is outside the cache (T={T}): use 0 to {T}"
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
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of S new tokens to their row's prefix and to the new tokens that a mask names.

        out[b, h, s] = Σ_t softmax_t( scale · q[b, h, s] · key_t ) value_t

    where t runs over the row's prefix, positions 0 to lengths[b] − 1 of the cache, and over the new tokens visible to
    s: s alone (no mask: k candidates for one position), tokens 0 to s (`causal`: a prompt), or the tokens whose bit is
    set (`ancestors`: a tree). Head h reads the keys and values of head h // (H/G). The prefix is read once for all new
    tokens and all heads of a group; accumulation is in float32.

    New token s stands at position p = lengths[b] + depth: depth 0 without a mask, s with `causal`, else the number of
    bits of its mask − 1 (0 for an empty mask). With a `window` it sees only what stands at positions above
    p − window, of the prefix and of the new tokens. With a `softcap` c a score x becomes c · tanh(x / c). With `sinks`
    the softmax of head h has one more term, e^sinks[h], that has no value.

    With `slots` the cache has N slots, and row b's prefix is in one of them: k_cache[slots[b]], v_cache[slots[b]] and
    lengths[slots[b]]. Nothing is copied, and the result has the bits of a cache with these prefixes alone.

    Of every tensor only the last dimension need be contiguous.

    Args:
        q: `[B, H, S, D]`, queries, any floating dtype.
        k: `[B, G, S, D]`, keys of the new tokens, same dtype; G divides H.
        v: `[B, G, S, D]`, values of the new tokens, same dtype.
        k_cache: `[N, G, T, D]`, keys of the prefixes, same dtype; N = B without `slots`. Positions from the length of a
            slot on are never used, whatever they contain.
        v_cache: `[N, G, T, D]`, values of the prefixes, likewise.
        lengths: `[N]` int64, tokens of the prefix in each slot, 0 to T.
        ancestors: `[B, S]` int64 bit masks, or None; bit j of ancestors[b, s]: new token j is visible to s. S ≤ 64. A
            token to which nothing is visible yields zeros.
        scale: factor of the scores; 1/√D where None.
        causal: new tokens 0 to s are visible to s.
        window: positions that a token sees, its own included; None or 0: all. Positions of the cache at or below
            lengths[b] − window are never read, whatever they contain.
        softcap: bound of the scaled scores, 1e-30 to 1e30; None or 0: none.
        sinks: `[H]`, logits without a value, same dtype as q and never capped; or None.
        slots: `[B]` int64, the slot of each row's prefix, 0 to N − 1; None: row b is in slot b.

    Returns:
        `[B, H, S, D]` of q's dtype, a view of memory laid out `[B, S, H, D]`.

    Raises:
        RGTGError: shapes, dtypes, lengths or masks do not fit, or window or softcap is out of range; on the CPU also: a
            length or a slot is outside the cache.

    Source:
        Tree attention: SpecInfer (arXiv 2305.09781), §4; split softmax merged by log-sum-exp: FlashAttention-2
        (arXiv 2307.08691), §3.1; window: Longformer (arXiv 2004.05150), §3.1; softcap: Gemma 2 (arXiv 2408.00118),
        §2; sinks: gpt-oss (arXiv 2508.10925).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import tree_attention
        >>> q = torch.ones(1, 2, 3, 4)          # 3 candidates, 2 query heads
        >>> k = v = torch.zeros(1, 1, 3, 4)     # that share one key-value head
        >>> k_cache, v_cache = torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
        >>> tree_attention(q, k, v, k_cache, v_cache, lengths=torch.tensor([3]))[0, 0, 0]
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
    """
    _check_arguments(q, k, v, k_cache, v_cache, lengths, ancestors, causal, sinks, slots)
    return torch.ops.rgtg_fast.tree_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        lengths,
        None if ancestors is None else ancestors.contiguous(),
        q.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        0 if window is None else _window(window),
        0.0 if softcap is None else _softcap(softcap),
        None if sinks is None else sinks.contiguous(),
        None if slots is None else slots.contiguous(),
    )


def _check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    ancestors: torch.Tensor | None,
    causal: bool,
    sinks: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> None:
    """Raises where shapes, dtypes or devices do not fit."""
    op = "tree_attention"
    if q.ndim != 4 or k_cache.ndim != 4:
        raise RGTGError(
            f"{op}: q has shape {list(q.shape)} and k_cache {list(k_cache.shape)}: use 4 dimensions each"
        )
    _checks.floating(op, "q", q)
    B, H, S, D = q.shape
    G, T = k_cache.shape[1:3]
    N, legend = (B, "B") if slots is None else (k_cache.shape[0], "N")
    if G < 1 or H < 1 or H % G:
        raise RGTGError(f"{op}: {H} query heads cannot share {G} key-value heads: H must be a multiple of G")
    if D < 1:
        raise RGTGError(f"{op}: heads have {D} numbers: use D >= 1")
    _checks.shaped(op, "k", k, "[B, G, S, D]", (B, G, S, D))
    _checks.shaped(op, "v", v, "[B, G, S, D]", (B, G, S, D))
    if slots is not None:
        _checks.shaped(op, "slots", slots, "[B]", (B,))
        _checks.of_dtype(op, "slots", slots, torch.int64)
        if B and not N:
            raise RGTGError(f"{op}: k_cache has no slots for {B} rows: use N >= 1")
    _checks.shaped(op, "k_cache", k_cache, f"[{legend}, G, T, D]", (N, G, T, D))
    _checks.shaped(op, "v_cache", v_cache, f"[{legend}, G, T, D]", (N, G, T, D))
    _checks.shaped(op, "lengths", lengths, f"[{legend}]", (N,))
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
    if sinks is not None:
        _checks.shaped(op, "sinks", sinks, "[H]", (H,))
        _checks.of_dtype(op, "sinks", sinks, q.dtype)
    _checks.together(
        op,
        q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        lengths=lengths,
        ancestors=ancestors,
        sinks=sinks,
        slots=slots,
    )


def _window(window: int) -> int:
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise RGTGError(f"tree_attention: window={window!r}: use a whole number of positions >= 1, or None")
    return min(window, MAX_WINDOW)


def _softcap(softcap: float) -> float:
    if not isinstance(softcap, (int, float)) or (softcap != 0 and not 1e-30 <= softcap <= 1e30):
        raise RGTGError(f"tree_attention: softcap={softcap!r}: use 1e-30 to 1e30, or None")
    return float(softcap)
