"""Sliding windows, capped scores and attention sinks: the cached path against the model's own uncached forward."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rgtg_fast import (
    AutoregressiveReward,
    Guidance,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.models import attention, cpp_layers, kv_cache, verification
from rgtg_fast.models.loading import language_runner, reward_runner
from tests.engine.naive import guided_greedy
from tests.engine.test_ahead import recorded
from tests.models.adapters import write_adapter
from tests.models.windowed import FAMILIES, NATIVE, SMALL, WINDOW, language_model, reward_model
from tests.rewards import naive

# Ragged: far beyond the window, at its edge, inside it, and a single token.
LENGTHS = (23, WINDOW, WINDOW + 1, WINDOW - 2, 1)
CLASSIFIERS = [
    name for name, make in FAMILIES.items() if type(make()) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
]


def texts() -> list[list[int]]:
    return [[2 + (7 * i + 3 * row) % 60 for i in range(count)] for row, count in enumerate(LENGTHS)]


@pytest.fixture(params=["auto", "transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_language_model_equals_its_own_uncached_forward(family: str, engine: str) -> None:
    model = language_model(family)
    reference, runner = copy.deepcopy(model), language_runner(model, engine, None)
    assert runner.engine == ("native" if engine == "auto" and family in NATIVE else "transformers")
    rows = texts()
    runner.reserve(len(rows), 40)
    for slot, ids in enumerate(rows):
        runner.prefill(slot, ids[: len(ids) // 2])
        runner.prefill(slot, ids[len(ids) // 2 : -1])
    for step in range(WINDOW + 1):
        logits = runner.logits(runner.step(torch.tensor([[text[-1]] for text in rows])).squeeze(1))
        runner.commit(torch.zeros(len(rows), dtype=torch.int64))
        for row, text in enumerate(rows):
            expected = reference(torch.tensor([text]), use_cache=False).logits[0, -1]
            assert (logits[row] - expected).abs().max() <= 1e-4, (row, step)
            text.append(30 + 3 * step + row)


@pytest.mark.parametrize("family", CLASSIFIERS)
@torch.inference_mode()
def test_candidates_score_as_if_each_stood_alone(family: str, engine: str) -> None:
    model = reward_model(family)
    reference, runner = copy.deepcopy(model), reward_runner(model, engine, None)
    rows = texts()
    runner.reserve(len(rows), 40)
    for slot, ids in enumerate(rows):
        runner.prefill(slot, ids)
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        candidates = torch.randint(2, 60, (len(rows), 4), generator=generator)
        rewards = runner.scores(runner.step(candidates))
        choice = torch.tensor([step, 3 - step, 2, 0, 1])
        runner.commit(choice)
        for row, text in enumerate(rows):
            for at, token in enumerate(candidates[row].tolist()):
                expected = reference(torch.tensor([[*text, token]]), use_cache=False).logits[0, 0]
                assert (rewards[row, at] - expected).abs() <= 1e-4, (row, at, step)
            text.append(int(candidates[row, choice[row]]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_prompt_in_one_piece_in_pieces_and_cut_back(family: str, engine: str) -> None:
    """States do not depend on how the text came in, nor on the other rows."""
    model = language_model(family)
    runner = language_runner(model, engine, None)
    (ids, *_), other = texts(), [9, 8, 7]
    expected = language_runner(copy.deepcopy(model), engine, None).hidden_uncached(ids)
    runner.reserve(2, 40)
    torch.testing.assert_close(runner.prefill(0, ids).float(), expected.float(), rtol=1e-4, atol=1e-4)
    runner.prefill(1, other)
    both = runner.step(torch.tensor([[5], [6]])).clone()
    runner.roll_back(0, len(ids) - 8)
    again = runner.prefill(0, ids[-8:])
    torch.testing.assert_close(again.float(), expected[-8:].float(), rtol=1e-4, atol=1e-4)
    # A prompt that another slot begins with is copied from there; the last row takes a finished row's slot.
    runner.reserve(3, 40)
    for slot, prompt in enumerate((ids, ids, other)):
        runner.begin(slot, prompt)
    assert runner.encoded(1) == 0
    runner.move(2, 0)
    moved = runner.step(torch.tensor([[6], [5]]))
    # Only the native engine's products give the same bits in every batch.
    rounding = {"rtol": 0, "atol": 0} if runner.engine == "native" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(moved.flip(0), both, **rounding)


# ---- whole decoders --------------------------------------------------------------------------------------------------

GREEDY = Guidance(k=5, beta=1.5, temperature=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3"])
def test_greedy_tokens_equal_the_published_algorithm(family: str, engine: str) -> None:
    lm, rm = language_model(family), reward_model(family)
    expected = [guided_greedy(lm, rm, ids, 5, 1.5, 9, eos=1) for ids in texts()]
    decoder = RewardGuidedDecoder.from_pretrained(
        (lm, None), reward=SequenceReward((rm, None)), engine=engine
    )
    rows = decoder.generate(texts(), 9, guidance=GREEDY)
    assert [[t for t in row.tokens if t != 1] for row in rows] == expected
    scored, formula = decoder.score(texts(), [row.tokens for row in rows]), naive.sequence(rm)
    for ids, row, found in zip(texts(), rows, scored, strict=True):
        own = [formula(ids, row.tokens[:i], token) for i, token in enumerate(row.tokens)]
        assert row.rewards == pytest.approx(own, abs=1e-4)
        assert found == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("strategy", ["best_of_n:n=3", "segment", "blockwise"])
def test_strategies_that_cut_rows_back(strategy: str) -> None:
    """Both engines draw the same answers; a whole answer's reward is its own."""
    found = []
    for engine in ("native", "transformers"):
        lm, rm = language_model("gemma3"), reward_model("gemma2")
        decoder = RewardGuidedDecoder.from_pretrained(
            (lm, None), reward=SequenceReward((rm, None)), engine=engine
        )
        rows = decoder.generate(texts(), 9, seed=list(range(len(LENGTHS))), strategy=strategy)
        found.append([row.tokens for row in rows])
        last = decoder.score(texts(), found[-1])
        for ids, tokens, scores in zip(texts(), found[-1], last, strict=True):
            assert scores[-1] == pytest.approx(naive.scalar(rm, [*ids, *tokens]), abs=1e-4)
    assert found[0] == found[1]


