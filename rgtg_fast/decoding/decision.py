"""What a step decides for each row: written where the next step reads it, and packed for the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rgtg_fast.decoding.batch import SlotState

# What `fault` says where it is no token.
FINE, NO_CANDIDATE = -1, -2


class Decision(NamedTuple):
    """One row's.

    Attributes:
        token, logprob, reward: the chosen candidate's. drawn: its log-probability after guidance.
        fault: a candidate whose reward is NaN or +inf, `NO_CANDIDATE` where no score is finite, else `FINE`.
    """

    token: int
    logprob: float
    reward: float
    drawn: float
    fault: int


def decide(
    now: SlotState,
    logprobs: torch.Tensor,
    candidates: torch.Tensor,
    rewards: torch.Tensor,
    choice: torch.Tensor,
    drawn: torch.Tensor,
    beyond: torch.Tensor | None,
    eos: torch.Tensor,
) -> torch.Tensor:
    """Puts the chosen tokens into the slots, or -1 where a row ends here or has ended before. The host is not asked.

    Args:
        now: [B] each. logprobs, candidates, rewards: [B, k]. choice, drawn: [B], from `resample`.
        beyond: [B, k] bool, candidates that a row does not have, or None. eos: [E] int64, tokens that end a row.

    Returns:
        [5, B] float64, the fields of `Decision` one after another: one copy to the host. Token ids are exact in it.
    """
    at = choice.clamp_min(0).unsqueeze(-1)
    token = candidates.gather(-1, at)
    bad = ~(rewards < torch.inf)  # NaN, or an infinity that would drown every other candidate
    if beyond is not None:
        bad = bad & ~beyond
    found, where = bad.to(torch.uint8).max(-1, keepdim=True)
    none = torch.where(choice < 0, NO_CANDIDATE, FINE).unsqueeze(-1)
    fault = torch.where(found > 0, candidates.gather(-1, where), none)
    parts = (token, logprobs.gather(-1, at), rewards.gather(-1, at), drawn.unsqueeze(-1), fault)
    packed = torch.stack([part.squeeze(-1).to(torch.float64) for part in parts])
    ends = (token == eos).any(-1) | (now.position + 1 >= now.limit)
    now.position.add_(1)
    now.tokens.copy_(token.squeeze(-1).masked_fill(ends | (now.tokens < 0), -1))
    return packed


def unpacked(packed: torch.Tensor) -> list[Decision]:
    """The rows' decisions, once they are on the host."""
    return [
        Decision(int(token), logprob, reward, drawn, int(fault))
        for token, logprob, reward, drawn, fault in packed.T.tolist()
    ]
