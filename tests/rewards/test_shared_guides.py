"""Guides that are adapters on the base model and take part in its own forward, against the merged models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import (
    AutoregressiveReward,
    BestOfN,
    Blocks,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.models.adapter import Adapter
from tests.conftest import make_lm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.rewards import naive

EOS = 1
VOCABULARY = 64
ENGINES = [("native", torch.float32), ("transformers", torch.float64)]


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 64) for _ in range(rng.randrange(1, 10))] for _ in range(count)]


class Bench:
    """A base model with adapters on it and the merged models that they stand for."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.folder, self.dtype = folder, dtype
        self.base = make_lm(0, dtype, num_hidden_layers=3)

    def adapter(self, name: str, head: int | None, fork: int = 1, seed: int = 0, **settings: Any) -> Path:
        return write_adapter(self.folder / name, self.base, fork=fork, seed=seed, head=head, **settings)

    def merged(self, folder: Path, vocabulary: bool = True) -> Any:
        adapter = Adapter.load(folder)
        if vocabulary and adapter.head is not None:
            model = adapter.merged(self.base)  # a sequence classifier with one label a token
            causal = make_lm(0, self.dtype, num_hidden_layers=3)
            causal.model.load_state_dict(model.model.state_dict())
            causal.lm_head.weight.data = adapter.head.weight.to(self.dtype)
            return causal
        return adapter.merged(self.base)

    def decoder(self, reward: Any, engine: str = "auto", max_batch: int = 3) -> RewardGuidedDecoder:
        pair = (self.base, None)
        return RewardGuidedDecoder.from_pretrained(pair, reward=reward, engine=engine, max_batch=max_batch)


def farma(bench: Bench, share: bool | None = None) -> tuple[Any, naive.Formula]:
    folder = bench.adapter("farma", VOCABULARY, seed=1)
    return VocabularyReward(folder, share_trunk=share), naive.farma(bench.merged(folder))


def genarm(bench: Bench, share: bool | None = None) -> tuple[Any, naive.Formula]:
    folder = bench.adapter("genarm", None, fork=0, seed=2)
    return AutoregressiveReward(folder, share_trunk=share), naive.genarm(bench.merged(folder))


def eft(bench: Bench, share: bool | None = None) -> tuple[Any, naive.Formula]:
    tuned, untuned = bench.adapter("tuned", None, seed=3), bench.adapter("untuned", None, fork=2, seed=4)
    formula = naive.log_ratio(bench.merged(tuned), bench.merged(untuned))
    return LogRatioReward(tuned, untuned), formula


MAKERS = {"farma": farma, "genarm": genarm, "eft": eft}


@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("support", ["lm", "combined", "all"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_shared_guide_equals_the_merged_model(
    tmp_path: Path, name: str, support: str, engine: str, dtype: torch.dtype
) -> None:
    bench = Bench(tmp_path, dtype)
    reward, formula = MAKERS[name](bench)
    decoder = bench.decoder(reward, engine)
    prompts = prompts_of(5)
    rows = decoder.generate(prompts, 6, Guidance(5, 0.8, 0, support))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    for prompt, row in zip(prompts, rows, strict=True):
        tokens, rewards = naive.guided(bench.base, formula, prompt, 5, 0.8, support, 6, EOS)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=tolerance)
        if tokens:
            assert decoder.score([prompt], [tokens])[0] == pytest.approx(row.rewards, abs=tolerance)
    stats, adapters = rows.stats, 2 if name == "eft" else 1
    assert (stats.lm_calls, stats.lm_tokens) == (stats.steps, stats.tokens)
    assert (stats.reward_calls, stats.reward_tokens) == (0, adapters * stats.tokens)
    assert stats.prompt_tokens_reward == adapters * sum(len(prompt) - 1 for prompt in prompts)
    assert stats.cache_bytes["reward"] == 0
    assert "the base model's" in decoder.reward.trunk


@pytest.mark.parametrize("name", ["farma", "genarm"])
def test_a_copy_of_the_base_gives_the_same(tmp_path: Path, name: str) -> None:
    bench = Bench(tmp_path)
    prompts = prompts_of(4, seed=1)
    rows = []
    for share in (None, False):
        decoder = bench.decoder(MAKERS[name](bench, share)[0])
        rows.append(decoder.generate(prompts, 6, Guidance(5, 0.8, 0, "combined")))
        assert (decoder.reward.cache_bytes() > 0) == (share is False)
    assert [row.tokens for row in rows[0]] == [row.tokens for row in rows[1]]
    for shared, own in zip(*rows, strict=True):
        assert shared.rewards == pytest.approx(own.rewards, abs=1e-3)
    assert (rows[0].stats.reward_calls, rows[1].stats.reward_calls) == (0, rows[1].stats.steps)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=lambda value: str(value).removeprefix("torch."))
