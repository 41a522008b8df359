"""Sparse guidance: the guide speaks only where the base model is undecided, against the algorithm without a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rgtg_fast import (
    ContrastiveReward,
    Guidance,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    VocabularyReward,
)
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of
from tests.rewards.naive import logits_after, scalar

EOS = 1
ENGINES = [("native", torch.float32), ("transformers", torch.float64)]


def decoder_for(
    engine: str = "auto", dtype: torch.dtype = torch.float32, reward: Any = None
) -> RewardGuidedDecoder:
    guide = reward or SequenceReward((make_rm(1, dtype), None))
    return RewardGuidedDecoder.from_pretrained(
        (make_lm(0, dtype), None), reward=guide, engine=engine, max_batch=3
    )


def naive_gate(
    lm: Any, rm: Any, prompt: list[int], k: int, beta: float, gate: float, steps: int
) -> tuple[list[int], list[float]]:
    """Greedy: tokens, and the reward of each decision, NaN where the gate was closed (end-of-sequence included)."""
    answer: list[int] = []
    rewards: list[float] = []
    while len(answer) < steps:
        logprobs = logits_after(lm, prompt + answer).log_softmax(-1)
        entropy = float(torch.special.entr(logprobs.exp()).sum())
        token, reward = int(logprobs.argmax()), math.nan
        if entropy >= gate:
            candidates = logprobs.topk(k).indices.tolist()
            values = {v: scalar(rm, [*prompt, *answer, v]) for v in candidates}
            token = max(candidates, key=lambda v: float(logprobs[v]) + beta * values[v])
            reward = values[token]
        rewards.append(reward)
        if token == EOS:
            break
        answer.append(token)
    return answer, rewards


@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("gate", [0.0, 1.5, 2.5, 3.0, 9.0])
def test_greedy_equals_the_algorithm(gate: float, engine: str, dtype: torch.dtype) -> None:
    """Rows of a batch open their gates at different steps, end, move and are refilled."""
    decoder = decoder_for(engine, dtype)
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    prompts = prompts_of(7, longest=9)
    result = decoder.generate(prompts, 8, Guidance(5, 1.5, 0, gate_entropy=gate))
    guided = decided = 0
    for prompt, row in zip(prompts, result, strict=True):
        tokens, rewards = naive_gate(lm, rm, prompt, 5, 1.5, gate, 8)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=1e-4, nan_ok=True)
        last = None if math.isnan(rewards[-1]) else rewards[-1]
        assert row.reward == (None if last is None else pytest.approx(last, abs=1e-4))
        guided += sum(not math.isnan(reward) for reward in rewards)
        decided += len(rewards)
    assert (result.stats.guided_tokens, result.stats.tokens) == (guided, decided)


def test_the_gates_above_open_and_close() -> None:
    decoder = decoder_for()
    stats = decoder.generate(prompts_of(7, longest=9), 8, Guidance(5, 1.5, 0, gate_entropy=2.5)).stats
    assert 0.1 < stats.guided_tokens / stats.tokens < 0.9


def test_skipped_steps_cost_no_reward_forward() -> None:
    """One row: each run of skipped tokens is caught up with in one chunk, and not after the last guided step."""
    decoder = decoder_for()
    decoder.lm.runner.model.generation_config.eos_token_id = []
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    for seed in range(4):
        (prompt,) = prompts_of(1, seed, longest=9)
        _, rewards = naive_gate(lm, rm, prompt, 5, 1.5, 2.5, 12)
        closed = [math.isnan(reward) for reward in rewards]
        last = max((i for i, skipped in enumerate(closed) if not skipped), default=-1)
        chunks = sum(closed[i - 1] and not closed[i] for i in range(1, last + 1))
        caught_up = sum(closed[: last + 1])
        stats = decoder.generate([prompt], 12, Guidance(5, 1.5, 0, gate_entropy=2.5)).stats
        assert stats.guided_tokens == closed.count(False)
        assert stats.reward_calls == closed.count(False) + chunks
        assert stats.reward_tokens == 5 * closed.count(False) + caught_up
        assert stats.prompt_tokens_reward == len(prompt)
    stats = decoder.generate([prompt], 12, Guidance(5, 1.5, 0, gate_entropy=50)).stats
    assert (stats.reward_calls, stats.reward_tokens, stats.guided_tokens) == (0, 0, 0)


def test_a_closed_gate_is_the_base_model_with_the_same_noise() -> None:
    decoder = decoder_for()
    prompts, seeds = prompts_of(4, seed=6, longest=9), [1, 2, 3, 4]
    closed = decoder.generate(prompts, 8, Guidance(6, 2.0, 0.9, gate_entropy=50), seeds, trace=True)
    base = decoder.generate(prompts, 8, Guidance(6, 0.0, 0.9), seeds)
    assert [row.tokens for row in closed] == [row.tokens for row in base]
    for row in closed:
        for step in row.trace:
            assert step.token == step.base_token
            assert all(candidate.reward is None for candidate in step.candidates)
            assert sum(candidate.probability for candidate in step.candidates) == pytest.approx(1, abs=1e-5)


def test_a_gate_of_one_row_leaves_the_others_alone() -> None:
    decoder = decoder_for()
    prompts = prompts_of(3, seed=2, longest=9)
    gated, plain = Guidance(6, 1.0, 0.9, gate_entropy=2.5), Guidance(6, 1.0, 0.9)
    rows = decoder.generate(prompts, 8, [gated, plain, gated], [5, 6, 7])
    for prompt, guidance, seed, row in zip(prompts, [gated, plain, gated], [5, 6, 7], rows, strict=True):
        alone = decoder.generate([prompt], 8, guidance, seed)[0]
        assert row.tokens == alone.tokens
        assert row.rewards == pytest.approx(alone.rewards, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("gate", [-1, float("nan"), float("inf"), "high"])
def test_gates_that_cannot_be(gate: Any) -> None:
    with pytest.raises(RGTGError, match="gate_entropy="):
        Guidance(gate_entropy=gate)


def test_guides_that_cannot_catch_up() -> None:
    tokenizer = make_tokenizer()
    for reward in (ContrastiveReward("w1", "w2"), VocabularyReward((make_lm(3), tokenizer)), None):
        decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=reward)
        with pytest.raises(RGTGError, match="needs a reward that can catch up with skipped tokens"):
            decoder.generate([9], 2, Guidance(gate_entropy=1.0))
