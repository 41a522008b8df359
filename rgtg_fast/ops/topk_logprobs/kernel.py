"""Triton kernels of topk_logprobs: segments of the vocabulary, then one program per row that descends to the best."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from .launch import key_bits, merge_configuration, segment_configuration

# The key of what is no token, below all others.
NOTHING: tl.constexpr = tl.constexpr(-(1 << 31))
# With powers of 2 instead of e, the exponential is one instruction.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# 2^x is 0 in float32 from here down, and so is x · 2^x, even where x was −inf.
FLOOR: tl.constexpr = tl.constexpr(-160.0)


@triton.jit
def _ordered(b_x, bits):
    """The leading bits of a key that orders floats as signed integers: −inf first, NaN last, −0 equal to 0."""
    b_i = tl.where(b_x == 0, 0.0, b_x).to(tl.int32, bitcast=True)
    b_i = b_i ^ ((b_i >> 31) & 0x7FFFFFFF)
    return tl.where(b_x != b_x, 0x7FFFFFFF, b_i) >> (32 - bits)


@triton.jit
def _score(b_x, p_guidance, beta, o_v, V):
    """What tokens are ordered by. A row with β = 0 does not even read its guidance."""
    m_guided = o_v < tl.where(beta != 0, V, 0)
    b_g = tl.load(p_guidance + o_v, mask=m_guided, other=0.0)
    return tl.where(m_guided, b_x + beta * b_g, b_x)


@triton.jit
def _larger_of_pairs(b_x):
    """The larger of every two numbers beside each other, NaN where one of them is."""
    b_a, b_b = tl.split(tl.reshape(b_x, [b_x.numel // 2, 2]))
    return tl.maximum(b_a, b_b, propagate_nan=tl.PropagateNan.ALL)


# What changes from call to call must not compile the kernel anew when it happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["bits"])
def topk_segment_kernel(
    p_logits,
    p_guidance,
    p_beta,
    p_segment_keys,
    p_group_keys,
    p_statistics,
    V,
    bits,
    stride_logits,
    stride_guidance,
    SEGMENT: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_s * SEGMENT + tl.arange(0, SEGMENT)
    b_x = tl.load(p_logits + i_b * stride_logits + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)

    b_score = b_x
    if p_guidance is not None:
        b_score = _score(b_x, p_guidance + i_b * stride_guidance, tl.load(p_beta + i_b), o_v, V)
    # Those that a thread has loaded at once are compared as floats: they become keys only then.
    b_top = _larger_of_pairs(_larger_of_pairs(b_score))
    if p_logits.dtype.element_ty.primitive_bitwidth == 16:
        b_top = _larger_of_pairs(b_top)
    b_key = _ordered(b_top, 32)
    b_key = tl.max(tl.reshape(b_key, [SEGMENT // GROUP, b_key.numel // (SEGMENT // GROUP)]), 1)
    top = tl.max(b_key, 0)
    i_part = i_b * tl.num_programs(1) + i_s
    o_g = tl.arange(0, SEGMENT // GROUP)
    tl.store(p_group_keys + i_part * (SEGMENT // GROUP) + o_g, b_key >> (32 - bits))
    tl.store(p_segment_keys + i_part, top >> (32 - bits))

    if p_guidance is None:
        peak = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        peak = tl.max(b_x, 0)
    b_d = (b_x - tl.where(peak == -float("inf"), 0.0, peak)) * LOG2_E
    b_d = tl.maximum(b_d, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    b_e = tl.exp2(b_d)
    tl.store(p_statistics + i_part * 3, peak)
    tl.store(p_statistics + i_part * 3 + 1, tl.sum(b_e, 0))
    tl.store(p_statistics + i_part * 3 + 2, tl.sum(b_e * b_d, 0))


@triton.jit
def _count(b_mask):
    return tl.sum(b_mask.to(tl.int32), 0)


@triton.jit
def _chosen(b_key, b_id, ids, low, high, k, ROOM: tl.constexpr):
    """Mask of at most ROOM entries, the k best among them: the largest keys, the lowest of `ids` ids of equal ones.

    k keys or more reach `low`, none exceeds `high`; of fewer than k that are tokens all are chosen. Returns the mask,
    the number of entries in it, and a threshold at least as high as `low` that k keys reach.
    """
    count = _count(b_key >= low)
    # Halves the range of the k-th largest key, until few enough are left or it is known.
    while (count > ROOM) & (low < high):
        middle = (low | high) - ((low ^ high) >> 1)
        reached = _count(b_key >= middle)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        count = tl.where(enough, reached, count)
    b_chosen = b_key >= low
    if count > ROOM:
        # More equal ones than there is room for: those with the lowest ids.
        b_above = b_key > low
        b_equal = b_key == low
        above = _count(b_above)
        first, last = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32) + ids
        count = above
        while (count < k) & (first < last):
            middle = (first | last) - ((first ^ last) >> 1)
            reached = above + _count(b_equal & (b_id <= middle))
            fits = reached <= ROOM
            first = tl.where(fits, middle, first)
            last = tl.where(fits, last, middle - 1)
            count = tl.where(fits, reached, count)
        b_chosen = b_above | (b_equal & (b_id <= first))
    return b_chosen, count, low


@triton.jit
def _places(b_mask, THREADS: tl.constexpr):
    """Places of the entries of a mask when they are packed: in order within a thread, thread after thread."""
    ROW: tl.constexpr = THREADS if b_mask.numel >= THREADS else b_mask.numel
    b_i = tl.reshape(b_mask.to(tl.int32), [b_mask.numel // ROW, ROW])
    b_before = tl.cumsum(tl.sum(b_i, 0), 0) - tl.sum(b_i, 0)
    return tl.reshape(tl.cumsum(b_i, 0) - b_i + b_before[None, :], [b_mask.numel])


@triton.jit(do_not_specialize=["segments", "k", "bits"])
def topk_merge_kernel(
    p_logits,
    p_guidance,
    p_beta,
    p_segment_keys,
    p_group_keys,
    p_statistics,
    p_picks,
    p_logprobs,
    p_chosen,
    p_entropy,
    V,
    segments,
    k,
    bits,
    stride_logits,
    stride_guidance,
    SEGMENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    THREADS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = SEGMENT // GROUP
    p_logits += i_b * stride_logits
    p_group_keys += i_b * segments * GROUPS
    # What a thread hands to others goes by way of memory: segments, groups, then tokens with keys and logits.
    p_segment = p_picks + i_b * (5 * BLOCK_K)
    p_group = p_segment + BLOCK_K
    p_token, p_key, p_x = p_segment + 2 * BLOCK_K, p_segment + 3 * BLOCK_K, p_segment + 4 * BLOCK_K

    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < segments
    b_key = tl.load(p_segment_keys + i_b * segments + o_s, mask=m_s, other=NOTHING)
    p_part = p_statistics + (i_b * segments + o_s) * 3
    b_peak = tl.load(p_part, mask=m_s, other=-float("inf"))
    b_total = tl.load(p_part + 1, mask=m_s, other=0.0)
    b_weighted = tl.load(p_part + 2, mask=m_s, other=0.0)

    # The k best tokens are in the k best segments, and in those in the k best groups.
    high = tl.max(b_key, 0)
    low = tl.min(tl.where(m_s, b_key, high), 0)
    # Fewer than k segments say nothing of the k-th best token.
    low = tl.where(segments < k, (NOTHING >> (32 - bits)) + 1, low)
    b_chosen, count, low = _chosen(b_key, o_s, segments, low, high, k, BLOCK_K)
    tl.store(p_segment + _places(b_chosen, THREADS), o_s, mask=b_chosen)
    tl.debug_barrier()

    # Masks that end anywhere, as far as the compiler can tell, leave neighbours to neighbouring threads: then what is
    # stored is in the threads that have loaded it.
    o_g = tl.arange(0, BLOCK_K * GROUPS)
    m_g = o_g <= count * GROUPS - 1
    b_group = tl.load(p_segment + o_g // GROUPS, mask=m_g, other=0) * GROUPS + o_g % GROUPS
    m_g &= b_group * GROUP < V
    b_key = tl.load(p_group_keys + b_group, mask=m_g, other=NOTHING)
    if (segments < k) & (tl.cdiv(V, GROUP) >= k):
        low = tl.min(tl.where(m_g, b_key, high), 0)
    b_chosen, count, low = _chosen(b_key, b_group, segments * GROUPS, low, high, k, BLOCK_K)
    tl.store(p_group + _places(b_chosen, THREADS), b_group, mask=b_chosen)
    tl.debug_barrier()

    o_v = tl.arange(0, BLOCK_K * GROUP)
    m_v = o_v <= count * GROUP - 1
    b_token = tl.load(p_group + o_v // GROUP, mask=m_v, other=0) * GROUP + o_v % GROUP
    m_v &= b_token < V
    b_x = tl.load(p_logits + b_token, mask=m_v, other=0.0).to(tl.float32)
    b_score = b_x
    if p_guidance is not None:
        b_score = _score(b_x, p_guidance + i_b * stride_guidance, tl.load(p_beta + i_b), b_token, V)
    b_key = tl.where(m_v, _ordered(b_score, bits), NOTHING)
    b_chosen, count, low = _chosen(b_key, b_token, V, low, high, k, BLOCK_K)
    b_place = _places(b_chosen, THREADS)
    tl.store(p_token + b_place, b_token, mask=b_chosen)
    tl.store(p_key + b_place, b_key, mask=b_chosen)
    tl.store(p_x + b_place, b_x.to(tl.int32, bitcast=True), mask=b_chosen)

    peak = tl.max(b_peak, 0)
    b_shift = b_peak - peak
    b_w = tl.exp(b_shift)
    total = tl.sum(b_w * b_total, 0)
    weighted = tl.sum(tl.where(b_w == 0, 0.0, b_w * (b_weighted * LN_2 + b_total * b_shift)), 0)
    log_total = tl.log(total)
    tl.store(p_entropy + i_b, log_total - weighted / total)
    tl.debug_barrier()

    # The rank of a token is the number of those before it: of larger keys, or of equal ones and lower tokens.
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < count
    b_key = tl.load(p_key + o_k, mask=m_k, other=NOTHING)
    b_token = tl.load(p_token + o_k, mask=m_k, other=0)
    b_x = tl.load(p_x + o_k, mask=m_k, other=0).to(tl.float32, bitcast=True)
    b_rank = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, count, 16):
        o_j = start + tl.arange(0, 16)
        b_other = tl.load(p_key + o_j, mask=o_j < count, other=NOTHING)
        b_lower = tl.load(p_token + o_j, mask=o_j < count, other=0)
        m_before = b_other[:, None] > b_key[None, :]
        m_tie = (b_other[:, None] == b_key[None, :]) & (b_lower[:, None] < b_token[None, :])
        b_rank += tl.sum((m_before | m_tie).to(tl.int32), 0)
    m_k &= b_rank < k
    tl.store(p_chosen + i_b * k + b_rank, b_token.to(tl.int64), mask=m_k)
    tl.store(p_logprobs + i_b * k + b_rank, (b_x - peak) - log_total, mask=m_k)


def launch(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, V = logits.shape
    logits = dense(logits)
    guidance = None if guidance is None else dense(guidance)
    beta = None if beta is None else beta.contiguous()
    settings, merge = segment_configuration(V), merge_configuration(V, k)
    segments = triton.cdiv(V, settings["SEGMENT"])
    groups = settings["SEGMENT"] // settings["GROUP"]
    bits = key_bits(logits.dtype, guidance is not None)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=logits.device)

    segment_keys, group_keys = (
        empty(B, segments, dtype=torch.int32),
        empty(B, segments, groups, dtype=torch.int32),
    )
    picks = empty(B, 5, merge["BLOCK_K"], dtype=torch.int32)
    chosen = empty(B, k, dtype=torch.int64)
    statistics, logprobs, entropy = empty(B, segments, 3), empty(B, k), empty(B)
    if B == 0:
        return logprobs, chosen, entropy
    with on_device(logits):
        topk_segment_kernel[(B, segments)](
            logits,
            guidance,
            beta,
            segment_keys,
            group_keys,
            statistics,
            V,
            bits,
            logits.stride(0),
            0 if guidance is None else guidance.stride(0),
            **settings,
        )
        topk_merge_kernel[(B,)](
            logits,
            guidance,
            beta,
            segment_keys,
            group_keys,
            statistics,
            picks,
            logprobs,
            chosen,
            entropy,
            V,
            segments,
            k,
            bits,
            logits.stride(0),
            0 if guidance is None else guidance.stride(0),
            **merge,
        )
    return logprobs, chosen, entropy
