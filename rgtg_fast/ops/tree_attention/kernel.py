"""Triton kernels of tree_attention: splits of the prefix for all queries of a group, and their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import architecture, multiprocessors, on_device, tickets
from . import MAX_WINDOW, outputs

# Tests and tune.py reach all of these through this module.
from .blocks import (  # noqa: F401
    ALONE,
    CAUSAL,
    LEAF,
    MASKED,
    MAX_PARTS,
    MODES,
    SPAN,
    TILES,
    configuration,
    leaf_of,
    least_leaf,
    merge_configuration,
    split_prefix,
)

# The same as constants of the kernels.
_ALONE, _MASKED, _CAUSAL = (tl.constexpr(mode) for mode in MODES)
_LEAF, _MAX_PARTS = tl.constexpr(LEAF), tl.constexpr(MAX_PARTS)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weight(m, other):
    """Factor that rescales a sum with the maximum `other` to the maximum `m`; both are base-2 logarithms."""
    # An empty sum has the maximum −inf and the weight 0, also next to another empty one.
    return tl.exp2(other - tl.where(m == -float("inf"), 0.0, m))


@triton.jit
def _fold(b_m, b_l, b_acc, b_m_new, b_l_new, b_acc_new, ROWS: tl.constexpr):
    """Adds one softmax sum to another. Products are fused explicitly, so that every kernel rounds the same."""
    b_high = tl.maximum(b_m, b_m_new)
    b_old, b_new = _weight(b_high, b_m), _weight(b_high, b_m_new)
    b_l = tl.fma(b_l_new, b_new, b_l * b_old)
    if ROWS:
        b_old, b_new = b_old[:, None], b_new[:, None]
    b_acc = tl.fma(b_acc_new, b_new + tl.zeros_like(b_acc), b_acc * b_old)
    return b_high, b_l, b_acc


@triton.jit
def _quotient(b_acc, b_l):
    """acc / l; a row to which nothing is visible is 0."""
    return b_acc / tl.where(b_l == 0, 1.0, b_l)


@triton.jit
def _capped(x, softcap, HALF: tl.constexpr):
    """c · tanh(x / c) as a base-2 logarithm. For 2-byte numbers (`HALF`), c · 2⁻²⁴ is exact enough."""
    y = x * (1.0 / softcap)
    if HALF:
        return softcap * LOG2_E - 2.0 * softcap * LOG2_E / (1.0 + tl.exp2(y * (2.0 * LOG2_E)))
    size = tl.abs(y)
    s = size * size
    # Up to 3/4 a convergent of the continued fraction y / (1 + y² / (3 + y² / (5 + ...))); beyond it (1 − e) / (1 + e)
    # with e = e^(−2y), which loses digits near 0.
    few = size <= 0.75
    e = tl.exp2(size * (-2.0 * LOG2_E))
    p = tl.where(few, size * (s * (s + 105.0) + 945.0), 1.0 - e)
    q = tl.where(few, s * (s * 15.0 + 420.0) + 945.0, 1.0 + e)
    t = p / q * (softcap * LOG2_E)
    return tl.where(y < 0, -t, t)


@triton.jit
def _sunk(b_m, b_l, b_acc, b_sink, ROWS: tl.constexpr):
    """Adds the weight of a sink, whose value is 0, to a softmax sum."""
    b_sink = b_sink.to(tl.float32) * LOG2_E
    return _fold(b_m, b_l, b_acc, b_sink, tl.zeros_like(b_l) + 1.0, tl.zeros_like(b_acc), ROWS)


@triton.jit
def _depth(b_mask):
    """Positions between the prefix and a token of this mask: its bits − 1, and 0 for an empty mask."""
    b_mask = b_mask - ((b_mask >> 1) & 0x5555555555555555)
    b_mask = (b_mask & 0x3333333333333333) + ((b_mask >> 2) & 0x3333333333333333)
    b_mask = (b_mask + (b_mask >> 4)) & 0x0F0F0F0F0F0F0F0F
    return tl.maximum(((b_mask * 0x0101010101010101) >> 56).to(tl.int32) - 1, 0)


@triton.jit
def _block(b_q, b_k, b_v, m_mn, factor, softcap, b_m, b_l, b_acc):
    """Adds a block of keys and values to the running softmax."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * factor
    if softcap is not None:
        b_score = _capped(b_score, softcap, b_q.dtype != tl.float32)
    b_score = tl.where(m_mn, b_score, -float("inf"))
    b_high = tl.maximum(b_m, tl.max(b_score, 1))
    b_old = _weight(b_high, b_m)
    b_p = _weight(b_high[:, None], b_score)
    b_l = b_l * b_old + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="tf32x3")
    return b_high, b_l, b_acc


