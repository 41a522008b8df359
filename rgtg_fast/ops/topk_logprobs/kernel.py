"""Triton kernels of topk_logprobs: one for segments of the vocabulary, one that selects the best k of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device, power_of_two
from . import MAX_K, SEGMENTS, outputs, segment_of

# Leading bits of a float32 that can differ between scores: 16-bit numbers need no more steps than they have bits.
KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}


def key_bits(dtype: torch.dtype, guided: bool) -> int:
    """Number of bits that order the scores of logits of this dtype."""
    return 32 if guided else KEY_BITS[dtype]


def segment_configuration(V: int) -> dict[str, object]:
    """Constants of the segment kernel: a warp for 1024 logits, 32 per thread; a single warp needs no barrier."""
    segment = segment_of(V)
    return {
        "SEGMENT": segment,
        "GROUP": SEGMENTS[segment],
        "num_warps": segment // 1024,
        "enable_fp_fusion": False,
    }


# Best segments, groups and tokens that a row may keep: a limit somewhat above k ends the search for them early.
SELECTED = (16, 64, 128, MAX_K)


def merge_configuration(V: int, k: int) -> dict[str, object]:
    """Constants of the merge kernel, which finds the k best of a row."""
    segment = segment_of(V)
    group = SEGMENTS[segment]
    block = next(n for n in SELECTED if k <= n)
    # 16 entries per thread: few registers, and for small k one warp, without barriers.
    warps = block * max(group, segment // group) // 512
    return {
        "SEGMENT": segment,
        "GROUP": group,
        "BLOCK_S": power_of_two(-(-V // segment), 128),
        "BLOCK_K": block,
        "THREADS": 32 * warps,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }


# The key of an entry that is not a token, below all others.
NOTHING: tl.constexpr = tl.constexpr(-(1 << 31))
# With powers of 2 instead of e, the exponential is one instruction.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Below this, 2^x is 0 in float32, and so is x · 2^x, even where x was −inf.
FLOOR: tl.constexpr = tl.constexpr(-160.0)


@triton.jit
def _ordered(b_x, bits):
    """The leading bits of a key that orders floats as signed integers: −inf first, NaN last, −0 equal to 0."""
    b_i = tl.where(b_x == 0, 0.0, b_x).to(tl.int32, bitcast=True)
    b_i = b_i ^ ((b_i >> 31) & 0x7FFFFFFF)
    return tl.where(b_x != b_x, 0x7FFFFFFF, b_i) >> (32 - bits)


@triton.jit
def _score(b_x, p_guidance, beta, o_v, V):
    """The score that orders tokens. A row with β = 0 does not read its guidance."""
    m_guided = o_v < tl.where(beta != 0, V, 0)
    b_g = tl.load(p_guidance + o_v, mask=m_guided, other=0.0)
    return tl.where(m_guided, b_x + beta * b_g, b_x)


@triton.jit
def _larger_of_pairs(b_x):
    """The larger of every two neighbors, NaN where one of them is."""
    b_a, b_b = tl.split(tl.reshape(b_x, [b_x.numel // 2, 2]))
    return tl.maximum(b_a, b_b, propagate_nan=tl.PropagateNan.ALL)


# Without this, a value that happens to be 1 or a multiple of 16 would compile the kernel again.
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
    # Logits that a thread has loaded together are compared as floats, and only their maxima become keys.
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
        m = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        m = tl.max(b_x, 0)
    b_d = (b_x - tl.where(m == -float("inf"), 0.0, m)) * LOG2_E
    b_d = tl.maximum(b_d, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    b_e = tl.exp2(b_d)
    tl.store(p_statistics + i_part * 3, m)
    tl.store(p_statistics + i_part * 3 + 1, tl.sum(b_e, 0))
    tl.store(p_statistics + i_part * 3 + 2, tl.sum(b_e * b_d, 0))


@triton.jit
def _count(b_mask):
    return tl.sum(b_mask.to(tl.int32), 0)


@triton.jit
def _select(b_key, b_id, ids, low, high, k, CAPACITY: tl.constexpr):
    """Selects at most CAPACITY entries that contain the k best: the largest keys, of equal keys the lowest ids.

    At least k keys are >= `low`, none is > `high`, and ids are below `ids`; of fewer than k tokens all are selected.
    Returns the mask, its number of entries, and a threshold >= `low` that k keys reach.
    """
    count = _count(b_key >= low)
    # Bisects the range of the k-th largest key, until few enough entries are left or the key is known.
    while (count > CAPACITY) & (low < high):
        middle = (low | high) - ((low ^ high) >> 1)
        reached = _count(b_key >= middle)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        count = tl.where(enough, reached, count)
    b_selected = b_key >= low
    if count > CAPACITY:
        # More equal keys than fit: take those with the lowest ids.
        b_above = b_key > low
        b_equal = b_key == low
        above = _count(b_above)
        first, last = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32) + ids
        count = above
        while (count < k) & (first < last):
            middle = (first | last) - ((first ^ last) >> 1)
            reached = above + _count(b_equal & (b_id <= middle))
            fits = reached <= CAPACITY
            first = tl.where(fits, middle, first)
            last = tl.where(fits, last, middle - 1)
            count = tl.where(fits, reached, count)
        b_selected = b_above | (b_equal & (b_id <= first))
    return b_selected, count, low


@triton.jit
def _packed_positions(b_mask, THREADS: tl.constexpr):
    """Position of each entry of a mask after packing: in order within a thread, thread after thread."""
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
    p_tokens,
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
    # Threads exchange their selections through memory: segments, groups, then tokens with keys and logits.
    p_segment = p_picks + i_b * (5 * BLOCK_K)
    p_group = p_segment + BLOCK_K
    p_token, p_key, p_x = p_segment + 2 * BLOCK_K, p_segment + 3 * BLOCK_K, p_segment + 4 * BLOCK_K

    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < segments
    b_key = tl.load(p_segment_keys + i_b * segments + o_s, mask=m_s, other=NOTHING)
    p_part = p_statistics + (i_b * segments + o_s) * 3
    b_m = tl.load(p_part, mask=m_s, other=-float("inf"))
    b_l = tl.load(p_part + 1, mask=m_s, other=0.0)
    b_acc = tl.load(p_part + 2, mask=m_s, other=0.0)

    # The k best tokens are in the k best segments, and there in the k best groups.
    high = tl.max(b_key, 0)
    low = tl.min(tl.where(m_s, b_key, high), 0)
    # Fewer than k segments give no bound on the k-th best token.
    low = tl.where(segments < k, (NOTHING >> (32 - bits)) + 1, low)
    b_selected, count, low = _select(b_key, o_s, segments, low, high, k, BLOCK_K)
    tl.store(p_segment + _packed_positions(b_selected, THREADS), o_s, mask=b_selected)
    tl.debug_barrier()

    # The compiler cannot tell where these masks end, so it gives neighbors to neighboring threads: then the threads
    # that have loaded an entry store it.
    o_g = tl.arange(0, BLOCK_K * GROUPS)
    m_g = o_g <= count * GROUPS - 1
    b_group = tl.load(p_segment + o_g // GROUPS, mask=m_g, other=0) * GROUPS + o_g % GROUPS
    m_g &= b_group * GROUP < V
    b_key = tl.load(p_group_keys + b_group, mask=m_g, other=NOTHING)
    if (segments < k) & (tl.cdiv(V, GROUP) >= k):
        low = tl.min(tl.where(m_g, b_key, high), 0)
    b_selected, count, low = _select(b_key, b_group, segments * GROUPS, low, high, k, BLOCK_K)
    tl.store(p_group + _packed_positions(b_selected, THREADS), b_group, mask=b_selected)
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
    b_selected, count, low = _select(b_key, b_token, V, low, high, k, BLOCK_K)
    b_to = _packed_positions(b_selected, THREADS)
    tl.store(p_token + b_to, b_token, mask=b_selected)
    tl.store(p_key + b_to, b_key, mask=b_selected)
    tl.store(p_x + b_to, b_x.to(tl.int32, bitcast=True), mask=b_selected)

    m = tl.max(b_m, 0)
    b_shift = b_m - m
    b_w = tl.exp(b_shift)
    l_sum = tl.sum(b_w * b_l, 0)
    acc = tl.sum(tl.where(b_w == 0, 0.0, b_w * (b_acc * LN_2 + b_l * b_shift)), 0)
    log_l = tl.log(l_sum)
    tl.store(p_entropy + i_b, log_l - acc / l_sum)
    tl.debug_barrier()

    # The rank of a token is the number of tokens with a larger key, or an equal key and a lower id.
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
    tl.store(p_tokens + i_b * k + b_rank, b_token.to(tl.int64), mask=m_k)
    tl.store(p_logprobs + i_b * k + b_rank, (b_x - m) - log_l, mask=m_k)


def launch(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None,
    beta: torch.Tensor | None,
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
    statistics = empty(B, segments, 3)
    logprobs, tokens, entropy = outputs(logits, k)
    if B == 0:
        return logprobs, tokens, entropy
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
            tokens,
            entropy,
            V,
            segments,
            k,
            bits,
            logits.stride(0),
            0 if guidance is None else guidance.stride(0),
            **merge,
        )
    return logprobs, tokens, entropy
