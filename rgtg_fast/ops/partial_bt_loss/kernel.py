"""Triton kernels of partial_bt_loss: one program per pair, then one that sums the pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import on_device
from . import MODES, WEIGHTS, outputs

# Prefixes of a block: an answer of a few hundred tokens takes one or two.
BLOCK = 256
# Pairs of a block when their sums are added up.
SUM_BLOCK = 1024


def pair_configuration(mode: str, weight: str) -> dict[str, object]:
    """Constants of the kernel of one pair."""
    return {
        "MODE": MODES.index(mode),
        "PAIR": WEIGHTS.index(weight),
        "BLOCK": BLOCK,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def sum_configuration() -> dict[str, object]:
    """Constants of the kernel that adds up the pairs."""
    return {"BLOCK": SUM_BLOCK, "num_warps": 4, "enable_fp_fusion": False}


EOS, TRUNCATE = tl.constexpr(MODES.index("eos")), tl.constexpr(MODES.index("truncate"))


@triton.jit
def _terms(b_chosen, b_rejected, MODE: tl.constexpr):
    """Number of terms of pairs with answers of these lengths."""
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
    # The normalizer. Every program counts the terms of all pairs itself: exact in integers, a few reads from the
    # cache, and no program waits for another.
    if p_normalizer is not None:
        normalizer = tl.load(p_normalizer)
    elif PAIR:
        normalizer = N.to(tl.float32)
    else:
        count = tl.full((), 0, tl.int64)
        for pairs in range(0, N, BLOCK):
            o_p = pairs + tl.arange(0, BLOCK)
            m_p = o_p < N
            b_start = tl.load(p_offsets + 2 * o_p, mask=m_p, other=0)
            b_middle = tl.load(p_offsets + 2 * o_p + 1, mask=m_p, other=0)
            b_end = tl.load(p_offsets + 2 * o_p + 2, mask=m_p, other=0)
            count += tl.sum(_terms(b_middle - b_start, b_end - b_middle, MODE), 0)
        normalizer = count.to(tl.float32)

    start = tl.load(p_offsets + 2 * i_p)
    middle = tl.load(p_offsets + 2 * i_p + 1)
    end = tl.load(p_offsets + 2 * i_p + 2)
    chosen, rejected = middle - start, end - middle
    # The host has not checked the offsets: invalid ones give NaN and no access to memory.
    # Offsets are compared, because a difference of two may overflow.
    valid = (start >= 0) & (start < middle) & (middle < end) & (end <= M)
    valid = valid & ((i_p > 0) | (start == 0)) & ((i_p < N - 1) | (end == M))
    if MODE == EOS:
        valid = valid & (chosen == rejected)
    if valid:
        n = _terms(chosen, rejected, MODE)
        share = 1.0 / normalizer
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
            # The last reward of an answer sums the slopes of all terms that it appears in.
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
    loss, gradient = outputs(rewards)
    sums = torch.empty((N,), dtype=torch.float32, device=rewards.device)
    with on_device(rewards):
        if N > 0:
            pair_kernel[(N,)](
                rewards, offsets, normalizer, sums, gradient, M, N, **pair_configuration(mode, weight)
            )
        sum_kernel[(1,)](sums, loss, N, **sum_configuration())
    return loss, gradient
