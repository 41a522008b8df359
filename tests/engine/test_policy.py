"""The sampled distribution is the policy of the papers, exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward
from tests.conftest import make_lm, make_rm

V = 12  # toy vocabulary; token 1 ends a text
PROMPT = [3, 7, 5]


def _decoder(
    dtype: torch.dtype = torch.float32, engine: str = "auto", max_batch: int = 64
) -> RewardGuidedDecoder:
    lm = make_lm(vocab_size=V, dtype=dtype, initializer_range=0.15)
    rm = make_rm(vocab_size=V, dtype=dtype)
    return RewardGuidedDecoder.from_pretrained(
        (lm, None), reward=SequenceReward((rm, None)), dtype=dtype, max_batch=max_batch, engine=engine
    )


@torch.inference_mode()
def _policy(
    decoder: RewardGuidedDecoder, prefix: list[int], k: int, beta: float, temperature: float
) -> torch.Tensor:
    """softmax over the top k of (log π + β r)/τ, from the models' own uncached forwards. Zeros elsewhere. [V]"""
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    logprobs, tokens = (
        lm(torch.tensor([prefix]), use_cache=False).logits[0, -1].double().log_softmax(-1).topk(k)
    )
    texts = torch.tensor([[*prefix, token] for token in tokens.tolist()])
    rewards = rm.score(rm.base_model(texts, use_cache=False).last_hidden_state[:, -1]).squeeze(-1).double()
    policy = torch.zeros(V, dtype=torch.float64)
    policy[tokens] = ((logprobs + beta * rewards) / temperature).softmax(-1)
    return policy


def _pair_policy(
    decoder: RewardGuidedDecoder, k: int, beta: float, temperature: float
) -> dict[tuple[int, ...], float]:
    """Probability of every answer of two tokens; an end-of-sequence token ends it after one."""
    first = _policy(decoder, PROMPT, k, beta, temperature)
    out: dict[tuple[int, ...], float] = {}
    for token in range(V):
        if first[token] == 0:
            continue
        if token == 1:
            out[()] = float(first[token])
            continue
        second = _policy(decoder, [*PROMPT, token], k, beta, temperature)
        for following in range(V):
            key = (token,) if following == 1 else (token, following)
            if second[following] > 0:
                out[key] = float(first[token] * second[following])
    return out


@pytest.mark.parametrize(("k", "beta", "temperature"), [(5, 1.3, 1.0), (V, -0.7, 1.6)])
def test_two_token_answers_in_a_batch_follow_the_enumerated_policy(
    k: int, beta: float, temperature: float
) -> None:
    draws = 20_000
    decoder = _decoder()
    expected = _pair_policy(decoder, k, beta, temperature)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    result = decoder.generate(
        [PROMPT] * draws,
        max_new_tokens=2,
        guidance=Guidance(k=k, beta=beta, temperature=temperature),
        seed=list(range(draws)),
    )
    seen = dict.fromkeys(expected, 0)
    for row in result:
        seen[tuple(row.tokens)] += 1  # a key outside the support fails here
    _assert_chi_square(np.array(list(seen.values())), np.array(list(expected.values())) * draws)