@triton.jit
def _slot(p_slots, i_b, N):
    """The slot of row b's prefix. A wrong one is brought inside: nothing outside the cache is read."""
    i_c = i_b
    if p_slots is not None:
        i_c = tl.minimum(tl.maximum(tl.load(p_slots + i_b), 0), N - 1)
    return i_c


@triton.jit
def _leaf(length, least):
    """Slots of a leaf in a row of `length`: `leaf_of`."""
    few = tl.where(
        length <= _LEAF // 4 * _MAX_PARTS,
        _LEAF // 4,
        tl.where(length <= _LEAF // 2 * _MAX_PARTS, _LEAF // 2, _LEAF),
    )
    return tl.maximum(few, least)


# Without this, sizes that happen to be 1 or a multiple of 16 would compile the kernel again.
@triton.jit(do_not_specialize=["N", "G", "S", "T", "R", "span", "least", "window"])
def tree_attention_kernel(
    p_q,
    p_k,
    p_v,
    p_k_cache,
    p_v_cache,
    p_out,
    p_acc,
    p_m,
    p_l,
    p_tickets,
    p_lengths,
    p_ancestors,
    p_sinks,
    p_slots,
    scale,
    N,
    G,
    S,
    T,
    R,
    span,
    least,
    window,
    softcap,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    k_cache_b,
    k_cache_h,
    k_cache_s,
    v_cache_b,
    v_cache_h,
    v_cache_s,
    out_b,
    out_h,
    out_s,
    MODE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAVES: tl.constexpr,
):
    # Blocks of query rows are neighbors, so that all but the first find the prefix in the cache.
    blocks = tl.cdiv(S * R, BLOCK_M)
    i_m, i_bg, i_t = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1)
    splits = tl.num_programs(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    i_c = _slot(p_slots, i_b, N)
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_c), 0), T).to(tl.int32)
    if window is not None:
        # From here on positions are counted from the first that the window of a token of depth 0 reaches.
        unseen = length - window + 1
        begin = tl.maximum(unseen, 0)
        length -= begin
        unseen -= begin
    leaf = _leaf(length, least)
    if LEAVES:
        span = leaf
    start = i_t * span
    # The first split includes the new tokens, so it runs for every row.
    if (start < length) | (i_t == 0):
        factor = scale * LOG2_E if softcap is None else scale

        # Row m of the block is query head g · R + m % R of new token m // R.
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_s, o_r = o_m // R, (o_m % R).to(tl.int64)
        m_m = o_s < S
        o_s64 = o_s.to(tl.int64)
        o_d, o_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        m_d = o_d < D
        m_md = m_m[:, None] & m_d[None, :]
        o_q = i_b * q_b + (i_g * R + o_r) * q_h + o_s64 * q_s
        b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
        if window is not None:
            if MODE == _MASKED:
                b_depth = _depth(tl.load(p_ancestors + i_b * S + o_s, mask=m_m, other=0))
            else:
                b_depth = o_s

        b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_l = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if i_t == 0:
            p_k += i_b * k_b + i_g * k_h
            p_v += i_b * v_b + i_g * v_h
            if MODE == _ALONE:
                # Candidates do not see each other: each row has its own key and value, and a NaN stays in its row.
                o_k, o_v = o_s64[:, None] * k_s + o_d[None, :], o_s64[:, None] * v_s + o_d[None, :]
                b_own = tl.load(p_k + o_k, mask=m_md, other=0.0).to(tl.float32)
                b_m = tl.sum(b_q.to(tl.float32) * b_own, 1) * factor
                if softcap is not None:
                    b_m = _capped(b_m, softcap, b_q.dtype != tl.float32)
                b_l += 1.0
                b_acc = tl.load(p_v + o_v, mask=m_md, other=0.0).to(tl.float32)
            else:
                oldest = 0
                if MODE == _MASKED:
                    b_mask = tl.load(p_ancestors + i_b * S + o_s, mask=m_m, other=0)
                    last = S
                    if window is not None:
                        # Token by token: the depths of a whole block of keys would fill the registers.
                        for j in range(S):
                            bit = tl.full((), 1, tl.int64) << j
                            far = _depth(tl.load(p_ancestors + i_b * S + j)) <= b_depth - window
                            b_mask = tl.where(far, b_mask & ~bit, b_mask)
                else:
                    last = tl.minimum(S, (i_m * BLOCK_M + BLOCK_M - 1) // R + 1)
                    if window is not None:
                        oldest = tl.maximum(i_m * BLOCK_M // R - window + 1, 0) // BLOCK_N * BLOCK_N
                for first in range(oldest, last, BLOCK_N):
                    o_j = first + o_n
                    m_nd = (o_j < S)[:, None] & m_d[None, :]
                    o_j64 = o_j.to(tl.int64)[:, None]
                    b_k = tl.load(p_k + o_j64 * k_s + o_d[None, :], mask=m_nd, other=0.0)
                    b_v = tl.load(p_v + o_j64 * v_s + o_d[None, :], mask=m_nd, other=0.0)
                    if MODE == _MASKED:
                        m_mn = ((b_mask[:, None] >> o_j.to(tl.int64)[None, :]) & 1) != 0
                        m_mn = m_mn & (o_j < S)[None, :]
                    else:
                        m_mn = (o_j[None, :] <= o_s[:, None]) & (o_j < S)[None, :]
                    if window is not None and MODE == _CAUSAL:
                        m_mn = m_mn & (o_j[None, :] > (b_depth - window)[:, None])
                    b_m, b_l, b_acc = _block(b_q, b_k, b_v, m_mn, factor, softcap, b_m, b_l, b_acc)

        p_k_cache += i_c * k_cache_b + i_g * k_cache_h
        p_v_cache += i_c * v_cache_b + i_g * v_cache_h
        lowest = start
        if window is not None:
            p_k_cache += begin.to(tl.int64) * k_cache_s
            p_v_cache += begin.to(tl.int64) * v_cache_s
            if MODE == _CAUSAL:
                # Leaves that no row of the block sees change no bit.
                lowest = tl.maximum(start, (i_m * BLOCK_M // R + unseen) // leaf * leaf)
        if not LEAVES:
            b_m_all = tl.full([BLOCK_M], -float("inf"), tl.float32)
            b_l_all = tl.zeros([BLOCK_M], tl.float32)
            b_acc_all = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(lowest, tl.minimum(start + span, length), BLOCK_N):
            # Two nested ifs: LEAVES is resolved at compile time.
            if not LEAVES:  # noqa: SIM102
                if (first > start) & (first % leaf == 0):
                    b_m_all, b_l_all, b_acc_all = _fold(b_m_all, b_l_all, b_acc_all, b_m, b_l, b_acc, True)
                    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
                    b_l = tl.zeros([BLOCK_M], tl.float32)
                    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            o_t = first + o_n
            # Positions past the length may contain NaN: they are not loaded.
            m_t = o_t < length
            m_td = m_t[:, None] & m_d[None, :]
            o_t64 = o_t.to(tl.int64)[:, None]
            b_k = tl.load(p_k_cache + o_t64 * k_cache_s + o_d[None, :], mask=m_td, other=0.0)
            b_v = tl.load(p_v_cache + o_t64 * v_cache_s + o_d[None, :], mask=m_td, other=0.0)
            m_mt = m_t[None, :]
            if window is not None and MODE != _ALONE:
                m_mt = m_mt & (o_t[None, :] >= (b_depth + unseen)[:, None])
            b_m, b_l, b_acc = _block(b_q, b_k, b_v, m_mt, factor, softcap, b_m, b_l, b_acc)
        if not LEAVES:
            b_m, b_l, b_acc = _fold(b_m_all, b_l_all, b_acc_all, b_m, b_l, b_acc, True)

        o_out = i_b * out_b + (i_g * R + o_r) * out_h + o_s64 * out_s
        if splits == 1:
            if p_sinks is not None:
                b_sink = tl.load(p_sinks + i_g * R + o_r, mask=m_m, other=0.0)
                b_m, b_l, b_acc = _sunk(b_m, b_l, b_acc, b_sink, True)
            elif LEAVES and MODE == _ALONE:
                # Not folded into anything yet: an own score of −inf still counts.
                b_acc *= tl.where(b_m == -float("inf"), 0.0, 1.0)[:, None]
            b_out = _quotient(b_acc, b_l[:, None])
            tl.store(p_out + o_out[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_md)
        else:
            o_row = (i_bg.to(tl.int64) * S * R + o_m) * splits
            tl.store(p_acc + (o_row + i_t)[:, None] * D + o_d[None, :], b_acc, mask=m_md)
            tl.store(p_m + o_row + i_t, b_m, mask=m_m)
            tl.store(p_l + o_row + i_t, b_l, mask=m_m)
            if splits <= _MAX_PARTS:
                # The last program of these rows merges all parts. A program takes its ticket after all its threads have
                # stored; the last one resets the tickets to 0 for the next launch.
                tl.debug_barrier()
                parts = tl.maximum(1, tl.cdiv(length, span))
                if tl.atomic_add(p_tickets + tl.program_id(0), 1, sem="acq_rel") == parts - 1:
                    tl.store(p_tickets + tl.program_id(0), 0)
                    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
                    b_l = tl.zeros([BLOCK_M], tl.float32)
                    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                    for i in range(parts):
                        # Other programs have written these: the first-level cache may contain old values.
                        p_part = p_acc + (o_row + i)[:, None] * D + o_d[None, :]
                        b_part = tl.load(p_part, mask=m_md, other=0.0, cache_modifier=".cg")
                        b_m_part = tl.load(p_m + o_row + i, mask=m_m, other=0.0, cache_modifier=".cg")
                        b_l_part = tl.load(p_l + o_row + i, mask=m_m, other=0.0, cache_modifier=".cg")
                        b_m, b_l, b_acc = _fold(b_m, b_l, b_acc, b_m_part, b_l_part, b_part, True)
                    if p_sinks is not None:
                        b_sink = tl.load(p_sinks + i_g * R + o_r, mask=m_m, other=0.0)
                        b_m, b_l, b_acc = _sunk(b_m, b_l, b_acc, b_sink, True)
                    b_out = _quotient(b_acc, b_l[:, None])
                    tl.store(
                        p_out + o_out[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_md
                    )


@triton.jit(do_not_specialize=["N", "G", "S", "T", "R", "span", "least", "window", "splits"])
def tree_attention_merge_kernel(
    p_acc,
    p_m,
    p_l,
    p_lengths,
    p_sinks,
    p_slots,
    p_out,
    N,
    G,
    S,
    T,
    R,
    span,
    least,
    window,
    splits,
    out_b,
    out_h,
    out_s,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEAVES: tl.constexpr,
):
    i_m, i_bg = tl.program_id(0) % (S * R), tl.program_id(0) // (S * R)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(p_lengths + _slot(p_slots, i_b, N)), 0), T).to(tl.int32)
    if window is not None:
        length = tl.minimum(length, window - 1)
    if LEAVES:
        span = _leaf(length, least)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D

    m_all = tl.full((), -float("inf"), tl.float32)
    l_all = tl.full((), 0.0, tl.float32)
    b_acc_all = tl.zeros([BLOCK_D], tl.float32)
    p_part = (i_bg.to(tl.int64) * S * R + i_m) * splits
    # Splits past the length have written nothing.
    parts = tl.maximum(1, tl.cdiv(length, span))
    for first in range(0, parts, _MAX_PARTS):
        m_span = tl.full((), -float("inf"), tl.float32)
        l_span = tl.full((), 0.0, tl.float32)
        b_acc = tl.zeros([BLOCK_D], tl.float32)
        # Without branches, so that all loads are in flight before the first part is folded.
        for i in tl.static_range(_MAX_PARTS):
            i_t = first + i
            # Numbers of this part: 0 where it does not exist.
            size = tl.where(i_t < parts, D, 0)
            b_part = tl.load(p_acc + (p_part + i_t) * D + o_d, mask=o_d < size, other=0.0)
            m_part = tl.load(p_m + p_part + i_t, mask=size > 0, other=-float("inf"))
            l_part = tl.load(p_l + p_part + i_t, mask=size > 0, other=0.0)
            if LEAVES:
                m_span, l_span, b_acc = _fold(m_span, l_span, b_acc, m_part, l_part, b_part, False)
            else:
                m_all, l_all, b_acc_all = _fold(m_all, l_all, b_acc_all, m_part, l_part, b_part, False)
        if LEAVES:
            m_all, l_all, b_acc_all = _fold(m_all, l_all, b_acc_all, m_span, l_span, b_acc, False)
    o_s, o_r = (i_m // R).to(tl.int64), (i_m % R).to(tl.int64)
    if p_sinks is not None:
        m_all, l_all, b_acc_all = _sunk(m_all, l_all, b_acc_all, tl.load(p_sinks + i_g * R + o_r), False)
    o_out = i_b * out_b + (i_g * R + o_r) * out_h + o_s * out_s
    b_out = _quotient(b_acc_all, l_all)
    tl.store(p_out + o_out + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


def launch(
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
    R = H // G
    out = outputs(q)
    if out.numel() == 0:
        return out
    q, k, v, k_cache, v_cache = dense(q), dense(k), dense(v), dense(k_cache), dense(v_cache)
    lengths = lengths.contiguous()
    mode = CAUSAL if causal else ALONE if ancestors is None else MASKED
    # None is resolved at compile time. Positions are 32-bit integers.
    limit = min(window, MAX_WINDOW) or None
    cap = softcap or None
    count = None if slots is None else k_cache.shape[0]
    settings = configuration(D, S * R, mode, q.dtype, architecture(q.device))
    programs = B * G * triton.cdiv(S * R, settings["BLOCK_M"])
    least = least_leaf(settings["BLOCK_M"])
    # The largest number of positions that a row reads.
    most = T if limit is None else min(T, limit - 1)
    span, splits = split_prefix(programs, S * R, most, least, multiprocessors(q.device))
    leaves = int(span == 0)
    # A single split writes the result itself.
    parts = (B * G * S * R, splits) if splits > 1 else (0, 0)
    m_parts, l_parts = torch.empty((2, *parts), dtype=torch.float32, device=q.device)
    acc_parts = torch.empty((*parts, D), dtype=torch.float32, device=q.device)
    with on_device(q):
        tree_attention_kernel[(programs, splits)](
            q,
            k,
            v,
            k_cache,
            v_cache,
            out,
            acc_parts,
            m_parts,
            l_parts,
            tickets(q.device, programs),
            lengths,
            ancestors,
            sinks,
            slots,
            scale,
            count,
            G,
            S,
            T,
            R,
            span,
            least,
            limit,
            cap,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *out.stride()[:3],
            **settings,
            LEAVES=leaves,
        )
        if splits > MAX_PARTS:
            tree_attention_merge_kernel[(B * G * S * R,)](
                acc_parts,
                m_parts,
                l_parts,
                lengths,
                sinks,
                slots,
                out,
                count,
                G,
                S,
                T,
                R,
                span,
                least,
                limit,
                splits,
                *out.stride()[:3],
                **merge_configuration(D, leaves),
            )
    return out
