"""Best-of-n, segment-level rejection and blockwise best-of-k, against the algorithms written out without a cache."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rgtg_fast import (
    BestOfN,
    Blocks,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    LogRatioReward,
    RADReward,
    RewardGuidedDecoder,
    RewardNaNError,
    RGTGError,
    Segments,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.engine.strategies import named_strategy
from rgtg_fast.engine.strategies.sampler import sample_seed
from rgtg_fast.ops import resample, topk_logprobs
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of
from tests.rewards.naive import logits_after, scalar

EOS = 1
ENGINES = [("native", torch.float32), ("transformers", torch.float64)]


def decoder_for(
    reward: Any = "rm", engine: str = "auto", dtype: torch.dtype = torch.float32, max_batch: int = 3
) -> RewardGuidedDecoder:
    tokenizer = make_tokenizer()
    if reward == "rm":
        reward = SequenceReward((make_rm(1, dtype), tokenizer))
    base = (make_lm(0, dtype), tokenizer)
    return RewardGuidedDecoder.from_pretrained(base, reward=reward, engine=engine, max_batch=max_batch)


class Noise:
    """Draws from π(. | ids) by the counted noise of one seed."""

    def __init__(self, lm: Any, seed: int, temperature: float, top_k: int | None):
        self.lm, self.seed, self.temperature, self.top_k = lm, seed, temperature, top_k
        self.draws = 0

    def __call__(self, ids: list[int]) -> int:
        logits = logits_after(self.lm, ids).unsqueeze(0)
        logprobs, tokens = logits.log_softmax(-1), torch.arange(logits.shape[-1]).unsqueeze(0)
        if self.top_k is not None:
            logprobs, tokens, _ = topk_logprobs(logits, self.top_k)
        choice, _ = resample(
            logprobs,
            torch.zeros_like(logprobs),
            torch.zeros(1),
            torch.tensor([self.temperature]),
            torch.tensor([self.seed]),
            torch.tensor([self.draws]),
        )
        self.draws += 1
        return int(tokens[0, choice[0]])


@dataclass
class Naive:
    """What the algorithm written out gave."""

    tokens: list[int]
    reward: float
    drawn: int = 0
    judged: int = 0
    judged_tokens: int = 0
    rejections: int = 0
    kept_best: int = 0


def ends(answer: list[int], limit: int) -> bool:
    return answer[-1] == EOS or len(answer) == limit


def naive_segments(lm: Any, rm: Any, prompt: list[int], s: Segments, limit: int, seed: int) -> Naive:
    """CARDS, one row, every forward from the beginning."""
    noise, accept = Noise(lm, seed, s.temperature, s.top_k), random.Random(seed)
    base = (1 - s.alpha) * scalar(rm, prompt) + s.alpha * s.target
    out, answer = Naive([], math.nan), []
    while not answer or not ends(answer, limit):
        best: tuple[float, list[int]] | None = None
        rejected = 0
        while True:
            segment: list[int] = []
            while True:
                segment.append(noise(prompt + answer + segment))
                out.drawn += 1
                if ends(answer + segment, limit):
                    break
                after = logits_after(lm, prompt + answer + segment).log_softmax(-1)
                uncertain = float(torch.special.entr(after.exp()).sum()) >= s.entropy
                if len(segment) >= s.max_tokens or (len(segment) >= s.min_tokens and uncertain):
                    break
            reward = scalar(rm, prompt + answer + segment)
            out.judged += 1
            out.judged_tokens += len(segment)
            if best is None or reward > best[0]:
                best = (reward, segment)
            t = len(answer + segment)
            threshold = min(s.target, base + t * (s.target - base) / limit)
            if accept.random() < min(1.0, math.exp(min(0.0, (reward - threshold) / s.beta))):
                break
            rejected += 1
            out.rejections += 1
            if rejected > s.max_rejections:
                out.kept_best += best[1] is not segment
                out.judged += best[1] is not segment
                out.judged_tokens += len(best[1]) * (best[1] is not segment)
                reward, segment = best
                break
        answer += segment
        out.reward = reward
    out.tokens = answer[:-1] if answer[-1] == EOS else answer
    return out


def naive_blocks(lm: Any, rm: Any, prompt: list[int], s: Blocks, limit: int, seed: int) -> Naive:
    """Blockwise best-of-k, one row, every forward from the beginning."""
    noises = [Noise(lm, sample_seed(seed, j), s.temperature, s.top_k) for j in range(s.k)]
    answer: list[int] = []
    reward = math.nan
    while not answer or not ends(answer, limit):
        blocks = []
        for noise in noises:
            block: list[int] = []
            while len(block) < s.length and not (block and ends(answer + block, limit)):
                block.append(noise(prompt + answer + block))
            blocks.append(block)
        rewards = [scalar(rm, prompt + answer + block) for block in blocks]
        best = max(range(s.k), key=rewards.__getitem__)
        answer, reward = answer + blocks[best], rewards[best]
    return Naive(answer[:-1] if answer[-1] == EOS else answer, reward)


# ---- segments --------------------------------------------------------------------------------------------------

SEGMENTS = [
    Segments(target=3.0, entropy=2.5, min_tokens=2, max_tokens=5, max_rejections=3),
    Segments(
        target=0.0, alpha=0.2, beta=5.0, entropy=1.0, min_tokens=1, max_tokens=3, temperature=1.5, top_k=20
    ),
    Segments(
        target=50.0, entropy=9.0, min_tokens=1, max_tokens=4, max_rejections=2
    ),  # everything is rejected
    Segments(target=-50.0, entropy=2.0),  # everything is accepted
    Segments(target=4.0, entropy=3.0, min_tokens=1, max_rejections=0, temperature=0.7),
]


@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("strategy", SEGMENTS, ids=range(len(SEGMENTS)))
def test_segments_equal_the_algorithm(strategy: Segments, engine: str, dtype: torch.dtype) -> None:
    """More prompts than slots, so that rows move and slots are refilled."""
    decoder = decoder_for(engine=engine, dtype=dtype)
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    prompts = prompts_of(7, longest=9)
    result = decoder.generate(prompts, 11, seed=list(range(7)), strategy=strategy)
    wanted = [naive_segments(lm, rm, p, strategy, 11, i) for i, p in enumerate(prompts)]
    for row, naive in zip(result, wanted, strict=True):
        assert row.tokens == naive.tokens
        assert row.reward == pytest.approx(naive.reward, abs=1e-4)
        assert row.finish_reason == ("length" if len(naive.tokens) == 11 else "eos")
        assert len(row.logprobs) == len(row.rewards) == len(row.tokens)
        if row.tokens:
            assert row.rewards == pytest.approx(
                decoder.score([row.prompt], [row.tokens])[0], abs=1e-3 if dtype == torch.float32 else 1e-9
            )
    assert result.stats.reward_calls == sum(naive.judged for naive in wanted)
    assert result.stats.reward_tokens == sum(naive.judged_tokens for naive in wanted)
    assert result.stats.prompt_tokens_reward == sum(map(len, prompts))


def test_the_cases_of_segments_are_met() -> None:
    """The settings above reject, accept, keep the best of the rejected, and end by length and by token."""
    decoder = decoder_for()
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    runs = [
        naive_segments(lm, rm, p, s, 11, i) for s in SEGMENTS for i, p in enumerate(prompts_of(7, longest=9))
    ]
    assert any(run.rejections for run in runs)
    assert any(not run.rejections for run in runs)
    assert any(run.kept_best for run in runs)
    assert {len(run.tokens) == 11 for run in runs} == {True, False}


def test_rejected_segments_cost_their_own_tokens_alone() -> None:
    """A roll-back computes nothing again: every token that was drawn went through the base model at most once."""
    decoder = decoder_for(max_batch=1)
    decoder.lm.runner.model.generation_config.eos_token_id = [EOS]
    strategy = Segments(target=2.0, entropy=9.0, min_tokens=1, max_tokens=4, max_rejections=50)
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    result = decoder.generate([9, 10, 11, 12], 12, seed=3, strategy=strategy)
    naive = naive_segments(lm, rm, [9, 10, 11, 12], strategy, 12, 3)
    assert naive.rejections > 3
    assert not naive.kept_best
    # The last token of the prompt, and of the drawn ones all but those that ended an attempt at the answer.
    assert result.stats.lm_tokens == result.stats.lm_calls <= 1 + naive.drawn
    assert result.stats.lm_tokens > naive.drawn - naive.judged
    assert result.stats.prompt_tokens_lm == 3


def test_segments_of_a_row_do_not_depend_on_the_batch() -> None:
    prompts, seeds = prompts_of(9, seed=5, longest=9), list(range(9))
    strategy = SEGMENTS[0]
    texts = [
        [row.tokens for row in decoder_for(max_batch=n).generate(prompts, 12, seed=seeds, strategy=strategy)]
        for n in (1, 4, 9)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_clamped_reward_serves() -> None:
    model = make_rm(12)
    decoder = decoder_for(RADReward((model, None), invert=True))
    row = decoder.generate([9, 10], 8, strategy=Segments(target=0.9, beta=0.2, max_tokens=4))[0]
    assert row.reward is not None
    assert 0 <= row.reward <= 1
    assert row.rewards == pytest.approx(decoder.score([[9, 10]], [row.tokens])[0], abs=1e-4)


# ---- blocks --------------------------------------------------------------------------------------------------

BLOCKS = [
    Blocks(k=3, length=4),
    Blocks(k=2, length=1, temperature=0.8),
    Blocks(k=5, length=20, top_k=10),
    Blocks(k=1),
]


@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("strategy", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_equal_the_algorithm(strategy: Blocks, engine: str, dtype: torch.dtype) -> None:
    decoder = decoder_for(engine=engine, dtype=dtype, max_batch=6)
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    prompts = prompts_of(7, seed=1, longest=9)
    result = decoder.generate(prompts, 10, seed=list(range(7)), strategy=strategy)
    for i, (prompt, row) in enumerate(zip(prompts, result, strict=True)):
        naive = naive_blocks(lm, rm, prompt, strategy, 10, i)
        assert row.tokens == naive.tokens
        assert row.reward == pytest.approx(naive.reward, abs=1e-4)
    # A prompt is prefilled once, not k times.
    assert result.stats.prompt_tokens_lm == sum(len(prompt) - 1 for prompt in prompts)


# ---- best of n --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [BestOfN(n=4), BestOfN(n=3, temperature=1.4, top_k=12), BestOfN(n=1)])
def test_best_of_n_is_the_best_of_n_samples(strategy: BestOfN) -> None:
    decoder = decoder_for()
    lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
    prompts = prompts_of(5, seed=2, longest=9)
    result = decoder.generate(prompts, 8, seed=[7] * 5, strategy=strategy)
    for prompt, row in zip(prompts, result, strict=True):
        samples = []
        for j in range(strategy.n):
            noise = Noise(lm, sample_seed(7, j), strategy.temperature, strategy.top_k)
            answer: list[int] = []
            while not answer or not ends(answer, 8):
                answer.append(noise(prompt + answer))
            samples.append((scalar(rm, prompt + answer), [token for token in answer if token != EOS]))
        best = max(samples, key=lambda sample: sample[0])
        assert (row.reward, row.tokens) == (pytest.approx(best[0], abs=1e-4), best[1])
        others = [alternative.reward for alternative in row.alternatives]
        assert others == pytest.approx(sorted((r for r, _ in samples), reverse=True)[1:], abs=1e-4)
    stats = result.stats
    assert stats.reward_calls == 5 * strategy.n
    assert stats.reward_tokens == stats.tokens == stats.lm_tokens
    assert stats.prompt_tokens_reward == strategy.n * sum(map(len, prompts))
    assert stats.seconds > 0


@pytest.mark.parametrize(
    "reward",
    [
        lambda: VocabularyReward((make_lm(3), make_tokenizer())),
        lambda: LogRatioReward((make_lm(3), make_tokenizer()), (make_lm(4), make_tokenizer())),
        lambda: ContrastiveReward("w1 w2", "w3"),
        lambda: FunctionReward(lambda prefix, ids: -ids.float()),
    ],
)
def test_best_of_n_by_any_guide(reward: Any) -> None:
    decoder = decoder_for(reward())
    row = decoder.generate("w4 w5", 6, strategy="best_of_n:n=5")[0]
    everything = [row, *row.alternatives]
    assert len({tuple(each.tokens) for each in everything}) > 1
    for each in everything:
        tokens = each.tokens + ([] if each.end_token is None else [each.end_token])
        rewards = decoder.score(["w4 w5"], [tokens])[0]
        assert each.reward == pytest.approx(decoder.reward.answer_reward(rewards), abs=1e-5)
        assert each.reward <= row.reward
    # The decoder goes on decoding token by token.
    assert decoder.generate("w4 w5", 3, Guidance(k=4))[0].tokens


# ---- calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [BestOfN(n=2), SEGMENTS[0], BLOCKS[0]])
def test_iterate_and_stop_strings(strategy: Any) -> None:
    decoder = decoder_for()
    prompts = prompts_of(6, seed=9, longest=9)
    plain = decoder.generate(prompts, 9, seed=1, strategy=strategy)
    rows = dict(decoder.iterate(prompts, 9, seed=1, strategy=strategy))
    assert {i: row.tokens for i, row in rows.items()} == {row.index: row.tokens for row in plain}
    word = next(row.text.split()[0] for row in plain if row.text.split())
    stopped = decoder.generate(prompts, 9, seed=1, stop=word, strategy=strategy)
    assert any(row.finish_reason == "stop" for row in stopped)
    assert all(word not in row.text for row in stopped)
    unfinished = decoder.iterate(prompts, 9, seed=1, strategy=strategy)
    next(unfinished)
    decoder.generate([[9]], 2, Guidance(k=3))
    with pytest.raises(RGTGError, match="called again before the run had finished"):
        list(unfinished)


@pytest.mark.parametrize("strategy", [BestOfN(n=2), SEGMENTS[0], BLOCKS[0]])
def test_a_nan_reward_names_its_row(strategy: Any) -> None:
    """The second prompt's own token makes every reward of its answers NaN."""
    model = make_rm(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = torch.nan
    decoder = decoder_for(SequenceReward((model, make_tokenizer())))
    with pytest.raises(RewardNaNError, match="the reward of prompt 1, step 0, candidate token"):
        decoder.generate([[20, 21], [40, 41], [22]], 4, strategy=strategy)
    assert decoder.generate([[20, 21]], 4, strategy=strategy)[0].tokens


def test_strategies_by_name() -> None:
    assert named_strategy("tokenwise") is None
    assert named_strategy("best_of_n") == BestOfN()
    assert named_strategy("blockwise:k=8, length=32,temperature=0.7") == Blocks(8, 32, 0.7)
    assert named_strategy("segment:target=-1e-1,max_rejections=5") == Segments(target=-0.1, max_rejections=5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "worst_of_n",
            "strategy='worst_of_n' is unknown: use one of tokenwise, best_of_n, segment, blockwise",
        ),
        ("tokenwise:n=2", "is unknown"),
        ("best_of_n:m=2", "best_of_n has no setting 'm'"),
        ("best_of_n:n=two", "n='two' is not a number"),
        ("best_of_n:n=0", "n=0 is not a whole number >= 1"),
        ("best_of_n:n=1.5", "n=1.5 is not a whole number"),
        ("segment:beta=0", "beta=0.0 is not above 0"),
        ("segment:alpha=2", "alpha=2.0 is outside of 0 to 1"),
        ("segment:target=nan", "target=nan is not finite"),
        ("segment:min_tokens=9,max_tokens=3", "max_tokens=3 is not a whole number >= 9"),
        ("blockwise:temperature=-1", "temperature=-1.0 is not a number >= 0"),
        ("blockwise:top_k=0", "top_k=0 is not a whole number >= 1"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(RGTGError) as error:
        named_strategy(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_calls_that_cannot_be() -> None:
    decoder = decoder_for()
    with pytest.raises(RGTGError, match="BestOfN does not choose token by token"):
        decoder.generate([9], 2, Guidance(k=3), strategy=BestOfN())
    with pytest.raises(RGTGError, match="does not choose token by token"):
        decoder.generate([9], 2, trace=True, strategy=Blocks())
    with pytest.raises(RGTGError, match="strategy=3 is not a strategy"):
        decoder.generate([9], 2, strategy=3)
    with pytest.raises(RGTGError, match="Segments chooses by reward and this decoder has none"):
        decoder_for(None).generate([9], 2, strategy=Segments())
    for strategy in (Segments(), Blocks()):
        with pytest.raises(RGTGError, match="needs a reward whose cache grows and shrinks by chunks"):
            decoder_for(ContrastiveReward("w1", "w2")).generate([9], 2, strategy=strategy)
