"""Triton kernel of advance: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from .launch import configuration
from .reference import NO_CANDIDATE, OK

IS_FINE, HAS_NO_CANDIDATE = tl.constexpr(OK), tl.constexpr(NO_CANDIDATE)


# Sizes that change from call to call must not compile the kernel anew when they happen to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["B", "K", "Z", "stride_logprobs", "stride_rewards", "stride_candidates"])
def finish_step_kernel(
    p_logprobs,
    p_rewards,
    p_candidates,
    p_choice,
    p_drawn,
    p_tokens,
    p_position,
    p_limit,
    p_widths,
    p_eos,
    p_packed,
    p_kept,
    B,
    K,
    Z,
    stride_logprobs,
    stride_rewards,
    stride_candidates,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_candidates += i_b * stride_candidates
    p_rewards += i_b * stride_rewards
    choice, newest, position = tl.load(p_choice + i_b), tl.load(p_tokens + i_b), tl.load(p_position + i_b)
    at = tl.maximum(choice, 0)
    token = tl.load(p_candidates + at)

    width = K
    if p_widths is not None:
        width = tl.minimum(tl.load(p_widths + i_b), K).to(tl.int32)
    bad = K
    for first in range(0, width, BLOCK):
        o_k = first + tl.arange(0, BLOCK)
        b_r = tl.load(p_rewards + o_k, mask=o_k < width, other=0.0).to(tl.float32)
        # NaN is below nothing.
        bad = tl.minimum(bad, tl.min(tl.where(b_r < float("inf"), K, o_k), 0))
    fault = tl.where(choice < 0, HAS_NO_CANDIDATE, IS_FINE).to(tl.int64)
    fault = tl.where(bad < K, tl.load(p_candidates + bad, mask=bad < K, other=0), fault)

    ends = position + 1 >= tl.load(p_limit + i_b)
    for first in range(0, Z, 16):
        o_e = first + tl.arange(0, 16)
        b_eos = tl.load(p_eos + o_e, mask=o_e < Z, other=-1)
        ends = ends | (tl.max((b_eos == token).to(tl.int32), 0) != 0)

    p_packed += i_b
    tl.store(p_packed, token.to(tl.float64))
    tl.store(p_packed + B, tl.load(p_logprobs + i_b * stride_logprobs + at).to(tl.float64))
    tl.store(p_packed + 2 * B, tl.load(p_rewards + at).to(tl.float64))
    tl.store(p_packed + 3 * B, tl.load(p_drawn + i_b).to(tl.float64))
    tl.store(p_packed + 4 * B, fault.to(tl.float64))
    tl.store(p_kept + i_b, tl.where(newest < 0, -1, choice))
    tl.store(p_tokens + i_b, tl.where(ends | (newest < 0), -1, token))
    tl.store(p_position + i_b, position + 1)


def launch(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    candidates: torch.Tensor,
    choice: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    limit: torch.Tensor,
    widths: torch.Tensor | None,
    eos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, K = logprobs.shape
    logprobs, rewards, candidates = dense(logprobs), dense(rewards), dense(candidates)
    packed = torch.empty((5, B), dtype=torch.float64, device=logprobs.device)
    kept = torch.empty((B,), dtype=torch.int64, device=logprobs.device)
    if B == 0:
        return packed, kept
    with on_device(logprobs):
        finish_step_kernel[(B,)](
            logprobs,
            rewards,
            candidates,
            choice.contiguous(),
            drawn.contiguous(),
            tokens,
            position,
            limit.contiguous(),
            None if widths is None else widths.contiguous(),
            eos.contiguous(),
            packed,
            kept,
            B,
            K,
            len(eos),
            logprobs.stride(0),
            rewards.stride(0),
            candidates.stride(0),
            **configuration(K),
        )
    return packed, kept
