"""Triton kernels of tree_attention: splits of the prefix for all queries of a group, and their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import RGTGError
from .._extension import dense
from .._triton import architecture, multiprocessors, on_device, power_of_two, tickets
from . import outputs

# A row's prefix is summed leaf by leaf. Leaves are folded within a span of slots, then span by span, whichever programs
# do it, so the split never changes a bit. A leaf of a short row is a half or a quarter of `LEAF` where at most
# `MAX_PARTS` leaves cover the row, and at least twice a block's query rows: partial sums would have more bytes than the
# prefix.
LEAF = 256
MAX_PARTS = 8
SPAN = LEAF * MAX_PARTS


def leaf_of(length: int, least: int) -> int:
    """Slots of a leaf in a row of `length`; the kernels compute the same."""
    return max(least, next((n for n in (LEAF // 4, LEAF // 2) if length <= n * MAX_PARTS), LEAF))


def least_leaf(block_m: int) -> int:
    """Slots of the smallest leaf for a block of query rows."""
    return min(max(2 * block_m, LEAF // 4), LEAF)


# New tokens that are visible to a new token: itself, those of its mask, or itself and those before it.
MODES = ALONE, MASKED, CAUSAL = 0, 1, 2


# By architecture, bytes of a number and largest D: BLOCK_M with its BLOCK_N, warps and stages. Chosen so that the
# accumulators and a block of scores stay in registers (docs/kernels.md) while the next blocks of keys and values load.
# 4-byte numbers are split in two for the tensor cores and need twice the registers.
_BY_D_64 = {16: (64, 4, 3), 64: (64, 4, 3), 128: (32, 8, 4)}
_BY_D_256 = {16: (32, 8, 2), 32: (32, 8, 2)}
_FLOAT32 = {64: {16: (32, 4, 2), 32: (32, 4, 2)}, 128: {16: (32, 4, 2)}, 256: {16: (16, 8, 1)}}
TILES = {
    80: {
        2: {
            64: _BY_D_64,
            128: {16: (64, 4, 3), 64: (64, 8, 3), 128: (32, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
    # With four warps, two programs share a multiprocessor, and no two warps compute the same scores.
    90: {
        2: {
            64: _BY_D_64,
            # Masks of a padded head need registers.
            127: {16: (64, 4, 3), 64: (64, 8, 3)},
            128: {16: (64, 4, 3), 64: (32, 4, 3), 128: (64, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
    # Here the accumulators are in tensor memory and pass through registers to be scaled: four warps would spill them.
    100: {
        2: {
            64: _BY_D_64,
            127: {16: (64, 4, 3), 64: (32, 8, 3)},
            128: {16: (64, 4, 3), 64: (64, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
}


def configuration(D: int, rows: int, mode: int, dtype: torch.dtype, arch: int = 90) -> dict[str, object]:
    """Block shapes for a head of `D` numbers.

    Args:
        D: numbers of a head.
        rows: query rows: new tokens times heads of the group.
        mode: which new tokens are visible, of `MODES`.
        dtype: dtype of queries, keys and values.
        arch: compute capability, such as 90; one that is not in `TILES` takes the blocks of the next lower.
    """
    table = TILES[max((known for known in TILES if known <= arch), default=min(TILES))]
    tiles = next(tiles for width, tiles in table[dtype.itemsize].items() if width >= D)
    block = next((m for m in tiles if m >= rows), max(tiles))
    block_n, warps, stages = tiles[block]
    return {
        "MODE": mode,
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "BLOCK_M": block,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


def merge_configuration(D: int, leaves: int) -> dict[str, object]:
    """Block shapes of the merge: one program per query row.

    Args:
        D: numbers of a head.
        leaves: 1 where a partial sum is over a leaf, 0 where it is over a span.
    """
    return {
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "LEAVES": leaves,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }


# From this many query rows on, their blocks alone fill the device, and partial sums would take most of the memory.
MANY_ROWS = 1024


def split_prefix(programs: int, rows: int, T: int, least: int, multiprocessors: int) -> tuple[int, int]:
    """Slots of the prefix that one program reads (0: a leaf of its row), and the number of such splits.

    A program reads a span where spans fill the device, else a leaf, and all slots for many query rows.

    Args:
        programs: programs per split: B · G · blocks of query rows.
        rows: query rows: new tokens times heads of the group.
        T: slots of the cache.
        least: slots of the smallest leaf.
        multiprocessors: multiprocessors of the device.
    """
    if rows >= MANY_ROWS:
        return SPAN * max(1, -(-T // SPAN)), 1
    spans = max(1, -(-T // SPAN))
    if 4 * programs * spans >= 3 * multiprocessors:
        return SPAN, spans
    # The largest number of leaves that a row of up to T slots can have.
    return 0, max(min(MAX_PARTS, -(-T // least)), -(-T // LEAF), 1)


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
def _block(b_q, b_k, b_v, m_mn, factor, b_m, b_l, b_acc):
    """Adds a block of keys and values to the running softmax."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * factor
    b_score = tl.where(m_mn, b_score, -float("inf"))
    b_high = tl.maximum(b_m, tl.max(b_score, 1))
    b_old = _weight(b_high, b_m)
    b_p = _weight(b_high[:, None], b_score)
    b_l = b_l * b_old + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="tf32x3")
    return b_high, b_l, b_acc


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
@triton.jit(do_not_specialize=["G", "S", "T", "R", "span", "least"])
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
    scale,
    G,
    S,
    T,
    R,
    span,
    least,
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
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), T).to(tl.int32)
    leaf = _leaf(length, least)
    if LEAVES:
        span = leaf
    start = i_t * span
    # The first split includes the new tokens, so it runs for every row.
    if (start < length) | (i_t == 0):
        factor = scale * LOG2_E

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
                b_l += 1.0
                b_acc = tl.load(p_v + o_v, mask=m_md, other=0.0).to(tl.float32)
            else:
                if MODE == _MASKED:
                    b_mask = tl.load(p_ancestors + i_b * S + o_s, mask=m_m, other=0)
                    last = S
                else:
                    last = tl.minimum(S, (i_m * BLOCK_M + BLOCK_M - 1) // R + 1)
                for first in range(0, last, BLOCK_N):
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
                    b_m, b_l, b_acc = _block(b_q, b_k, b_v, m_mn, factor, b_m, b_l, b_acc)

        p_k_cache += i_b * k_cache_b + i_g * k_cache_h
        p_v_cache += i_b * v_cache_b + i_g * v_cache_h
        if not LEAVES:
            b_m_all = tl.full([BLOCK_M], -float("inf"), tl.float32)
            b_l_all = tl.zeros([BLOCK_M], tl.float32)
            b_acc_all = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(start, tl.minimum(start + span, length), BLOCK_N):
            # Two nested ifs: LEAVES is resolved at compile time.
            if not LEAVES:  # noqa: SIM102
                if (first > start) & (first % leaf == 0):
                    b_m_all, b_l_all, b_acc_all = _fold(b_m_all, b_l_all, b_acc_all, b_m, b_l, b_acc, True)
                    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
                    b_l = tl.zeros([BLOCK_M], tl.float32)
                    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            o_t = first + o_n
            # Slots past the length may contain NaN: they are not loaded.
            m_t = o_t < length
            m_td = m_t[:, None] & m_d[None, :]
            o_t64 = o_t.to(tl.int64)[:, None]
            b_k = tl.load(p_k_cache + o_t64 * k_cache_s + o_d[None, :], mask=m_td, other=0.0)
            b_v = tl.load(p_v_cache + o_t64 * v_cache_s + o_d[None, :], mask=m_td, other=0.0)
            b_m, b_l, b_acc = _block(b_q, b_k, b_v, m_t[None, :], factor, b_m, b_l, b_acc)
        if not LEAVES:
            b_m, b_l, b_acc = _fold(b_m_all, b_l_all, b_acc_all, b_m, b_l, b_acc, True)

        o_out = i_b * out_b + (i_g * R + o_r) * out_h + o_s64 * out_s
        if splits == 1:
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
                    b_out = _quotient(b_acc, b_l[:, None])
                    tl.store(
                        p_out + o_out[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_md
                    )


@triton.jit(do_not_specialize=["G", "S", "T", "R", "span", "least", "splits"])
def tree_attention_merge_kernel(
    p_acc,
    p_m,
    p_l,
    p_lengths,
    p_out,
    G,
    S,
    T,
    R,
    span,
    least,
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
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), T).to(tl.int32)
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
) -> torch.Tensor:
    if window or softcap or sinks is not None:
        raise RGTGError("tree_attention: its Triton kernel takes no window, softcap or sinks yet")
    B, H, S, D = q.shape
    G, T = k_cache.shape[1:3]
    R = H // G
    out = outputs(q)
    if out.numel() == 0:
        return out
    q, k, v, k_cache, v_cache = dense(q), dense(k), dense(v), dense(k_cache), dense(v_cache)
    lengths = lengths.contiguous()
    mode = CAUSAL if causal else ALONE if ancestors is None else MASKED
    settings = configuration(D, S * R, mode, q.dtype, architecture(q.device))
    programs = B * G * triton.cdiv(S * R, settings["BLOCK_M"])
    least = least_leaf(settings["BLOCK_M"])
    span, splits = split_prefix(programs, S * R, T, least, multiprocessors(q.device))
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
            scale,
            G,
            S,
            T,
            R,
            span,
            least,
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
                out,
                G,
                S,
                T,
                R,
                span,
                least,
                splits,
                *out.stride()[:3],
                **merge_configuration(D, leaves),
            )
    return out
