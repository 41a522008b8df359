"""Triton kernel of score_and_sample: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from ..resample.kernel import BLOCKS, draw_candidate
from . import outputs

# Block of candidates and of numbers of their states: two sums of 32 registers per thread.
BLOCK_C, BLOCK_E = 16, 512
# Smaller blocks for few candidates and for small models.
FEW_C, FEW_E = 4, 128


def configuration(K: int, E: int) -> dict[str, object]:
    """Block shapes for K candidates with states of E numbers."""
    return {
        "BLOCK_C": FEW_C if K <= FEW_C else BLOCK_C,
        "BLOCK_E": FEW_E if E <= FEW_E else BLOCK_E,
        "BLOCK": next((n for n in BLOCKS if n >= K), max(BLOCKS)),
        "num_warps": 8,
        # Resampling rounds products and sums separately, as in the reference.
        "enable_fp_fusion": False,
    }


@triton.jit(do_not_specialize=["K", "stride_logprobs"])
def score_and_sample_kernel(
    p_hidden,
    p_norm,
    p_head,
    p_bias,
    p_logprobs,
    p_beta,
    p_temperature,
    p_seed,
    p_position,
    p_rewards,
    p_choice,
    p_logprob,
    K,
    E,
    eps,
    offset,
    hidden_b,
    hidden_k,
    stride_logprobs,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_hidden += i_b * hidden_b
    p_rewards += i_b * K
    for first in range(0, K, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        m_c = o_c < K
        p_states = p_hidden + o_c.to(tl.int64)[:, None] * hidden_k
        # Squares and products are summed in one pass: the norm's scale factors out of the sum.
        b_squares = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
        b_products = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
        for at in range(0, E, BLOCK_E):
            o_e = at + tl.arange(0, BLOCK_E)
            m_e = o_e < E
            b_x = tl.load(p_states + o_e[None, :], mask=m_c[:, None] & m_e[None, :], other=0.0).to(tl.float32)
            b_norm = tl.load(p_norm + o_e, mask=m_e, other=0.0).to(tl.float32) + offset
            b_head = tl.load(p_head + o_e, mask=m_e, other=0.0).to(tl.float32)
            b_squares += b_x * b_x
            b_products += b_x * (b_norm * b_head)[None, :]
        b_scale = tl.rsqrt(tl.sum(b_squares, 1) / E + eps)
        b_reward = b_scale * tl.sum(b_products, 1)
        if p_bias is not None:
            b_reward += tl.load(p_bias).to(tl.float32)
        tl.store(p_rewards + o_c, b_reward, mask=m_c)
    # Resampling reads what other threads of this program have stored.
    tl.debug_barrier()
    choice, logprob = draw_candidate(
        p_logprobs + i_b * stride_logprobs,
        p_rewards,
        tl.load(p_beta + i_b),
        tl.load(p_temperature + i_b),
        tl.load(p_seed + i_b),
        tl.load(p_position + i_b),
        K,
        BLOCK,
    )
    tl.store(p_choice + i_b, choice)
    tl.store(p_logprob + i_b, logprob)


def launch(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, K, E = hidden.shape
    hidden, logprobs = dense(hidden), dense(logprobs)
    rewards, choice, logprob = outputs(hidden)
    if B == 0:
        return rewards, choice, logprob
    with on_device(hidden):
        score_and_sample_kernel[(B,)](
            hidden,
            norm.contiguous(),
            head.contiguous(),
            bias,
            logprobs,
            beta.contiguous(),
            temperature.contiguous(),
            seed.contiguous(),
            position.contiguous(),
            rewards,
            choice,
            logprob,
            K,
            E,
            eps,
            offset,
            *hidden.stride()[:2],
            logprobs.stride(0),
            **configuration(K, E),
        )
    return rewards, choice, logprob
