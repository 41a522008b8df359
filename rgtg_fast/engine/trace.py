"""Why a token was chosen: what the device works out for a trace, and what the host writes down."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rgtg_fast.engine.batch import Row, SlotState
from rgtg_fast.engine.outputs import Candidate, Step
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.ops import resample


class Seen(NamedTuple):
    """Tensors of a traced step: candidates and their numbers [B, k]; choice, the base model's choice, entropy [B]."""

    logprobs: torch.Tensor
    candidates: torch.Tensor
    rewards: torch.Tensor
    probability: torch.Tensor
    choice: torch.Tensor
    base: torch.Tensor
    entropy: torch.Tensor


def seen(
    now: SlotState,
    beta: torch.Tensor,
    logprobs: torch.Tensor,
    candidates: torch.Tensor,
    rewards: torch.Tensor,
    choice: torch.Tensor,
    entropy: torch.Tensor,
) -> Seen:
    """The candidates' probabilities after guidance, and what the base model alone draws by the same noise."""
    temperature = now.temperature.unsqueeze(-1)
    score = logprobs + torch.where(beta.unsqueeze(-1) == 0, 0, beta.unsqueeze(-1) * rewards)
    # A row without a finite score has no choice (-1), and nothing to be shown.
    at = torch.arange(logprobs.shape[-1], device=choice.device)
    greedy = (at == choice.unsqueeze(-1)).to(score.dtype)
    sampled = (score / temperature.clamp_min(torch.finfo(score.dtype).tiny)).softmax(-1)
    probability = torch.where(temperature == 0, greedy, sampled)
    none = torch.zeros_like(rewards)
    base, _ = resample(logprobs, none, beta * 0, now.temperature, now.seed, now.position)
    return Seen(logprobs, candidates, rewards, probability, choice, base, entropy)


def write_trace(rows: list[tuple[int, Row, bool]], step: Seen, lm: LanguageModel) -> None:
    """Appends a step to each row's trace.

    Args:
        rows: slot, row, and whether the step was guided. step: on the host.
    """
    for slot, row, guided in rows:
        shown = range(step.logprobs.shape[-1])
        if row.guidance.support == "all":
            width = min(row.guidance.k, step.logprobs.shape[-1])
            shown = step.probability[slot].topk(width).indices.tolist()
        chosen, token = int(step.choice[slot]), int(step.candidates[slot, step.choice[slot]])
        listed = []
        for at in list(shown)[: row.guidance.k]:
            candidate = int(step.candidates[slot, at])
            listed.append(
                Candidate(
                    candidate,
                    lm.token_text(candidate),
                    float(step.logprobs[slot, at]),
                    float(step.rewards[slot, at]) if guided else None,
                    float(step.probability[slot, at]),
                    at == chosen,
                )
            )
        base_token = int(step.candidates[slot, step.base[slot]])
        row.trace.append(
            Step(
                len(row.answer),
                token,
                lm.token_text(token),
                float(step.entropy[slot]),
                base_token,
                listed,
            )
        )
