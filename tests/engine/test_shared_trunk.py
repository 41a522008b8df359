"""A reward model that is an adapter on the base model, in that model's own forward: the tokens of two models."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import (
    ContrastiveReward,
    Guidance,
    MixtureReward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
)
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.cpp_layers import NativeLayers
from tests.conftest import make_lm, make_tokenizer
from tests.covering import daily, each
from tests.engine.naive import guided_greedy
from tests.models.adapters import write_adapter

LAYERS = 3
FORKS = (0, 1, LAYERS - 1, LAYERS)
# Three lengths; with two slots, rows end at different times and their slots are filled again.
PROMPTS = [[9, 8, 7], [10], [20, 21, 22, 23, 24, 25, 26], [6, 7], [30, 31, 32, 33]]


@pytest.fixture(params=["native", "triton", "transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and (reason := NativeLayers.supported(make_lm().base_model)):
        pytest.skip(f"the native engine does not run here: {reason}")
    return request.param


def base(dtype: torch.dtype = torch.float32) -> Any:
    return make_lm(dtype=dtype, num_hidden_layers=LAYERS)


def decoder(lm: Any, reward: Any, engine: str, max_batch: int = 2) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained(
        (lm, make_tokenizer()), reward=reward, engine=engine, max_batch=max_batch
    )


# ---- exactness -------------------------------------------------------------------------------------------------------


def test_samples_of_one_prompt_that_begin_together_are_encoded_once(tmp_path: Path, engine: str) -> None:
    lm = base()
    folder = write_adapter(tmp_path, lm, 1)
    shared = decoder(lm, MixtureReward([SequenceReward(folder), ContrastiveReward("w1", "w2")]), engine, 3)
    prompts = ["w3 w4 w5"] * 3 + ["w6"]
    guidance = Guidance(k=64, beta=0.3, temperature=50)
    together = shared.generate(prompts, 10, guidance, seed=list(range(4)))
    one, other = (shared.generate([p], 1, guidance).stats for p in ("w3 w4 w5", "w6"))
    # The last one waits for a slot, and no other has its prompt.
    assert together.stats.prompt_tokens_lm == one.prompt_tokens_lm + other.prompt_tokens_lm
    assert together.stats.prompt_tokens_reward == one.prompt_tokens_reward + other.prompt_tokens_reward
    for i, row in enumerate(together):
        alone = shared.generate([prompts[i]], 10, guidance, seed=i)[0]
        assert row.tokens == alone.tokens
        assert row.rewards == pytest.approx(alone.rewards, abs=1e-5)


@pytest.mark.parametrize(
    ("k", "beta", "fork"),
    daily(
        [
            (*pair, fork)
            for pair, fork in product([(1, 1.0), (2, -2.0), (5, 2.0), (10, 0.0), (40, 1.0)], FORKS)
        ],
        each,
    ),
)
def test_greedy_equals_two_models_and_the_naive_loop(
    tmp_path: Path, engine: str, fork: int, k: int, beta: float
) -> None:
    lm = base()
    folder = write_adapter(tmp_path, lm, fork)
    own = Adapter.load(folder).merged(lm)
    guidance = Guidance(k=k, beta=beta, temperature=0)
    shared = decoder(lm, SequenceReward(folder, share_trunk=True), engine)
    two = decoder(lm, SequenceReward(folder, share_trunk=False), engine)
    rows, others = shared.generate(PROMPTS, 12, guidance), two.generate(PROMPTS, 12, guidance)
    for prompt, row, other in zip(PROMPTS, rows, others, strict=True):
        assert row.tokens == other.tokens
        assert row.finish_reason == other.finish_reason
        assert row.tokens == guided_greedy(lm, own, prompt, k, beta, 12, eos=1)
        assert row.rewards == pytest.approx(other.rewards, abs=2e-4)
        assert row.logprobs == pytest.approx(other.logprobs, abs=2e-4)
        alone = shared.generate([prompt], 12, guidance)[0]
        assert alone.tokens == row.tokens


@pytest.mark.parametrize("fork", FORKS)
def test_the_policy_is_the_same_when_sampling(tmp_path: Path, fork: int) -> None:
    lm = base(torch.float64)
    folder = write_adapter(tmp_path, lm, fork)
    guidance = [Guidance(k=3 + 4 * i, beta=1.0 + i, temperature=0.5 + 0.4 * i) for i in range(5)]
    texts, traces = [], []
    for share in (True, False):
        guided = decoder(lm, SequenceReward(folder, share_trunk=share), "transformers", max_batch=3)
        rows = guided.generate(PROMPTS, 14, guidance, seed=[3, 1, 4, 1, 5], trace=True)
        texts.append([row.tokens for row in rows])
        traces.append([[c.probability for c in step.candidates] for row in rows for step in row.trace or []])
    assert texts[0] == texts[1]
    for one, other in zip(*traces, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_beta_zero_is_the_base_model(tmp_path: Path, engine: str) -> None:
    lm = base()
    shared = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, 1)), engine)
    alone = decoder(lm, None, engine)
    for temperature in (0.0, 0.8):
        guidance = Guidance(k=8, beta=0.0, temperature=temperature)
        assert [row.tokens for row in shared.generate(PROMPTS, 12, guidance, seed=2)] == [
            row.tokens for row in alone.generate(PROMPTS, 12, guidance, seed=2)
        ]


def test_a_row_depends_on_itself_alone(tmp_path: Path, engine: str) -> None:
    lm = base()
    folder = write_adapter(tmp_path, lm, 1)
    guidance = [Guidance(k=2 + i, beta=0.7 * i, temperature=(0, 0.9)[i % 2]) for i in range(5)]
    texts = []
    for max_batch in (1, 2, 5):
        guided = decoder(lm, SequenceReward(folder), engine, max_batch)
        texts.append([row.tokens for row in guided.generate(PROMPTS, 12, guidance, seed=list(range(5)))])
    assert texts[0] == texts[1] == texts[2]


def test_native_rows_have_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    lm = base()
    if reason := NativeLayers.supported(lm.base_model):
        pytest.skip(f"the native engine does not run here: {reason}")
    folder = write_adapter(tmp_path, lm, 1)
    guidance = Guidance(k=6, beta=1.5)
    rows = [
        decoder(lm, SequenceReward(folder), "native", batch).generate(PROMPTS, 10, guidance).rows
        for batch in (1, 5)
    ]
    for one, other in zip(*rows, strict=True):
        assert one.rewards == other.rewards
        assert one.logprobs == other.logprobs


def test_bfloat16_is_as_near_as_it_rounds(tmp_path: Path, engine: str) -> None:
    rewards = {}
    for dtype in (torch.float32, torch.bfloat16):
        lm = base().to(torch.bfloat16).to(dtype)
        guided = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, 1)), engine)
        guided.lm.runner.model.generation_config.eos_token_id = None
        rewards[dtype] = guided.generate(PROMPTS, 1, Guidance(k=1, beta=1.0, temperature=0))
    exact = torch.tensor([row.rewards for row in rewards[torch.float32]])
    rounded = torch.tensor([row.rewards for row in rewards[torch.bfloat16]])
    assert float((exact - rounded).norm() / exact.norm()) < 0.05


def test_scores_of_given_answers_are_those_of_decoding(tmp_path: Path, engine: str) -> None:
    lm = base()
    guided = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, 1)), engine)
    guided.lm.runner.model.generation_config.eos_token_id = None
    row = guided.generate(PROMPTS[:1], 8, Guidance(k=5, beta=1.0))[0]
    assert guided.score(PROMPTS[:1], [row.tokens])[0] == pytest.approx(row.rewards, abs=1e-4)


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fork", [0, 1, LAYERS])
def test_a_token_is_one_forward(
    tmp_path: Path, engine: str, fork: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where tokens enter the model and where they reach its attention."""
    lm = base()
    guided = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, fork)), engine, max_batch=4)
    guided.lm.runner.model.generation_config.eos_token_id = None
    runner = guided.lm.runner
    seen: list[tuple[int, int]] = []
    forward = runner.layers.forward

    def counted(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return forward(ids, *args)

    monkeypatch.setattr(runner.layers, "forward", counted)
    stats = guided.generate(PROMPTS[:3], 6, Guidance(k=7, beta=1.0)).stats
    assert seen == [(1, len(prompt)) for prompt in PROMPTS[:3]] + [(3, 7)] * stats.steps
    assert (stats.lm_calls, stats.lm_tokens) == (stats.steps, 3 * 7 * stats.steps)
    assert (stats.reward_calls, stats.reward_tokens) == (0, 0 if fork == LAYERS else 3 * 7 * stats.steps)
    shapes = [(last - first, part.keys.shape[1]) for first, last, _, part in runner.cache.parts]
    expected = {0: [(3, 6)], 1: [(1, 3), (2, 6)], LAYERS: [(3, 3)]}
    assert shapes == expected[fork]


def test_the_weights_are_there_once(tmp_path: Path, engine: str) -> None:
    lm = base()
    before = {name: parameter.clone() for name, parameter in lm.named_parameters()}
    guided = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, 1)), engine)
    assert guided.reward.runner is None
    guided.generate(PROMPTS, 4)
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_model_works_as_before_outside_the_decoder(tmp_path: Path) -> None:
    lm = base()
    ids = torch.tensor([PROMPTS[2]])
    before = lm(input_ids=ids).logits
    guided = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, 0)), "transformers")
    guided.generate(PROMPTS, 4)
    assert torch.equal(lm(input_ids=ids).logits, before)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.modules())
    assert hooks == 8 * LAYERS
    del guided
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