@pytest.mark.parametrize("scorer", ["farma", "genarm"])
def test_capped_logits_as_rewards(scorer: str, engine: str) -> None:
    lm, scored = language_model("gemma2"), language_model("gemma2", seed=2)
    formula = {"farma": naive.farma, "genarm": naive.genarm}[scorer](scored)
    reward = {"farma": VocabularyReward, "genarm": AutoregressiveReward}[scorer]
    expected = [naive.guided(lm, formula, ids, 5, 1.5, "all", 6, 1) for ids in texts()]
    decoder = RewardGuidedDecoder.from_pretrained(
        (copy.deepcopy(lm), None), reward=reward((copy.deepcopy(scored), None)), engine=engine
    )
    guidance = Guidance(k=5, beta=1.5, temperature=0, support="all")
    for row, (tokens, rewards) in zip(decoder.generate(texts(), 6, guidance=guidance), expected, strict=True):
        assert [token for token in row.tokens if token != 1] == tokens
        assert row.rewards == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt-oss"])
def test_recorded_steps(family: str) -> None:
    """Steps as CUDA graphs run them: rows come and go, and are moved."""

    def made() -> RewardGuidedDecoder:
        models = (language_model(family), None), SequenceReward((reward_model("gemma3"), None))
        return RewardGuidedDecoder.from_pretrained(*models, engine="transformers", max_batch=2)

    plain, replayed = made(), made()
    recorded(replayed)
    seeds = list(range(len(LENGTHS)))
    for new_tokens in (9, 3):
        want = plain.generate(texts(), new_tokens, Guidance(k=5), seeds)
        got = replayed.generate(texts(), new_tokens, Guidance(k=5), seeds)
        assert [row.tokens for row in got] == [row.tokens for row in want]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_an_adapter_shares_the_forward(family: str, engine: str, tmp_path: Path) -> None:
    lm = language_model(family)
    folder = write_adapter(tmp_path / "adapter", lm, fork=1)
    found = {}
    for share in (True, False):
        reward = SequenceReward(folder, share_trunk=share)
        decoder = RewardGuidedDecoder.from_pretrained((copy.deepcopy(lm), None), reward=reward, engine=engine)
        found[share] = decoder.generate(texts(), 8, guidance=GREEDY)
    assert [row.tokens for row in found[True]] == [row.tokens for row in found[False]]
    for shared, own in zip(found[True], found[False], strict=True):
        assert shared.rewards == pytest.approx(own.rewards, abs=1e-4)


