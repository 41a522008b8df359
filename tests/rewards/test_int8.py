"""Base and reward models whose weights are rounded to 8 bits once they are loaded.

Matrices that 8 bits hold exactly (`on_grid`) have the bits of bfloat16, so that whole answers can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.evaluation.inspection import inspect_decoder
from rgtg_fast.models.int8 import Int8Linear
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.models.test_int8 import on_grid

PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [20, 21, 22], [30]]
SHORT = 6
GREEDY = Guidance(5, 0.8, temperature=0)
BF16 = torch.bfloat16


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return saved(on_grid(make_lm(dtype=BF16)), tmp_path / "base")


def decoder_of(
    base: Any, reward: Any, dtype: str | None = "bfloat16", **settings: Any
) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained(base, reward, dtype=dtype, max_batch=3, **settings)


def answers(decoder: RewardGuidedDecoder) -> list[tuple[list[int], Any]]:
    return [(row.tokens, row.rewards) for row in decoder.generate(PROMPTS, SHORT, GREEDY)]


# By the word before the colon: what makes the reward's model.
MODELS: dict[str, Callable[[], Any]] = {
    "pargs": lambda: make_rm(dtype=BF16),
    "farma": lambda: make_lm(3, dtype=BF16),
    "genarm": lambda: make_lm(3, dtype=BF16),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_of_models_that_8_bits_hold(name: str, base: str, tmp_path: Path) -> None:
    reward = f"{name}:{saved(on_grid(MODELS[name]()), tmp_path / 'reward')}"
    plain = decoder_of(base, reward)
    small = decoder_of(base, reward, weights="int8", reward_weights="int8")
    described = small.describe()
    assert (described["lm_quantization"], described["reward_quantization"]) == ("int8", "int8")
    assert (described["lm_engine"], described["reward_engine"]) == ("native", "native")
    assert described["dtype"] == "bfloat16"
    assert answers(small) == answers(plain)
    # A row has the bits of its own in a batch.
    alone = [answer for prompt in PROMPTS for answer in small.generate([prompt], SHORT, GREEDY)]
    assert [(row.tokens, row.rewards) for row in alone] == answers(small)


def test_other_weights_give_other_rewards(tmp_path: Path) -> None:
    base, rm = saved(make_lm(dtype=BF16), tmp_path / "base"), saved(make_rm(dtype=BF16), tmp_path / "rm")
    answer = ([PROMPTS[0]], [[9, 10, 11]])
    [plain] = decoder_of(base, rm).score(*answer)
    [small] = decoder_of(base, SequenceReward(rm, weights="int8")).score(*answer)
    assert small != plain
    assert small == pytest.approx(plain, abs=0.15)


def test_an_adapter_beside_the_weights_of_the_base_model(base: str, tmp_path: Path) -> None:
    lm = on_grid(make_lm(dtype=BF16))
    lm.config._name_or_path = base
    folder = str(write_adapter(tmp_path / "adapter", lm, fork=1, base_model_name_or_path=base))
    plain = decoder_of(base, SequenceReward(folder, share_trunk=True))
    small = decoder_of(base, SequenceReward(folder, share_trunk=True), weights="int8")
    assert "the base model's" in small.describe()["reward_trunk"]
    assert answers(small) == answers(plain)
    # Merged into a copy of the base, whose plain weights are read again from its files.
    plain = decoder_of(base, SequenceReward(folder, share_trunk=False))
    small = decoder_of(base, SequenceReward(folder, share_trunk=False), weights="int8")
    assert small.describe()["reward_quantization"] is None
    assert answers(small) == answers(plain)
    merged = decoder_of(base, SequenceReward(folder, weights="int8"), weights="int8")
    assert "merged into a copy of its base (weights='int8')" in merged.describe()["reward_trunk"]
    assert merged.describe()["reward_quantization"] == "int8"


def test_a_model_is_reported_with_its_bytes(base: str) -> None:
    report = inspect_decoder(decoder_of(base, None, weights="int8"), PROMPTS[0])
    plain = inspect_decoder(decoder_of(base, None), PROMPTS[0])
    [model], [other] = report["models"], plain["models"]
    assert (model["quantization"], model["engine"], model["dtype"]) == ("int8", "native", "bfloat16")
    lm: Any = make_lm(dtype=BF16)
    linears = [module for module in lm.modules() if isinstance(module, torch.nn.Linear)]
    less = sum(module.weight.nbytes // 2 - 4 * module.out_features for module in linears)
    assert other["weight_bytes"] - model["weight_bytes"] == less
    assert report["memory"]["weight_bytes"] == model["weight_bytes"]
    assert report["cached_vs_uncached"]["logprob"] <= 0.1


def test_a_base_model_in_4_bits(tmp_path: Path) -> None:
    base = saved(make_lm(dtype=BF16, hidden_size=64, intermediate_size=96), tmp_path / "base")
    described = decoder_of(base, None, weights="int4").describe()
    assert (described["lm_quantization"], described["lm_engine"]) == ("int4", "transformers")


def test_decoders_that_do_not_fit(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RGTGError, match=r"is torch\.float32: use dtype='bfloat16'; leave out weights"):
        decoder_of(base, None, dtype=None, weights="int8")
    with pytest.raises(RGTGError, match="was loaded by you: pass its path"):
        decoder_of((make_lm(dtype=BF16), make_tokenizer()), None, weights="int8")
    with pytest.raises(RGTGError, match="weights='int3' is unknown: use 'int4', 'int8', or None"):
        decoder_of(base, None, weights="int3")
    for engine in ("transformers", "triton"):
        with pytest.raises(RGTGError, match="the native engine alone executes them, leave out engine"):
            decoder_of(base, None, weights="int8", engine=engine)
    with pytest.raises(RGTGError, match="compile=True and engine='native'"):
        decoder_of(base, None, weights="int8", compile=True)
    with pytest.raises(RGTGError, match="fuse_projections=True and engine='native'"):
        decoder_of(base, None, weights="int8", fuse_projections=True)
    small = decoder_of(base, None, weights="int8")
    pair: Any = (small.lm.runner.model, make_tokenizer())
    assert answers(decoder_of(pair, None, dtype=None)) == answers(small)
    with pytest.raises(RGTGError, match="engine='transformers' does not run weights='int8'"):
        decoder_of(pair, None, dtype=None, engine="transformers")
    with pytest.raises(RGTGError, match=r"quantized \(int8\) for bfloat16 and is not cast to float32"):
        decoder_of(pair, None, dtype="float32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RGTGError, match=r"weights='int8' and tp_plan='auto': .*leave out one of them"):
        decoder_of(base, None, weights="int8", tp_plan="auto")


def test_a_family_that_the_native_engine_does_not_run(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, eos_token_id=1))
    base = saved(model.to(BF16), tmp_path / "gpt2")
    with pytest.raises(
        RGTGError, match=r"needs the native engine \(CPU\), which cannot run .*: GPT2Model is not"
    ):
        decoder_of(base, None, weights="int8")


def test_changes_of_the_weights_between_runs(base: str) -> None:
    """Integers are read in place; a layer in the place of a rounded one is noticed."""
    decoder = decoder_of(base, None, weights="int8")
    first = answers(decoder)
    layer = decoder.lm.runner.model.base_model.layers[0].mlp.down_proj
    assert isinstance(layer, Int8Linear)
    layer.weight.neg_()
    assert answers(decoder) != first
    layer.weight.neg_()
    assert answers(decoder) == first
    decoder.lm.runner.model.base_model.layers[0].mlp.down_proj = copy.deepcopy(layer)
    with pytest.raises(RGTGError, match="modules were replaced or added"):
        decoder.generate(PROMPTS, SHORT, GREEDY)
