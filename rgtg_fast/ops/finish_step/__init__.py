"""Op finish_step: writes a step's decision where the next step reads it, and packs it for the host."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["NO_CANDIDATE", "OK", "finish_step", "reference"]

# Values of `error_code` that are not a token.
OK, NO_CANDIDATE = -1, -2


def reference(
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
    at = choice.clamp_min(0).unsqueeze(-1)
    token = candidates.gather(-1, at)  # [B, 1]
    bad = ~(rewards < torch.inf)  # NaN, or an infinity that no other candidate could outweigh
    if widths is not None:
        bad &= torch.arange(bad.shape[1], device=bad.device) < widths.unsqueeze(-1)
    found, first = bad.to(torch.uint8).max(-1, keepdim=True)
    none = torch.where(choice < 0, NO_CANDIDATE, OK).unsqueeze(-1)
    error_code = torch.where(found > 0, candidates.gather(-1, first), none)
    parts = (token, logprobs.gather(-1, at), rewards.gather(-1, at), chosen_logprob.unsqueeze(-1), error_code)
    decision = torch.stack([part.squeeze(-1).to(torch.float64) for part in parts])
    ended = tokens < 0
    accepted = choice.masked_fill(ended, -1)
    ends = (token == eos).any(-1) | (position + 1 >= limit)
    position.add_(1)
    tokens.copy_(token.squeeze(-1).masked_fill(ends | ended, -1))
    return decision, accepted


def outputs(logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Decision and accepted, not yet filled."""
    B, device = logprobs.shape[0], logprobs.device
    decision = torch.empty((5, B), dtype=torch.float64, device=device)
    return decision, torch.empty((B,), dtype=torch.int64, device=device)


def check(logprobs: torch.Tensor, choice: torch.Tensor) -> None:
    """Refuses choices that are not a candidate."""
    K = logprobs.shape[1]
    for row, chosen in enumerate(choice.tolist()):
        if not -1 <= chosen < K:
            raise RGTGError(
                f"finish_step: choice[{row}]={chosen} is not a candidate (K={K}): use -1 to {K - 1}"
            )


register(
    reference,
    outputs,
    name="finish_step",
    check=check,
    writes=("tokens", "position"),
    triton_dtypes=frozenset(DTYPE_CODES),
)


def finish_step(
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
    """Ends a decoding step: the chosen tokens become the newest, rows end, and the host gets one small tensor.

        accepted    = choice, or −1 where tokens[b] < 0: a row that has ended does not change
        tokens[b]   = candidates[b, choice[b]], or −1 where that ends the row or it had ended
        position[b] += 1

    A row ends at a token of `eos`, or when `position + 1` reaches its limit. A choice of −1 stands for candidate 0.

    Args:
        logprobs: `[B, K]`, log-probabilities of the candidates, any floating dtype.
        rewards: `[B, K]`, rewards of the candidates, same dtype.
        candidates: `[B, K]` int64, tokens of the candidates.
        choice: `[B]` int64, index of the chosen candidate, or −1, from `resample`.
        chosen_logprob: `[B]`, its log-probability after guidance, from `resample`, any floating dtype.
        tokens: `[B]` int64, each row's newest token, −1 where the row has ended; written in place.
        position: `[B]` int64, index of the answer token that this step decides; written in place.
        limit: `[B]` int64, answer tokens at which a row ends.
        widths: `[B]` int64, number of candidates of each row; None: all K.
        eos: `[Z]` int64, tokens that end a row.

    Returns:
        decision: `[5, B]` float64: token, log-probability and reward of the chosen candidate, chosen_logprob, and the
            row's error code: the first candidate whose reward is NaN or +inf, else `NO_CANDIDATE` (−2) where choice is
            −1, else `OK` (−1).
        accepted: `[B]` int64, the choice to commit to the caches.

    Raises:
        RGTGError: shapes or dtypes do not fit, or, on the CPU, a choice is below −1 or not below K.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import finish_step
        >>> scores, candidates, one = torch.zeros(1, 2), torch.tensor([[7, 9]]), torch.tensor([1])
        >>> tokens, position = torch.tensor([5]), torch.tensor([0])
        >>> decision, accepted = finish_step(
        ...     scores, scores, candidates, one, torch.zeros(1), tokens, position, 8 * one, None, torch.tensor([2])
        ... )
        >>> decision.T, accepted, tokens, position
        (tensor([[ 9.,  0.,  0.,  0., -1.]], dtype=torch.float64), tensor([1]), tensor([9]), tensor([1]))
    """
    op = "finish_step"
    if logprobs.ndim != 2 or logprobs.shape[1] == 0:
        raise RGTGError(f"{op}: logprobs has shape {list(logprobs.shape)}: use [B, K] with K >= 1")
    for name, x in (("logprobs", logprobs), ("chosen_logprob", chosen_logprob)):
        _checks.floating(op, name, x)
    B, K = logprobs.shape
    for name, x in (("rewards", rewards), ("candidates", candidates)):
        _checks.shaped(op, name, x, "[B, K]", (B, K))
    _checks.of_dtype(op, "rewards", rewards, logprobs.dtype)
    _checks.shaped(op, "chosen_logprob", chosen_logprob, "[B]", (B,))
    rows = {"choice": choice, "tokens": tokens, "position": position, "limit": limit}
    if widths is not None:
        rows["widths"] = widths
    for name, x in rows.items():
        _checks.shaped(op, name, x, "[B]", (B,))
    if eos.ndim != 1:
        raise RGTGError(f"{op}: eos has shape {list(eos.shape)}: use [Z]")
    for name, x in {**rows, "candidates": candidates, "eos": eos}.items():
        _checks.of_dtype(op, name, x, torch.int64)
    for name, x in (("tokens", tokens), ("position", position)):
        if not x.is_contiguous():
            raise RGTGError(f"{op}: {name} is written in place: it must be contiguous")
    _checks.together(
        op, logprobs, rewards=rewards, candidates=candidates, chosen_logprob=chosen_logprob, eos=eos, **rows
    )
    return torch.ops.rgtg_fast.finish_step(
        logprobs, rewards, candidates, choice, chosen_logprob, tokens, position, limit, widths, eos
    )
