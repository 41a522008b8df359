"""The formulas of the guides, candidate by candidate, without a cache. What the decoder must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

# r(prompt ids of the base model, answer so far, candidate) -> reward
Formula = Callable[[list[int], list[int], int], float]


def logits_after(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The vocabulary head's output [V] after a text, from one uncached forward."""
    return _logits_after(model, tuple(ids))


# Every candidate of a step asks for the same text again.
@lru_cache(maxsize=4096)
@torch.inference_mode()
def _logits_after(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()


@torch.inference_mode()
def scalar(model: Any, ids: Sequence[int]) -> float:
    """The one-label head's output at the last token of a text."""
    hidden = model.base_model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0, -1]
    return float(model.score(hidden).squeeze())


def sequence(model: Any) -> Formula:
    return lambda prompt, answer, token: scalar(model, [*prompt, *answer, token])


def rad(model: Any, invert: bool = False) -> Formula:
    def formula(prompt: list[int], answer: list[int], token: int) -> float:
        clamped = min(max(scalar(model, [*prompt, *answer, token]), 0.0), 1.0)
        return 1 - clamped if invert else clamped

    return formula


def farma(model: Any) -> Formula:
    return lambda prompt, answer, token: float(logits_after(model, [*prompt, *answer])[token])


def genarm(model: Any) -> Formula:
    return lambda prompt, answer, token: float(logits_after(model, [*prompt, *answer]).log_softmax(-1)[token])


def log_ratio(tuned: Any, untuned: Any) -> Formula:
    return lambda prompt, answer, token: (
        genarm(tuned)(prompt, answer, token) - genarm(untuned)(prompt, answer, token)
    )


def mixture(*terms: tuple[float, Formula]) -> Formula:
    return lambda prompt, answer, token: sum(w * formula(prompt, answer, token) for w, formula in terms)


def guided(
    lm: Any,
    formula: Formula,
    prompt: list[int],
    k: int,
    beta: float,
    support: str,
    steps: int,
    eos: int | None,
) -> tuple[list[int], list[float]]:
    """Greedy guided decoding: tokens, and the reward of each choice (the end-of-sequence token's too)."""
    answer: list[int] = []
    rewards: list[float] = []
    while len(answer) < steps:
        logprobs = logits_after(lm, [*prompt, *answer]).log_softmax(-1)
        tokens = range(len(logprobs)) if support != "lm" else logprobs.topk(k).indices.tolist()
        values = {token: formula(prompt, answer, token) for token in tokens}
        scores = {token: float(logprobs[token]) + beta * value for token, value in values.items()}
        # Within a support by combined score, as within the whole vocabulary, the greedy choice is its maximum.
        token = max(scores, key=scores.__getitem__)
        rewards.append(values[token])
        if token == eos:
            break
        answer.append(token)
    return answer, rewards