# ---- several guides over one trunk -----------------------------------------------------------------------------------


def test_two_adapters_of_a_mixture_share_one_forward(tmp_path: Path, engine: str) -> None:
    lm = base()
    folders = [write_adapter(tmp_path / str(i), lm, fork=i, rank=2 + i, seed=i) for i in (1, 2)]
    guidance = [
        Guidance(k=5, beta=1.0, temperature=0, weights=(w, 1 - w)) for w in (0.0, 0.3, 1.0, 2.0, -1.0)
    ]
    texts = []
    for share in (True, False):
        mixture = MixtureReward([SequenceReward(folder, share_trunk=share) for folder in folders])
        guided = decoder(lm, mixture, engine, max_batch=3)
        result = guided.generate(PROMPTS, 10, guidance)
        texts.append([row.tokens for row in result])
        if share:
            assert result.stats.reward_calls == 0
            assert result.stats.lm_calls == result.stats.steps
    assert texts[0] == texts[1]


def test_a_mixture_with_contrastive_prompts_shares_too(tmp_path: Path, engine: str) -> None:
    lm = base()
    folder = write_adapter(tmp_path, lm, 1)
    texts = []
    for share in (True, False):
        mixture = MixtureReward([SequenceReward(folder, share_trunk=share), ContrastiveReward("w1 w2", "w3")])
        guided = decoder(lm, mixture, engine, max_batch=3)
        texts.append([row.tokens for row in guided.generate(PROMPTS, 10, Guidance(k=5, temperature=0))])
    assert texts[0] == texts[1]


