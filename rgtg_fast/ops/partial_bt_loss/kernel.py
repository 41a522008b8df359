"""Triton kernels of partial_bt_loss: one program per pair, then one that adds the pairs up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import on_device
from .launch import pair_configuration, sum_configuration

EOS = tl.constexpr(0)
TRUNCATE = tl.constexpr(2)


@triton.jit
def _terms(b_chosen, b_rejected, MODE: tl.constexpr):
    """Terms of pairs with answers of these lengths."""
    if MODE == TRUNCATE:
        return tl.minimum(b_chosen, b_rejected)
    else:
        return tl.maximum(b_chosen, b_rejected)


@triton.jit(do_not_specialize=["M", "N"])
def pair_kernel(
    p_rewards,
    p_offsets,
    p_normalizer,
    p_sums,
    p_gradient,
    M,
    N,
    MODE: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_p = tl.program_id(0)
    # What the sum is divided by. Every program counts the terms of all pairs for itself: whole numbers, a few reads
    # from the cache, and no program waits for another.
    if p_normalizer is not None:
        total = tl.load(p_normalizer)
    elif PAIR:
        total = N.to(tl.float32)
    else:
        count = tl.full((), 0, tl.int64)
        for pairs in range(0, N, BLOCK):
            o_p = pairs + tl.arange(0, BLOCK)
            m_p = o_p < N
            b_start = tl.load(p_offsets + 2 * o_p, mask=m_p, other=0)
            b_middle = tl.load(p_offsets + 2 * o_p + 1, mask=m_p, other=0)
            b_end = tl.load(p_offsets + 2 * o_p + 2, mask=m_p, other=0)
            count += tl.sum(_terms(b_middle - b_start, b_end - b_middle, MODE), 0)
        total = count.to(tl.float32)

    start = tl.load(p_offsets + 2 * i_p)
    middle = tl.load(p_offsets + 2 * i_p + 1)
    end = tl.load(p_offsets + 2 * i_p + 2)
    chosen, rejected = middle - start, end - middle
    # Nobody has looked at the offsets on the host: what does not fit gives NaN and touches nothing.
    # Offsets are compared, since a difference of any two may overflow.
    legal = (start >= 0) & (start < middle) & (middle < end) & (end <= M)
    legal = legal & ((i_p > 0) | (start == 0)) & ((i_p < N - 1) | (end == M))
    if MODE == EOS:
        legal = legal & (chosen == rejected)
    if legal:
        n = _terms(chosen, rejected, MODE)
        share = 1.0 / total
        if PAIR:
            share = tl.div_rn(share, n.to(tl.float32))
        b_sum = tl.zeros([BLOCK], tl.float32)
        b_last_w = tl.zeros([BLOCK], tl.float32)
        b_last_l = tl.zeros([BLOCK], tl.float32)
        for first in range(0, tl.maximum(chosen, rejected), BLOCK):
            o_i = first + tl.arange(0, BLOCK).to(tl.int64)
            m_i = o_i < n
            o_w, o_l = start + tl.minimum(o_i, chosen - 1), middle + tl.minimum(o_i, rejected - 1)
            b_w = tl.load(p_rewards + o_w, mask=m_i, other=0.0).to(tl.float32)
            b_l = tl.load(p_rewards + o_l, mask=m_i, other=0.0).to(tl.float32)
            b_margin = b_w - b_l
            b_e = tl.exp(-tl.abs(b_margin))
            # log(1 + e), corrected for the rounding of the sum.
            b_one = 1.0 + b_e
            b_small = b_one == 1.0
            b_log = tl.div_rn(tl.log(b_one) * b_e, tl.where(b_small, 1.0, b_one - 1.0))
            b_term = tl.where(b_margin < 0, -b_margin, 0.0) + tl.where(b_small, b_e, b_log)
            b_sum += tl.where(m_i, b_term, 0.0)
            b_slope = share * tl.div_rn(tl.where(b_margin >= 0, b_e, 1.0), b_one)
            b_slope = tl.where(m_i, b_slope, 0.0)
            # The last reward of an answer collects the slopes of all terms that it stands in.
            tl.store(p_gradient + start + o_i, -b_slope, mask=o_i < chosen - 1)
            tl.store(p_gradient + middle + o_i, b_slope, mask=o_i < rejected - 1)
            b_last_w += tl.where(o_i >= chosen - 1, b_slope, 0.0)
            b_last_l += tl.where(o_i >= rejected - 1, b_slope, 0.0)
        tl.store(p_gradient + middle - 1, -tl.sum(b_last_w, 0))
        tl.store(p_gradient + end - 1, tl.sum(b_last_l, 0))
        tl.store(p_sums + i_p, share * tl.sum(b_sum, 0))
    else:
        tl.store(p_sums + i_p, float("nan"))


@triton.jit(do_not_specialize=["N"])
def sum_kernel(p_sums, p_loss, N, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        o_p = first + tl.arange(0, BLOCK)
        b_sum += tl.load(p_sums + o_p, mask=o_p < N, other=0.0)
    tl.store(p_loss, tl.sum(b_sum, 0))


def launch(
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    mode: str,
    weight: str,
    normalizer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = rewards.shape[0], offsets.shape[0] // 2
    rewards, offsets = rewards.contiguous(), offsets.contiguous()
    loss = torch.empty((), dtype=torch.float32, device=rewards.device)
    gradient = torch.empty((M,), dtype=torch.float32, device=rewards.device)
    sums = torch.empty((N,), dtype=torch.float32, device=rewards.device)
    with on_device(rewards):
        if N > 0:
            pair_kernel[(N,)](
                rewards, offsets, normalizer, sums, gradient, M, N, **pair_configuration(mode, weight)
            )
        sum_kernel[(1,)](sums, loss, N, **sum_configuration())
    return loss, gradient
