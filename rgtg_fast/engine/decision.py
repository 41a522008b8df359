"""What a step decides for each row, as the host gets it from `finish_step`."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Decision(NamedTuple):
    """One row's.

    Attributes:
        token, logprob, reward: the chosen candidate's. drawn: its log-probability after guidance.
        fault: a candidate whose reward is NaN or +inf, `NO_CANDIDATE` where no score is finite, else `OK`
            (`rgtg_fast.ops.finish_step`).
    """

    token: int
    logprob: float
    reward: float
    drawn: float
    fault: int


def unpacked(packed: torch.Tensor) -> list[Decision]:
    """The rows' decisions, once they are on the host."""
    return [
        Decision(int(token), logprob, reward, drawn, int(fault))
        for token, logprob, reward, drawn, fault in packed.T.tolist()
    ]