def test_a_mixture_of_shared_guides(tmp_path: Path, engine: str, dtype: torch.dtype) -> None:
    """A scalar one that scores candidates beside a wide one that looks at the newest token."""
    bench = Bench(tmp_path, dtype)
    scalar = bench.adapter("pargs", 1, fork=2, seed=7)
    wide, formula = farma(bench)
    decoder = bench.decoder(MixtureReward([wide, SequenceReward(scalar)], [0.5, 1.5]), engine)
    both = naive.mixture((0.5, formula), (1.5, naive.sequence(bench.merged(scalar, vocabulary=False))))
    prompts = prompts_of(5, seed=3)
    rows = decoder.generate(prompts, 6, Guidance(4, 1.0, 0))
    for prompt, row in zip(prompts, rows, strict=True):
        tokens, rewards = naive.guided(bench.base, both, prompt, 4, 1.0, "lm", 6, EOS)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=1e-3)
    assert rows.stats.lm_tokens == 4 * rows.stats.tokens
    assert rows.stats.reward_tokens == 2 * 4 * rows.stats.tokens


def test_a_head_on_the_frozen_base_costs_no_rows(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    folder = bench.adapter("head", VOCABULARY, names=())
    decoder = bench.decoder(VocabularyReward(folder))
    rows = decoder.generate(prompts_of(3), 5, Guidance(5, 0.8, 0, "all"))
    formula = naive.farma(bench.merged(folder))
    for row in rows:
        assert row.tokens == naive.guided(bench.base, formula, row.prompt, 5, 0.8, "all", 5, EOS)[0]
    assert (rows.stats.reward_calls, rows.stats.reward_tokens) == (0, 0)


def test_strategies_beside_a_shared_guide(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    folder = bench.adapter("pargs", 1, seed=7)
    rows = [
        bench.decoder(SequenceReward(folder, share_trunk=share)).generate(
            prompts_of(3), 6, strategy=BestOfN(n=3)
        )
        for share in (None, False)
    ]
    assert [row.tokens for row in rows[0]] == [row.tokens for row in rows[1]]
    decoder = bench.decoder(SequenceReward(folder))
    before = decoder.generate([[9, 10]], 5, Guidance(4, temperature=0))
    decoder.generate([[9, 10]], 5, strategy=BestOfN(n=3))
    assert decoder.generate([[9, 10]], 5, Guidance(4, temperature=0))[0].tokens == before[0].tokens
    with pytest.raises(RGTGError, match="share_trunk=False"):
        decoder.generate([[9, 10]], 5, strategy=Blocks())


def test_adapters_that_cannot_be(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    narrow, another = bench.adapter("narrow", 63), make_lm(9, num_hidden_layers=3)
    with pytest.raises(RGTGError, match="gives 63 scores and the base model's vocabulary has 64 tokens"):
        bench.decoder(VocabularyReward(narrow))
    with pytest.raises(RGTGError, match="is not an adapter folder"):
        bench.decoder(AutoregressiveReward((make_lm(1), None), share_trunk=True))
    folder = bench.adapter("genarm", None)
    with pytest.raises(RGTGError, match=r"share_trunk=True: .* was trained on other weights"):
        RewardGuidedDecoder.from_pretrained(
            (another, make_tokenizer()), reward=AutoregressiveReward(folder, share_trunk=True)
        )
