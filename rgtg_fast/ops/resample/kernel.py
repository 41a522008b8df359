"""Triton kernel of resample: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from . import outputs

# Candidates of a block and its warps: the usual k in one warp, without a barrier; a vocabulary at 16 candidates per
# thread.
BLOCKS = {64: 1, 512: 4, 4096: 8}


def configuration(K: int) -> dict[str, object]:
    """Block shapes for K candidates."""
    block = next((n for n in BLOCKS if n >= K), max(BLOCKS))
    # Products and sums are rounded separately, as in the reference.
    return {"BLOCK": block, "num_warps": BLOCKS[block], "enable_fp_fusion": False}


@triton.jit
def _gumbel(seed, position, first, BLOCK: tl.constexpr):
    """Gumbel noise of the candidates first to first + BLOCK − 1; first is a multiple of 4."""
    o_4 = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    b_zero = tl.zeros([BLOCK // 4], tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_4, b_zero + low, b_zero + high, b_zero)
    # Candidate j takes word j mod 4.
    b_bits = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BLOCK])
    b_v = tl.minimum((b_bits.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    b_w = 1.0 - b_v
    b_one = b_w == 1.0
    b_rest = tl.where(b_one, 1.0, 1.0 - b_w)
    b_e = tl.where(b_one, b_v, tl.div_rn(-tl.log(b_w) * b_v, b_rest))
    return -tl.log(b_e)


@triton.jit
def _scores(p_logprobs, p_rewards, beta, first, K, BLOCK: tl.constexpr):
    """Scores of a block of candidates; −inf where there is none or it is excluded."""
    o_k = first + tl.arange(0, BLOCK)
    m_k = o_k < K
    b_logprob = tl.load(p_logprobs + o_k, mask=m_k, other=-float("inf")).to(tl.float32)
    # A row with β = 0 does not read its rewards, whatever they contain.
    m_reward = o_k < tl.where(beta != 0, K, 0)
    b_reward = tl.load(p_rewards + o_k, mask=m_reward, other=0.0).to(tl.float32)
    b_score = b_logprob + beta * b_reward
    b_score = tl.where((b_logprob == -float("inf")) & (b_reward == b_reward), -float("inf"), b_score)
    return tl.where(beta == 0, b_logprob, b_score)


@triton.jit
def draw_candidate(p_logprobs, p_rewards, beta, tau, seed, position, K, BLOCK: tl.constexpr):
    """A row's choice and its log-probability; -1 and NaN where it has no distribution."""
    best = tl.full((), -float("inf"), tl.float32)
    undefined = tl.full((), 0, tl.int32)
    for first in range(0, K, BLOCK):
        b_score = _scores(p_logprobs, p_rewards, beta, first, K, BLOCK)
        # The maximum may ignore NaN, so NaN is counted.
        undefined += tl.sum((b_score != b_score).to(tl.int32), 0)
        best = tl.maximum(best, tl.max(b_score, 0))
    finite = (best > -float("inf")) & (best < float("inf"))
    defined = (undefined == 0) & finite & (tau >= 0) & (tau < float("inf"))

    greedy = tau == 0
    divisor = tl.where(greedy, 1.0, tau)
    winner = tl.full((), -float("inf"), tl.float32)
    choice = tl.full((), 0, tl.int32)
    chosen = tl.full((), 0.0, tl.float32)
    l_sum = tl.full((), 0.0, tl.float32)
    for first in range(0, K, BLOCK):
        b_score = _scores(p_logprobs, p_rewards, beta, first, K, BLOCK)
        # Differences first: the best candidate is at 0 for every temperature, however small.
        b_scaled = tl.div_rn(b_score - best, tl.zeros_like(b_score) + divisor)
        b_noisy = b_scaled
        if tau > 0:
            b_noisy += _gumbel(seed, position, first, BLOCK)
        l_sum += tl.sum(tl.exp(b_scaled), 0)
        top = tl.max(b_noisy, 0)
        # An earlier block keeps a tie.
        if top > winner:
            winner = top
            here = tl.argmax(b_noisy, 0)
            choice = first + here
            chosen = tl.sum(tl.where(tl.arange(0, BLOCK) == here, b_scaled, 0.0), 0)
    logprob = tl.where(greedy, 0.0, chosen - tl.log(l_sum))
    return tl.where(defined, choice, -1).to(tl.int64), tl.where(defined, logprob, float("nan"))


@triton.jit
def resample_kernel(
    p_logprobs,
    p_rewards,
    p_beta,
    p_temperature,
    p_seed,
    p_position,
    p_choice,
    p_logprob,
    K,
    stride_logprobs,
    stride_rewards,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    beta, tau = tl.load(p_beta + i_b), tl.load(p_temperature + i_b)
    seed, position = tl.load(p_seed + i_b), tl.load(p_position + i_b)
    choice, logprob = draw_candidate(
        p_logprobs + i_b * stride_logprobs,
        p_rewards + i_b * stride_rewards,
        beta,
        tau,
        seed,
        position,
        K,
        BLOCK,
    )
    tl.store(p_choice + i_b, choice)
    tl.store(p_logprob + i_b, logprob)


def launch(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, K = logprobs.shape
    logprobs, rewards = dense(logprobs), dense(rewards)
    choice, chosen_logprob = outputs(logprobs)
    if B == 0:
        return choice, chosen_logprob
    with on_device(logprobs):
        resample_kernel[(B,)](
            logprobs,
            rewards,
            beta.contiguous(),
            temperature.contiguous(),
            seed.contiguous(),
            position.contiguous(),
            choice,
            chosen_logprob,
            K,
            logprobs.stride(0),
            rewards.stride(0),
            **configuration(K),
        )
    return choice, chosen_logprob
