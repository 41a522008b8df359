"""Requests that come and go have the rewards that the decoder gives them, bit for bit on a CPU."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    MixtureReward,
    RADReward,
    RequestScorer,
    Reward,
    RewardGuidedDecoder,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.engine.outputs import GeneratedRow
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of

PROMPTS = [*prompts_of(5, seed=3), [7, 8, 9]] + [[7, 8, 9]]
NEW_TOKENS = 7


def _by_last(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
    sums = torch.stack([ids.sum() for ids in prefix_ids]).unsqueeze(1)
    return ((sums * 31 + candidates * 17) % 11).float()


REWARDS: dict[str, Callable[[], Reward]] = {
    "sequence": lambda: SequenceReward((make_rm(1), None)),
    "rad": lambda: RADReward((make_rm(1), None), invert=True),
    "vocabulary": lambda: VocabularyReward((make_lm(2), None)),
    "autoregressive": lambda: AutoregressiveReward((make_lm(2), None)),
    "contrastive": ContrastiveReward,
    "function": lambda: FunctionReward(_by_last),
    "text": lambda: TextReward(
        lambda prompts, answers: [len(p) - 0.1 * len(a) for p, a in zip(prompts, answers)]
    ),
    "mixture": lambda: MixtureReward(
        [SequenceReward((make_rm(1), None)), VocabularyReward((make_lm(2), None)), ContrastiveReward()],
        weights=[1.0, 0.5, -0.3],
    ),
    "windows": lambda: SequenceReward((_windowed(), None)),
}


def _windowed() -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification, MistralConfig

    torch.manual_seed(4)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=5,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.4,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


class Case:
    """Rows that the decoder has made, with every step's candidates and rewards, and a scorer of the same models."""

    def __init__(self, kind: str, slots: int = 4):
        pair = make_lm(0), make_tokenizer()
        decoder = RewardGuidedDecoder.from_pretrained(pair, REWARDS[kind](), max_batch=3)
        self.guidance = [Guidance(k=4 + index % 2, beta=0.7, temperature=0) for index in range(len(PROMPTS))]
        result = decoder.generate(PROMPTS, NEW_TOKENS, self.guidance, trace=True)
        self.rows: list[GeneratedRow] = list(result)
        self.scorer = RequestScorer.from_pretrained(pair, REWARDS[kind](), max_requests=slots, max_length=64)

    def answer(self, row: int) -> list[int]:
        """All decisions of a row, the end of the text included."""
        made = self.rows[row]
        return [*made.tokens, *([] if made.end_token is None else [made.end_token])]

    def check(self, requests: dict[int, int], done: dict[int, int], rows: list[int]) -> None:
        """Scores the next token of rows; `done` tokens of each are decided."""
        traces = [self.rows[row].trace or [] for row in rows]
        steps = [trace[done[row]] for trace, row in zip(traces, rows, strict=True)]
        k = min(len(step.candidates) for step in steps)
        tokens = [[candidate.token for candidate in step.candidates[:k]] for step in steps]
        expected = [[candidate.reward for candidate in step.candidates[:k]] for step in steps]
        found = self.scorer.score([requests[row] for row in rows], torch.tensor(tokens))
        assert found.double().tolist() == torch.tensor(expected, dtype=torch.float64).tolist()


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


def _case(cases: dict[str, Case], kind: str) -> Case:
    if kind not in cases:
        cases[kind] = Case(kind)
    return cases[kind]


def _schedule(case: Case, rng: random.Random) -> None:
    """Random arrivals, scores of random subsets, decisions that were not scored, preemptions and cancellations."""
    requests: dict[int, int] = {}
    done = dict.fromkeys(range(len(case.rows)), 0)
    waiting = rng.sample(range(len(case.rows)), len(case.rows))
    for _ in range(40):
        while waiting and len(requests) < case.scorer.max_requests and rng.random() < 0.7:
            row = waiting.pop()
            requests[row] = case.scorer.add(PROMPTS[row], case.answer(row)[: done[row]])
        chosen = [row for row in requests if rng.random() < 0.7]
        rng.shuffle(chosen)
        if chosen:
            case.check(requests, done, chosen)
        for row in list(requests):
            answer = case.answer(row)
            if rng.random() < (0.9 if row in chosen else 0.2):
                done[row] += 1
            if done[row] >= len(answer):
                case.scorer.drop(requests.pop(row))
            elif (event := rng.random()) < 0.1:
                case.scorer.drop(requests.pop(row))
                if event < 0.07:
                    waiting.insert(0, row)
            else:
                case.scorer.advance(requests[row], answer[: done[row]])
    for request in requests.values():
        case.scorer.drop(request)
    assert len(case.scorer) == 0


@pytest.mark.parametrize("kind", REWARDS)
def test_requests_have_the_decoders_rewards(cases: dict[str, Case], kind: str) -> None:
    for seed in range(3):
        _schedule(_case(cases, kind), random.Random(seed))
