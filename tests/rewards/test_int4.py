"""Reward models whose weights are rounded to 4 bits once they are loaded: the rewards of the rounded model, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RADReward,
    Reward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.int4 import GROUPS, Int4Linear, dequantized, quantized
from rgtg_fast.models.quantized import quantization, quantize_layers, round_weights
from rgtg_fast.rewards import named_guide
from rgtg_fast.training.model import load_base
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.rewards import naive

# Widths that have groups of 32 and of 64 numbers.
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [20, 21, 22], [30]]
SHORT = 6


def rounded(model: Any) -> Any:
    """A copy with plain layers, whose weights are the numbers that 4 bits stand for."""
    made = copy.deepcopy(model)
    for layer in made.base_model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                group = next(size for size in GROUPS if module.in_features % size == 0)
                module.weight.data = dequantized(*quantized(module.weight.data, group)).to(
                    module.weight.dtype
                )
    return made


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def lm() -> Any:
    return make_lm(**SHAPE)


def decoder_of(lm: Any, reward: Any, **settings: Any) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained((lm, make_tokenizer()), reward, max_batch=3, **settings)


def check_rows(decoder: RewardGuidedDecoder, lm: Any, formula: naive.Formula) -> None:
    """Greedy guided decoding is the naive loop's, more prompts than slots."""
    for prompt, row in zip(
        PROMPTS, decoder.generate(PROMPTS, SHORT, Guidance(5, 0.8, temperature=0)), strict=True
    ):
        tokens, rewards = naive.guided(lm, formula, prompt, 5, 0.8, "lm", SHORT, 1)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=1e-4)


# By the word before the colon: the models, and the formula of the rounded ones.
NAMES: dict[str, tuple[Callable[[], list[Any]], Callable[..., naive.Formula]]] = {
    "pargs": (lambda: [make_rm(**SHAPE)], naive.sequence),
    "rad": (lambda: [make_rm(**SHAPE)], naive.rad),
    "farma": (lambda: [make_lm(3, **SHAPE)], naive.farma),
    "genarm": (lambda: [make_lm(3, **SHAPE)], naive.genarm),
    "eft": (lambda: [make_lm(3, **SHAPE), make_lm(4, **SHAPE)], naive.log_ratio),
}


@pytest.mark.parametrize("name", NAMES)
def test_rewards_by_name_are_those_of_the_rounded_model(name: str, lm: Any, tmp_path: Path) -> None:
    make, formula = NAMES[name]
    models = make()
    paths = ",".join(saved(model, tmp_path / str(i)) for i, model in enumerate(models))
    decoder = decoder_of(lm, f"{name}:{paths}", reward_weights="int4")
    described = decoder.describe()
    assert described["reward_quantization"] == "int4"
    assert described["lm_quantization"] is None
    assert described["reward_engine"] == "transformers"
    assert described["lm_engine"] == decoder_of(lm, None).describe()["lm_engine"]
    check_rows(decoder, lm, formula(*map(rounded, models)))
    # Rounding changes the rewards: the comparison can tell.
    [own] = decoder.score([PROMPTS[0]], [[9, 10, 11]])
    [plain] = decoder_of(lm, f"{name}:{paths}").score([PROMPTS[0]], [[9, 10, 11]])
    assert own != pytest.approx(plain, abs=1e-3)


def test_an_adapter_is_merged_into_a_copy_and_rounded(lm: Any, tmp_path: Path) -> None:
    folder, before = write_adapter(tmp_path, lm, fork=1), copy.deepcopy(lm.state_dict())
    decoder = decoder_of(lm, SequenceReward(folder, weights="int4"))
    described = decoder.describe()
    assert described["reward_quantization"] == "int4"
    assert "merged into a copy of its base (weights='int4')" in described["reward_trunk"]
    check_rows(decoder, lm, naive.sequence(rounded(Adapter.load(folder).merged(lm))))
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert quantization(lm) is None


def test_the_ops_of_the_triton_engine_run_between_its_layers(lm: Any, tmp_path: Path) -> None:
    rm = make_rm(**SHAPE)
    decoder = decoder_of(lm, SequenceReward(saved(rm, tmp_path), weights="int4"), engine="triton")
    assert decoder.describe()["reward_engine"] == "triton"
    check_rows(decoder, lm, naive.sequence(rounded(rm)))


