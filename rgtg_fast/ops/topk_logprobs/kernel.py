"""Triton kernels of topk_logprobs: segments of the vocabulary, then one program per row that merges them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from .launch import key_bits, merge_configuration, segment_configuration


@triton.jit
def _ordered(b_x, bits):
    """The leading bits of a key that orders floats as unsigned integers: −inf first, NaN last, −0 equal to 0."""
    b_i = tl.where(b_x == 0, 0.0, b_x).to(tl.int32, bitcast=True)
    b_i = tl.where(b_i < 0, ~b_i, b_i | -0x80000000)
    b_i = tl.where(b_x != b_x, -1, b_i)
    return b_i.to(tl.uint32, bitcast=True) >> (32 - bits).to(tl.uint32)


@triton.jit
def _chosen(b_key, k, bits):
    """Mask of the k largest keys, the first of equal ones first, and their places when packed in order."""
    # The k-th largest key is found bit by bit from the top: the largest number that k keys reach.
    threshold = tl.full((), 0, tl.uint32)
    reached = tl.full((), b_key.shape[0], tl.int32)
    bit = bits - 1
    while (bit >= 0) & (reached != k):
        candidate = threshold | (tl.full((), 1, tl.uint32) << bit.to(tl.uint32))
        count = tl.sum((b_key >= candidate).to(tl.int32), 0)
        threshold = tl.where(count >= k, candidate, threshold)
        reached = tl.where(count >= k, count, reached)
        bit -= 1
    b_above = (b_key > threshold).to(tl.int32)
    b_equal = (b_key == threshold).to(tl.int32)
    b_first = tl.cumsum(b_equal, 0) <= k - tl.sum(b_above, 0)
    b_chosen = (b_above != 0) | ((b_equal != 0) & b_first)
    return b_chosen, tl.cumsum(b_chosen.to(tl.int32), 0) - 1


# What changes from call to call must not compile the kernel anew when they happen to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["k", "bits"])
def segment_kernel(
    p_logits,
    p_guidance,
    p_beta,
    p_keys,
    p_tokens,
    p_statistics,
    V,
    k,
    bits,
    stride_logits,
    stride_guidance,
    SEGMENT: tl.constexpr,
):
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_s * SEGMENT + tl.arange(0, SEGMENT)
    m_v = o_v < V
    b_x = tl.load(p_logits + i_b * stride_logits + o_v, mask=m_v, other=-float("inf")).to(tl.float32)

    i_part = i_b * tl.num_programs(1) + i_s
    peak = tl.max(b_x, 0)
    b_d = b_x - tl.where(peak == -float("inf"), 0.0, peak)
    b_e = tl.exp(b_d)
    tl.store(p_statistics + i_part * 3, peak)
    tl.store(p_statistics + i_part * 3 + 1, tl.sum(b_e, 0))
    tl.store(p_statistics + i_part * 3 + 2, tl.sum(tl.where(b_e == 0, 0.0, b_e * b_d), 0))

    b_score = b_x
    if p_guidance is not None:
        beta = tl.load(p_beta + i_b)
        # A row with β = 0 does not even read its guidance.
        m_guided = o_v < tl.where(beta != 0, V, 0)
        b_g = tl.load(p_guidance + i_b * stride_guidance + o_v, mask=m_guided, other=0.0)
        b_score = tl.where(m_guided, b_x + beta * b_g, b_x)
    # Nothing that stands for no token is chosen before a token: tokens have keys above 0.
    b_key = tl.where(m_v, _ordered(b_score, bits), 0)
    b_chosen, o_c = _chosen(b_key, k, bits)
    p_keys += i_part * k
    p_tokens += i_part * k
    tl.store(p_keys + o_c, b_key.to(tl.int32, bitcast=True), mask=b_chosen)
    tl.store(p_tokens + o_c, o_v, mask=b_chosen)


@triton.jit(do_not_specialize=["segments", "k", "bits"])
def merge_kernel(
    p_logits,
    p_keys,
    p_tokens,
    p_statistics,
    p_best_key,
    p_best_place,
    p_logprobs,
    p_chosen,
    p_entropy,
    segments,
    k,
    bits,
    stride_logits,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)

    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < segments
    p_part = p_statistics + (i_b * segments + o_s) * 3
    b_peak = tl.load(p_part, mask=m_s, other=-float("inf"))
    b_total = tl.load(p_part + 1, mask=m_s, other=0.0)
    b_weighted = tl.load(p_part + 2, mask=m_s, other=0.0)
    peak = tl.max(b_peak, 0)
    b_shift = b_peak - peak
    b_w = tl.exp(b_shift)
    total = tl.sum(b_w * b_total, 0)
    weighted = tl.sum(tl.where(b_w == 0, 0.0, b_w * (b_weighted + b_total * b_shift)), 0)
    log_total = tl.log(total)
    tl.store(p_entropy + i_b, log_total - weighted / total)

    # Candidates lie in the order of their tokens: the first of equal ones is the lowest token.
    candidates = segments * k
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < candidates
    o_row = i_b * candidates
    b_key = tl.load(p_keys + o_row + o_c, mask=m_c, other=0).to(tl.uint32, bitcast=True)
    b_chosen, o_k = _chosen(b_key, k, bits)
    # Packed by way of memory, in the same order.
    p_best_key += i_b * k
    p_best_place += i_b * k
    tl.store(p_best_key + o_k, b_key.to(tl.int32, bitcast=True), mask=b_chosen)
    tl.store(p_best_place + o_k, o_c, mask=b_chosen)
    tl.debug_barrier()

    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < k
    b_best = tl.load(p_best_key + o_k, mask=m_k, other=0).to(tl.uint32, bitcast=True)
    b_rank = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, k, 16):
        o_j = start + tl.arange(0, 16)
        b_other = tl.load(p_best_key + o_j, mask=o_j < k, other=0).to(tl.uint32, bitcast=True)
        m_before = b_other[None, :] > b_best[:, None]
        m_tie = (b_other[None, :] == b_best[:, None]) & (o_j[None, :] < o_k[:, None])
        b_rank += tl.sum((m_before | m_tie).to(tl.int32), 1)
    o_c = tl.load(p_best_place + o_k, mask=m_k, other=0)
    b_token = tl.load(p_tokens + o_row + o_c, mask=m_k, other=0).to(tl.int64)
    b_x = tl.load(p_logits + i_b * stride_logits + b_token, mask=m_k, other=0.0).to(tl.float32)
    tl.store(p_chosen + i_b * k + b_rank, b_token, mask=m_k)
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
    settings = segment_configuration(V, k)
    segments = triton.cdiv(V, settings["SEGMENT"])
    bits = key_bits(logits.dtype, guidance is not None)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=logits.device)

    keys, tokens = empty(B, segments, k, dtype=torch.int32), empty(B, segments, k, dtype=torch.int32)
    best_key, best_place = empty(B, k, dtype=torch.int32), empty(B, k, dtype=torch.int32)
    chosen = empty(B, k, dtype=torch.int64)
    statistics, logprobs, entropy = empty(B, segments, 3), empty(B, k), empty(B)
    if B == 0:
        return logprobs, chosen, entropy
    with on_device(logits):
        segment_kernel[(B, segments)](
            logits,
            guidance,
            beta,
            keys,
            tokens,
            statistics,
            V,
            k,
            bits,
            logits.stride(0),
            0 if guidance is None else guidance.stride(0),
            **settings,
        )
        merge_kernel[(B,)](
            logits,
            keys,
            tokens,
            statistics,
            best_key,
            best_place,
            logprobs,
            chosen,
            entropy,
            segments,
            k,
            bits,
            logits.stride(0),
            **merge_configuration(segments * k, k),
        )
    return logprobs, chosen, entropy