@pytest.mark.parametrize("draws", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_single_row_follows_the_enumerated_policy(draws: int) -> None:
    """One row at a time; the seeds are the only thing that differs."""
    decoder = _decoder(max_batch=1)
    guidance = Guidance(k=6, beta=1.0)
    expected = _policy(decoder, PROMPT, 6, 1.0, 1.0).numpy()
    counts = np.zeros(V)
    result = decoder.generate([PROMPT] * draws, 1, guidance, seed=list(range(draws)))
    for row in result:
        counts[row.tokens[0] if row.tokens else 1] += 1
    assert counts[expected == 0].sum() == 0
    _assert_chi_square(counts[expected > 0], expected[expected > 0] * draws)


def _assert_chi_square(seen: np.ndarray, expected: np.ndarray) -> None:
    rare = expected < 5  # pooled, as the test's approximation asks
    if rare.any():
        seen = np.append(seen[~rare], seen[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, len(seen) - 1) > 1e-3


def test_ratio_of_two_policies() -> None:
    """PARGS' identity, in fp64: π(y_i | x, y_<i) ∝ π_i(y_{1:i}) / π_{i-1}(y_{1:i-1}), π_i ∝ π e^{β r}."""
    decoder = _decoder(torch.float64)
    beta = 1.5
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model

    def joint(length: int) -> dict[tuple[int, ...], torch.Tensor]:
        """π_i over all answers of a length, normalised by enumeration."""
        answers = list(itertools.product(range(V), repeat=length))
        texts = torch.tensor([[*PROMPT, *answer] for answer in answers])
        with torch.inference_mode():
            logprobs = lm(texts, use_cache=False).logits.log_softmax(-1)
            base = sum(
                logprobs[torch.arange(len(answers)), len(PROMPT) - 1 + i, texts[:, len(PROMPT) + i]]
                for i in range(length)
            )
            reward = rm.score(rm.base_model(texts, use_cache=False).last_hidden_state[:, -1]).squeeze(-1)
        weights = (base + beta * reward).softmax(0)
        return dict(zip(answers, weights, strict=True))

    shorter, longer = joint(1), joint(2)
    for token in (0, 4, 9):
        traced = decoder.generate(
            [[*PROMPT, token]], 1, Guidance(k=V, beta=beta, temperature=1.0), seed=token, trace=True
        )[0].trace[0]
        ours = torch.zeros(V, dtype=torch.float64)
        for candidate in traced.candidates:
            ours[candidate.token] = candidate.probability
        ratio = torch.stack([longer[token, v] / shorter[token,] for v in range(V)])
        assert (ours - ratio / ratio.sum()).abs().max() < 1e-10


def test_equal_rewards_and_beta_zero_are_the_base_model() -> None:
    lm = make_lm(vocab_size=V)
    constant = RewardGuidedDecoder.from_pretrained(
        (lm, None), reward=lambda prefix, ids: torch.full(ids.shape, 2.5)
    )
    plain = RewardGuidedDecoder.from_pretrained((lm, None))
    guided = _decoder()
    for temperature in (0, 1.0):
        settings = {"max_new_tokens": 12, "seed": 5}
        expected = plain.generate([PROMPT], guidance=Guidance(k=6, temperature=temperature), **settings)[
            0
        ].tokens
        equal = constant.generate([PROMPT], guidance=Guidance(k=6, temperature=temperature), **settings)[
            0
        ].tokens
        assert equal == expected
    guided_lm = guided.lm.runner.model
    plain = RewardGuidedDecoder.from_pretrained((guided_lm, None))
    for temperature in (0, 1.0):
        zero = guided.generate([PROMPT], 12, Guidance(k=6, beta=0, temperature=temperature), seed=3)[0]
        assert (
            zero.tokens
            == plain.generate([PROMPT], 12, Guidance(k=6, temperature=temperature), seed=3)[0].tokens
        )
        assert zero.rewards


@pytest.mark.parametrize("beta", [0.0, 1.3])
def test_the_log_probability_of_an_answer_is_that_of_the_enumerated_policy(beta: float) -> None:
    k, temperature = 9, 1.5
    decoder = _decoder(torch.float64)
    expected = _pair_policy(decoder, k, beta, temperature)
    base = _pair_policy(decoder, V, 0.0, 1.0)
    guidance = Guidance(k=k, beta=beta, temperature=temperature)
    rows = decoder.generate([PROMPT] * 300, 2, guidance, seed=list(range(300)))
    assert any(row.finish_reason == "eos" for row in rows)
    for row in rows:
        assert row.guided_logprob == pytest.approx(np.log(expected[tuple(row.tokens)]), abs=1e-6)
        assert row.base_logprob == pytest.approx(np.log(base[tuple(row.tokens)]), abs=1e-6)


def test_a_strategy_knows_no_log_probability_of_its_own() -> None:
    decoder = _decoder()
    for row in decoder.generate([PROMPT] * 3, 4, strategy="best_of_n:n=3"):
        assert row.guided_logprob is None
        assert row.base_logprob < 0
    for row in decoder.generate([PROMPT] * 3, 4, strategy="segment:target=1"):
        assert row.guided_logprob is None
    assert all(row.guided_logprob == 0 for row in decoder.generate([PROMPT], 4, Guidance(temperature=0)))