# ---- who shares ------------------------------------------------------------------------------------------------------


def test_describe_says_who_shares(tmp_path: Path) -> None:
    lm = base()
    folder = write_adapter(tmp_path, lm, 1)
    words = {
        share: decoder(lm, SequenceReward(folder, share_trunk=share), "auto").describe()["reward_trunk"]
        for share in (None, True, False)
    }
    assert words[None] == words[True] == "the base model's, rows of its own from layer 1 on"
    assert words[False] == (
        "a model of its own, the adapter merged into a copy of its base (share_trunk=False)"
    )


def test_other_weights_do_not_share(tmp_path: Path) -> None:
    lm, other = base(), make_lm(seed=5, num_hidden_layers=LAYERS)
    other.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    other.config._name_or_path = str(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", other, 1)
    with pytest.raises(RGTGError, match="was trained on other weights than those of LlamaForCausalLM"):
        decoder(lm, SequenceReward(folder, share_trunk=True), "auto")
    guided = decoder(lm, SequenceReward(folder), "auto")
    assert "was trained on other weights" in guided.describe()["reward_trunk"]
    own = Adapter.load(folder).merged(other)
    row = guided.generate(PROMPTS[0], 8, Guidance(k=5, temperature=0))[0]
    assert row.tokens == guided_greedy(lm, own, PROMPTS[0], 5, 1.0, 8, eos=1)


def test_other_prompts_do_not_share(tmp_path: Path) -> None:
    lm = base()
    folder = write_adapter(tmp_path, lm, 1)
    make_tokenizer("{{ messages }}").save_pretrained(folder)
    with pytest.raises(RGTGError, match="has another chat template than the base model"):
        decoder(lm, SequenceReward(folder, share_trunk=True), "auto")
    assert "another chat template" in decoder(lm, SequenceReward(folder), "auto").describe()["reward_trunk"]
    make_tokenizer().save_pretrained(folder)
    assert "the base model's" in decoder(lm, SequenceReward(folder), "auto").describe()["reward_trunk"]


def test_only_adapters_share(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="is not an adapter folder"):
        decoder(base(), SequenceReward(tmp_path, share_trunk=True), "auto")


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("fork", [20, 30])
def test_smollm2_with_a_random_adapter(tmp_path: Path, smollm2: Path, fork: int) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    folder = write_adapter(tmp_path, lm, fork, rank=16, size=0.2)
    prompts = ["Human: How do I make tea?\n\nAssistant:", "The capital of France is"]
    guidance = Guidance(k=10, beta=2.0, temperature=0)
    texts = []
    for share in (True, False):
        guided = RewardGuidedDecoder.from_pretrained(
            smollm2, reward=SequenceReward(folder, share_trunk=share)
        )
        texts.append([row.tokens for row in guided.generate(prompts, 24, guidance)])
    assert texts[0] == texts[1]


@torch.no_grad()
def test_a_base_model_that_changes_under_its_adapter_is_refused(tmp_path: Path, engine: str) -> None:
    lm = base()
    shared = decoder(lm, SequenceReward(write_adapter(tmp_path, lm, 1)), engine)
    shared.generate(PROMPTS[:1], 2)
    lm.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(RGTGError, match=r"changed after .* was attached to them"):
        shared.generate(PROMPTS[:1], 2)


def test_one_adapter_guides_two_decoders_of_its_base(tmp_path: Path, engine: str) -> None:
    """Whether they have one model in common or each a model of its own with the same weights."""
    lm = base()
    guide = SequenceReward(write_adapter(tmp_path, lm, 1))
    guidance = Guidance(k=8, beta=3.0, temperature=0)
    one = decoder(lm, guide, engine)
    right = one.generate(PROMPTS, 6, guidance)
    for other in (lm, base()):
        two = decoder(other, guide, engine)
        for user in (two, one):
            assert [row.tokens for row in user.generate(PROMPTS, 6, guidance)] == [
                row.tokens for row in right
            ]