@pytest.mark.parametrize(
    "family", ["gpt-oss", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mistral", "gemma2"))]
)
def test_compiled_blocks(family: str) -> None:
    lm, rm = language_model(family), reward_model("gemma2")
    found = []
    for compiled in (False, True):
        decoder = RewardGuidedDecoder.from_pretrained(
            (lm, None), reward=SequenceReward((rm, None)), engine="transformers", compile=compiled
        )
        found.append([row.tokens for row in decoder.generate(texts(), 6, guidance=GREEDY)])
    assert found[0] == found[1]


# ---- what is proved when a model is loaded ---------------------------------------------------------------------------


def refused(load: Any) -> str:
    with pytest.raises(RGTGError) as error:
        load()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_proved_in_every_dtype(family: str, dtype: torch.dtype, engine: str) -> None:
    runner = language_runner(language_model(family).to(dtype), engine, None)
    assert (runner.windows, runner.limit) == (True, 128)
    assert runner.model.config.sliding_window == WINDOW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_window_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Windows that begin a token too early or too late, or that are not there."""
    model = language_model("gemma3", sliding_window=64).to(dtype)
    attend, window = kv_cache.PrefixCache.attend, cpp_layers.window
    for wrong in (lambda w: w + 1, lambda w: w - 1, lambda w: None):

        def changed(self: Any, *args: Any, wrong: Any = wrong) -> torch.Tensor:
            *first, window, softcap, sinks = args
            return attend(self, *first, window and wrong(window), softcap, sinks)

        monkeypatch.setattr(kv_cache.PrefixCache, "attend", changed)
        monkeypatch.setattr(
            cpp_layers, "window", lambda module, wrong=wrong: (window(module) and wrong(window(module))) or 0
        )
        line = refused(lambda: language_runner(model, engine, None))
        assert "Gemma3ForCausalLM" in line
        assert "sliding window of 64 tokens" in line
        assert "max_length=64 works" in line
        assert language_runner(model, engine, 64).limit == 64
        monkeypatch.undo()
    assert language_runner(model, engine, None).limit == 128


def test_a_module_with_another_window_than_its_masks_is_found() -> None:
    model = language_model("qwen2", sliding_window=64)
    model.model.layers[2].self_attn.sliding_window = 63
    for layer in model.model.layers[1:2]:
        layer.self_attn.sliding_window = 64
    for name in ("auto", "transformers"):
        assert "max_length=64 works" in refused(lambda name=name: language_runner(model, name, None))
    model.model.layers[2].self_attn.sliding_window = None
    for name in ("auto", "transformers"):
        assert "max_length=64 works" in refused(lambda name=name: language_runner(model, name, None))
    assert model.model.layers[1].self_attn.sliding_window == model.config.sliding_window == 64


def test_a_window_that_the_model_does_not_attend_proves_nothing() -> None:
    """A config that names a window which its family ignores: nobody knows what was meant."""
    config = tf.LlamaConfig(**{**SMALL, "sliding_window": 64})
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    assert "max_length=64 works" in refused(lambda: language_runner(model, "auto", None))
    assert language_runner(model, "auto", 64).limit == 64


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen2"])
def test_a_window_larger_than_the_context_is_harmless(family: str, engine: str) -> None:
    model = language_model(family, sliding_window=4096)
    runner = language_runner(model, engine, None)
    assert (runner.limit, runner.windows) == (128, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_cap_of_the_scores_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kv_cache.PrefixCache.attend

    def uncapped(self: Any, *args: Any) -> torch.Tensor:
        *first, _, sinks = args
        return attend(self, *first, None, sinks)

    monkeypatch.setattr(kv_cache.PrefixCache, "attend", uncapped)
    assert "cached forward differs" in refused(
        lambda: language_runner(language_model("gemma2").to(dtype), "transformers", None)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_that_are_left_out_are_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kv_cache.PrefixCache.attend
    monkeypatch.setattr(kv_cache.PrefixCache, "attend", lambda self, *args: attend(self, *args[:-1], None))
    assert "cached forward differs" in refused(
        lambda: language_runner(language_model("gpt-oss").to(dtype), "transformers", None)
    )


def test_a_head_that_is_not_capped_like_its_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("gemma2")
    head = model.lm_head
    runner = language_runner(model, "auto", None)
    assert runner.logit_softcap == 3.0
    runner.logit_softcap = None
    assert "final_logit_softcapping=3.0" in refused(lambda: verification.verify(runner))
    assert reward_runner(reward_model("gemma2"), "auto", None).logit_softcap is None
    assert model.lm_head is head


def test_loading_a_model_again_waits_for_its_forwards(engine: str) -> None:
    """The comparison sets the windows of a model that another decoder may be using."""
    model = language_model("mistral")
    decoder = RewardGuidedDecoder.from_pretrained((model, None), engine=engine)
    expected, decoded = decoder.generate(texts(), 6, guidance=GREEDY)[0].tokens, threading.Event()

    def load() -> int:
        count = 0
        while not decoded.is_set() or count == 0:
            assert language_runner(model, engine, None).windows
            count += 1
        return count

    with ThreadPoolExecutor(2) as threads:
        loads = [threads.submit(load) for _ in range(2)]
        try:
            found = [decoder.generate(texts(), 6, guidance=GREEDY)[0].tokens for _ in range(12)]
        finally:
            decoded.set()
        assert all(each.result() > 0 for each in loads)
    assert found == 12 * [expected]
    assert model.config.sliding_window == WINDOW


# ---- outside the decoder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "mistral"])
@torch.inference_mode()
def test_the_model_still_works_outside_the_decoder(family: str) -> None:
    model = language_model(family)
    model.set_attn_implementation("eager")
    ids = torch.tensor([texts()[0]])
    padded = torch.tensor([[0, 0, *texts()[0]]])
    mask = torch.tensor([[0, 0] + [1] * LENGTHS[0]])
    short = torch.tensor([texts()[3]])
    positions = mask.cumsum(-1) - 1

    def outputs() -> list[torch.Tensor]:
        return [
            model(ids).logits,
            model(short).logits,
            model(padded, attention_mask=mask, position_ids=positions.clamp_min(0)).logits[:, 2:],
            model.generate(ids, max_new_tokens=6, do_sample=False),
        ]

    before = outputs()
    language_runner(model, "transformers", None)
    assert model.config._attn_implementation == attention.NAME
    for old, new in zip(before, outputs(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_the_probe_of_a_small_context() -> None:
    """A row of 2 tokens, and windows of 1 to 3: shorter than the text that is tried at load time."""
    for window in (1, 2, 3):
        model = language_model("mistral", sliding_window=window)
        for length in (2, 3, 4, 9):
            runner = language_runner(model, "auto", length)
            assert (runner.limit, runner.windows) == (length, window < length)
    assert len(verification.probe(language_runner(model, "auto", 2))) == 2