def test_a_vocabulary_adapter_and_a_mixture(lm: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", lm, fork=1, head=None)
    decoder = decoder_of(lm, AutoregressiveReward(folder, weights="int4"))
    assert decoder.describe()["reward_quantization"] == "int4"
    other, path = make_rm(**SHAPE), saved(make_rm(**SHAPE), tmp_path / "rm")
    merged = rounded(Adapter.load(folder).merged(lm))
    check_rows(decoder, lm, naive.genarm(merged))
    decoder = decoder_of(lm, f"mixture:0.5*pargs:{path}+0.7*genarm:{folder}", reward_weights="int4")
    check_rows(decoder, lm, naive.mixture((0.5, naive.sequence(rounded(other))), (0.7, naive.genarm(merged))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    lm, rm = make_lm(dtype=dtype, **SHAPE), make_rm(dtype=dtype, **SHAPE)
    decoder = decoder_of(lm, SequenceReward(saved(rm, tmp_path), weights="int4"), engine="transformers")
    [scores] = decoder.score([PROMPTS[0]], [[9, 10, 11]])
    wide = rounded(rm).float()
    own = torch.tensor([naive.scalar(wide, [*PROMPTS[0], *[9, 10, 11][:i]]) for i in (1, 2, 3)])
    # What two layers in this dtype round by.
    error = (torch.tensor(scores) - own).norm() / own.norm()
    assert error <= {torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    rows = decoder.generate(PROMPTS, SHORT, Guidance(5, 0.8))
    assert all(row.tokens for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_forward_that_differs_is_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token at a time, as in a step, the product is off by 2 %: the verification at load time notices."""
    forward = Int4Linear.forward

    def off(self: Int4Linear, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * (1.02 if x.shape[-2] == 1 else 1.0)

    lm, path = make_lm(dtype=dtype, **SHAPE), saved(make_rm(dtype=dtype, **SHAPE), tmp_path)
    monkeypatch.setattr(Int4Linear, "forward", off)
    with pytest.raises(RGTGError, match="its cached forward differs from its own"):
        decoder_of(lm, SequenceReward(path, weights="int4"))


PAIR: Any = (make_rm(**SHAPE), make_tokenizer())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SequenceReward("a", weights="nf8"),
            r"^weights='nf8' is unknown: use 'int4', 'int8', or None",
        ),
        (lambda: VocabularyReward("a", weights="nf4"), r"^weights='nf4' is unknown"),
        (lambda: SequenceReward(PAIR, weights="int4"), "was loaded by you: pass its path"),
        (lambda: RADReward(PAIR, weights="int4"), "was loaded by you: pass its path"),
        (lambda: LogRatioReward("a", PAIR, weights="int4"), "was loaded by you: pass its path"),
        (
            lambda: SequenceReward("a", share_trunk=True, weights="int4"),
            "share_trunk=True, which computes with",
        ),
        (lambda: AutoregressiveReward("a", share_trunk=True, weights="int4"), "share_trunk=True"),
        (
            lambda: named_guide("contrastive", weights="int4"),
            "'contrastive' needs a ContrastiveReward: leave it out",
        ),
        (lambda: named_guide("text:a", weights="int4"), "'text:a' needs a TextReward: leave it out"),
        (
            lambda: named_guide("mixture:1*pargs:a+1*text:b", weights="int4"),
            "needs a TextReward: leave it out",
        ),
    ],
)
def test_what_is_not_rounded(make: Callable[[], Reward], message: str) -> None:
    with pytest.raises(RGTGError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "reward",
    [None, ContrastiveReward("w1", "w2"), MixtureReward([SequenceReward("a")]), TextReward("a"), max, PAIR],
)
def test_a_reward_that_is_no_name_has_weights_of_its_own(lm: Any, reward: Any) -> None:
    with pytest.raises(
        RGTGError, match=r"was loaded by you|a reward has weights of its own, as SequenceReward"
    ):
        decoder_of(lm, reward, reward_weights="int4")
    with pytest.raises(RGTGError, match="reward_weights=4 is unknown: use 'int4'"):
        decoder_of(lm, reward, reward_weights=4)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    lm, path = make_lm(**SHAPE), saved(make_rm(**SHAPE), tmp_path / "rm")
    reward = SequenceReward(path, weights="int4")
    with pytest.raises(RGTGError, match=r"engine='native' cannot run .*: its weights are quantized \(int4\)"):
        decoder_of(lm, reward, engine="native")
    with pytest.raises(RGTGError, match=r"does not serve layers\.0\.\S+: it is torch\.float64"):
        decoder_of(make_lm(dtype=torch.float64, **SHAPE), SequenceReward(path, weights="int4"))
    narrow = saved(make_rm(hidden_size=64, intermediate_size=88), tmp_path / "narrow")
    with pytest.raises(RGTGError, match=r"does not serve layers\.0\.mlp\.gate_proj: it is \[88, 64\]"):
        decoder_of(lm, SequenceReward(narrow, weights="int4"))


def test_rounded_models_are_quantized_models(lm: Any, tmp_path: Path) -> None:
    adapter = Adapter.load(write_adapter(tmp_path, lm, fork=1))
    quantize_layers(lm, "int4")
    assert quantization(lm) == quantization(lm.base_model) == "int4"
    with pytest.raises(RGTGError, match=r"quantized weights \(int4\), which cannot have an adapter merged"):
        adapter.merged(lm)
    with pytest.raises(RGTGError, match=r"quantized weights \(int4\), which cannot be rounded to int4 again"):
        round_weights(lm, "int4")
    with pytest.raises(RGTGError, match=r"quantized \(int4\) for float32 and is not cast to bfloat16"):
        decoder_of(lm, None, dtype="bfloat16")
    trained: Any = make_rm(**SHAPE)
    quantize_layers(trained, "int4")
    with pytest.raises(RGTGError, match=r"\(int4\), which cannot be trained"):
        load_base((trained, make_tokenizer()))
    described = decoder_of(lm, None).describe()
    assert (described["lm_quantization"], described["lm_engine"]) == ("int4", "transformers")
