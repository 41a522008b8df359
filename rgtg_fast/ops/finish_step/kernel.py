"""Triton kernel of finish_step: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from . import NO_CANDIDATE, OK, outputs

# Candidates of a block, with their warps.
BLOCKS = {64: 1, 4096: 8}


def configuration(K: int) -> dict[str, object]:
    """Block shape for K candidates."""
    block = next((n for n in BLOCKS if n >= K), max(BLOCKS))
    return {"BLOCK": block, "num_warps": BLOCKS[block]}


IS_OK, HAS_NO_CANDIDATE = tl.constexpr(OK), tl.constexpr(NO_CANDIDATE)


# Sizes that change from call to call must not compile the kernel anew when they happen to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["B", "K", "Z", "stride_logprobs", "stride_rewards", "stride_candidates"])
def finish_step_kernel(
    p_logprobs,
    p_rewards,
    p_candidates,
    p_choice,
    p_chosen_logprob,
    p_tokens,
    p_position,
    p_limit,
    p_widths,
    p_eos,
    p_decision,
    p_accepted,
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
        # NaN compares as not below infinity.
        bad = tl.minimum(bad, tl.min(tl.where(b_r < float("inf"), K, o_k), 0))
    error_code = tl.where(choice < 0, HAS_NO_CANDIDATE, IS_OK).to(tl.int64)
    error_code = tl.where(bad < K, tl.load(p_candidates + bad, mask=bad < K, other=0), error_code)

    ends = position + 1 >= tl.load(p_limit + i_b)
    for first in range(0, Z, 16):
        o_e = first + tl.arange(0, 16)
        b_eos = tl.load(p_eos + o_e, mask=o_e < Z, other=-1)
        ends = ends | (tl.max((b_eos == token).to(tl.int32), 0) != 0)

    p_decision += i_b
    tl.store(p_decision, token.to(tl.float64))
    tl.store(p_decision + B, tl.load(p_logprobs + i_b * stride_logprobs + at).to(tl.float64))
    tl.store(p_decision + 2 * B, tl.load(p_rewards + at).to(tl.float64))
    tl.store(p_decision + 3 * B, tl.load(p_chosen_logprob + i_b).to(tl.float64))
    tl.store(p_decision + 4 * B, error_code.to(tl.float64))
    tl.store(p_accepted + i_b, tl.where(newest < 0, -1, choice))
    tl.store(p_tokens + i_b, tl.where(ends | (newest < 0), -1, token))
    tl.store(p_position + i_b, position + 1)


def launch(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    candidates: torch.Tensor,
    choice: torch.Tensor,
    chosen_logprob: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    limit: torch.Tensor,
    widths: torch.Tensor | None,
    eos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, K = logprobs.shape
    logprobs, rewards, candidates = dense(logprobs), dense(rewards), dense(candidates)
    decision, accepted = outputs(logprobs)
    if B == 0:
        return decision, accepted
    with on_device(logprobs):
        finish_step_kernel[(B,)](
            logprobs,
            rewards,
            candidates,
            choice.contiguous(),
            chosen_logprob.contiguous(),
            tokens,
            position,
            limit.contiguous(),
            None if widths is None else widths.contiguous(),
            eos.contiguous(),
            decision,
            accepted,
            B,
            K,
            len(eos),
            logprobs.stride(0),
            rewards.stride(0),
            candidates.stride(0),
            **configuration(K),
        )
    return decision, accepted
