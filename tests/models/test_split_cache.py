"""Rows of sliding windows that drop what no window reaches: the same bits as rows that keep everything."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.evaluation.inspection import inspect_decoder
from rgtg_fast.models import runner as runners
from rgtg_fast.models import split_cache
from rgtg_fast.models.kv_cache import PrefixCache
from rgtg_fast.models.loading import language_runner
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.models.support import layer_windows
from tests.engine.host_reads import Guard
from tests.engine.test_ahead import guard, recorded
from tests.models.adapters import write_adapter
from tests.models.windowed import FAMILIES, WINDOW, language_model, reward_model

__all__ = ["guard"]
LENGTH = 60


@pytest.fixture(params=["auto", "transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def small_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_cache, "SLACK", 3)


def whole(make: Any) -> Any:
    """What `make` returns, with caches that keep all tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "layer_windows", lambda config: [])
        return make()


def pair(family: str, engine: str) -> tuple[ModelRunner, ModelRunner]:
    """A model's runner whose rows drop tokens, and one whose rows keep all."""
    model = language_model(family)
    kept = whole(lambda: language_runner(copy.deepcopy(model), engine, None))
    return language_runner(model, engine, None), kept


class Schedule:
    """The same random operations on several runners, whose states must have the same bits.

    Attributes:
        texts: the tokens of each slot's prefix.
        room: for each slot, the tokens by which it may be cut back.
    """

    def __init__(self, found: list[ModelRunner], slots: int, undo: int, seed: int):
        self.runners, self.random = found, random.Random(seed)
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.longest = [0] * slots
        self.undo = undo
        self.cuts = 0
        for each in found:
            each.reserve(slots, LENGTH, undo=undo)

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(2, 60) for _ in range(count)]

    def equal(self, states: list[torch.Tensor]) -> None:
        for other in states[1:]:
            assert torch.equal(states[0], other)

    def begin(self, slot: int) -> None:
        known = [text[: self.random.randrange(1, len(text) + 1)] for text in self.texts if text]
        ids = self.random.choice([self.tokens(self.random.randrange(1, 30)), *self.prompts(), *known[:1]])
        for each in self.runners:
            each.begin(slot, list(ids))
        self.texts[slot], self.longest[slot] = list(ids), len(ids)

    def prompts(self) -> list[list[int]]:
        return [list(ids) for ids in self.runners[0]._prompts if ids]

    def prefill(self, slot: int) -> None:
        free = LENGTH - len(self.texts[slot])
        if free < 1:
            return self.begin(slot)
        ids = self.tokens(self.random.randrange(1, min(free, 25) + 1))
        self.equal([each.prefill(slot, ids).clone() for each in self.runners])
        self.grow(slot, ids)
        return None

    def grow(self, slot: int, ids: list[int]) -> None:
        self.texts[slot] += ids
        self.longest[slot] = max(self.longest[slot], len(self.texts[slot]))

    def step(self, rows: int, width: int) -> None:
        for slot in range(rows):
            if not 0 < len(self.texts[slot]) < LENGTH - 1:
                self.begin(slot)
        tokens = [self.tokens(width) for _ in range(rows)]
        states = [each.step(torch.tensor(tokens)).clone() for each in self.runners]
        self.equal(states)
        choice = [self.random.randrange(width) for _ in range(rows)]
        for each in self.runners:
            each.commit(torch.tensor(choice))
        for slot, which in enumerate(choice):
            self.grow(slot, [tokens[slot][which]])

    def cut(self, slot: int) -> None:
        count = len(self.texts[slot])
        least = max(1, self.longest[slot] - self.undo)
        if least < count:
            length = self.random.randrange(least, count)
            for each in self.runners:
                each.roll_back(slot, length)
            del self.texts[slot][length:]
            self.cuts += 1

    def move(self, source: int, target: int) -> None:
        if not self.texts[source]:
            return
        for each in self.runners:
            each.move(source, target)
        self.texts[target], self.longest[target] = list(self.texts[source]), self.longest[source]

    def run(self, operations: int) -> None:
        slots = range(len(self.texts))
        for _ in range(operations):
            slot, other = self.random.choice(slots), self.random.choice(slots)
            kind = self.random.choices(
                ["begin", "prefill", "step", "cut", "move"], [1, 2, 12, 3 if self.undo else 0, 1]
            )[0]
            if kind == "step":
                self.step(slot + 1, self.random.choice([1, 1, 4]))
            elif kind == "move":
                if slot != other:
                    self.move(slot, other)
            else:
                getattr(self, kind)(slot)
            for each in self.runners:
                assert each.cache.lengths.tolist() == [len(text) for text in self.texts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("undo", [0, 6])
@torch.inference_mode()
def test_random_schedules_give_the_bits_of_whole_rows(family: str, undo: int, engine: str) -> None:
    dropping, keeping = pair(family, engine)
    schedule = Schedule([dropping, keeping], 3, undo, seed=len(family) + undo)
    schedule.run(150)
    assert dropping.cache.slides
    assert not keeping.cache.slides
    assert (schedule.cuts > 5) == bool(undo)
    assert dropping.cache.nbytes() < keeping.cache.nbytes()


@torch.inference_mode()
def test_half_precision() -> None:
    model = language_model("gemma3").to(torch.bfloat16)
    kept = whole(lambda: language_runner(copy.deepcopy(model), "native", None))
    Schedule([language_runner(model, "native", None), kept], 2, 4, seed=1).run(80)


@torch.inference_mode()
def test_a_row_that_crosses_the_length_of_its_longrope_is_computed_again(engine: str) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 5.0, 0.3, 9.0],
        "original_max_position_embeddings": 31,
    }
    model = language_model("phi3", rope_parameters=rope, original_max_position_embeddings=31)
    kept = whole(lambda: language_runner(copy.deepcopy(model), engine, None))
    dropping = language_runner(model, engine, None)
    assert dropping.rope is not None
    Schedule([dropping, kept], 2, 4, seed=2).run(120)


# ---- whole decoders --------------------------------------------------------------------------------------------------

PROMPTS = [[2 + (7 * i + 3 * row) % 60 for i in range(count)] for row, count in enumerate((23, 4, 31, 9, 1))]
SEEDS = list(range(len(PROMPTS)))


def decoders(lm: str, rm: str, **settings: Any) -> list[RewardGuidedDecoder]:
    """A decoder whose rows drop tokens, and one whose rows keep all."""

    def make() -> RewardGuidedDecoder:
        models = (language_model(lm), None), SequenceReward((reward_model(rm), None))
        return RewardGuidedDecoder.from_pretrained(*models, max_batch=3, **settings)

    return [make(), whole(make)]


def answers(decoder: RewardGuidedDecoder, count: int = 24, **settings: Any) -> list[Any]:
    rows = decoder.generate(PROMPTS, count, seed=SEEDS, **settings)
    return [(row.tokens, row.rewards, row.logprobs) for row in rows]


@pytest.mark.parametrize(
    "strategy",
    [
        None,
        "best_of_n:n=3",
        pytest.param("segment:entropy=2,max_tokens=7", marks=pytest.mark.slow),
        "blockwise",
    ],
)
def test_decoders_give_the_same_bits(strategy: str | None, engine: str) -> None:
    dropping, keeping = decoders("gemma3", "mistral", engine=engine)
    found = answers(dropping, strategy=strategy)
    assert found == answers(keeping, strategy=strategy)
    assert max(len(tokens) for tokens, *_ in found) == 24
    assert dropping.lm.runner.cache.slides
    # Whole answers are scored in one forward, without a cache.
    assert dropping.reward.models()[0].cache.slides == (strategy != "best_of_n:n=3")
    # Shorter rows keep the buffers; each prompt is prefilled as before.
    assert answers(dropping, 3) == answers(keeping, 3)
    scored = dropping.score(PROMPTS, [tokens for tokens, *_ in found])
    assert scored == keeping.score(PROMPTS, [tokens for tokens, *_ in found])


def test_samples_of_a_prompt_are_encoded_again_where_its_tokens_were_dropped() -> None:
    dropping, keeping = decoders("mistral", "gemma2")
    prompts, seeds = [PROMPTS[0]] * 8, list(range(8))
    found = [each.generate(prompts, 20, Guidance(k=5), seeds) for each in (dropping, keeping)]
    assert [row.tokens for row in found[0]] == [row.tokens for row in found[1]]
    assert found[1].stats.prompt_tokens_lm < found[0].stats.prompt_tokens_lm < 8 * len(PROMPTS[0])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt-oss"])
def test_recorded_steps_one_ahead_of_the_host(family: str, guard: Guard) -> None:
    dropping, keeping = decoders(family, "gemma3", engine="transformers")
    # On a CPU the bits of transformers' products depend on the rows of the batch: those of both are alike.
    graphs = [recorded(each) for each in (dropping, keeping)]
    for count in (24, 9):
        with guard.watched():
            found = answers(dropping, count, guidance=Guidance(k=4))
        assert found == answers(keeping, count, guidance=Guidance(k=4))
    assert len(graphs[0]) == len(graphs[1]) > 0


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_an_adapter_shares_the_forward(family: str, engine: str, tmp_path: Path) -> None:
    lm = language_model(family)
    folder = write_adapter(tmp_path / "adapter", lm, fork=1)

    def make() -> RewardGuidedDecoder:
        reward = SequenceReward(folder, share_trunk=True)
        return RewardGuidedDecoder.from_pretrained((copy.deepcopy(lm), None), reward=reward, engine=engine)

    dropping, keeping = make(), whole(make)
    assert answers(dropping) == answers(keeping)
    parts = [
        (first, last, branches, part.slides) for first, last, branches, part in dropping.lm.runner.cache.parts
    ]
    expected = {
        "mistral": [(0, 1, 1, True), (1, 3, 2, True)],
        "gemma2": [(0, 1, 1, True), (1, 2, 2, False), (2, 3, 2, True)],
    }
    assert parts == expected[family]


@pytest.mark.slow
def test_compiled_blocks() -> None:
    dropping, keeping = decoders("gemma2", "mistral", engine="transformers", compile=True)
    greedy = Guidance(k=4, temperature=0)
    found = [answers(each, guidance=greedy) for each in (dropping, keeping)]
    assert [tokens for tokens, *_ in found[0]] == [tokens for tokens, *_ in found[1]]


# ---- memory ----------------------------------------------------------------------------------------------------------


def gemma_3(window: int = 512) -> Any:
    """Five layers with a window for each without, and a context of 8192 tokens."""
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 2
    return language_model(
        "gemma3",
        num_hidden_layers=12,
        layer_types=kinds,
        sliding_window=window,
        max_position_embeddings=8192,
    )


def test_rows_of_8192_tokens_take_a_fraction_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(split_cache, "SLACK", 128)
    decoder = RewardGuidedDecoder.from_pretrained((gemma_3(), None), engine=engine)
    token = 2 * 2 * 8 * 4  # keys and values of one layer: 2 heads of 8 numbers in float32
    row = token * (2 * 8192 + 10 * (512 - 1 + 128))
    cache = decoder.lm.runner.cache
    assert cache.row_bytes(8192) == decoder._scheduler.bytes_per_row(8192, 0) == row
    assert (cache.prefill_bytes(639), cache.prefill_bytes(8192)) == (0, token * 10 * 8192)
    assert row < 0.24 * 12 * token * 8192
    assert inspect_decoder(decoder, [5])["memory"]["row_bytes"] == row
    cache.reserve(2, 8192)
    assert cache.nbytes() == 2 * row
    # Rows that no window is shorter than are stored as before, in one part.
    short = RewardGuidedDecoder.from_pretrained((gemma_3(), None), engine=engine)
    stats = short.generate([[5] * 20], 4).stats
    assert [part[:2] for part in short.lm.runner.cache.parts] == [(0, 12)]
    assert stats.cache_bytes["lm"] == 12 * token * (20 + 4 + 1)


def test_models_without_windows_have_one_plain_cache() -> None:
    runner = language_runner(language_model("gemma3", sliding_window=4096), "auto", None)
    assert type(runner.cache) is PrefixCache
    assert not runner.follows_lengths
    runner.reserve(2, 128)
    assert sum(buffer.nbytes for buffer in runner.cache.buffers()) == 2 * runner.cache.row_bytes(128)


def test_layers_with_a_window() -> None:
    found = {name: layer_windows(make()) for name, make in FAMILIES.items()}
    assert found["mistral"] == found["phi3"] == found["starcoder2"] == [WINDOW] * 3
    assert found["qwen2"] == [0, WINDOW, WINDOW]
    assert found["gemma2"] == found["gemma3"] == found["gpt-oss"] == [WINDOW, 0, WINDOW]
    assert layer_windows(tf.Qwen2Config(sliding_window=8, use_sliding_window=False, num_hidden_layers=2)) == [
        0,
        0,
    ]


# ---- what is refused -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_window_that_grows_after_loading_is_refused(engine: str) -> None:
    model = language_model("qwen2")
    runner = language_runner(model, engine, None)
    runner.reserve(1, LENGTH)
    for window, name in ((WINDOW + 1, f"{WINDOW + 1} tokens"), (None, "all tokens")):
        model.model.layers[2].self_attn.sliding_window = window
        runner.begin_run()
        with pytest.raises(
            RGTGError, match=f"attends {name} and its config has sliding_window={WINDOW}: set both alike"
        ):
            runner.prefill(0, [5, 6, 7])


@torch.inference_mode()
def test_a_row_is_not_cut_back_to_what_was_dropped(engine: str) -> None:
    runner = language_runner(language_model("gemma3"), engine, None)
    runner.reserve(1, LENGTH, undo=4)
    with pytest.raises(RGTGError, match=r"61 tokens exceed the cache \(60\)"):
        runner.prefill(0, [5] * 61)
    runner.prefill(0, PROMPTS[2])
    with pytest.raises(RGTGError, match=r"cannot be cut back to 26 tokens: .* larger undo"):
        runner.roll_back(0, len(PROMPTS[2]) - 5)
    runner.roll_back(0, len(PROMPTS[2]) - 4)
    runner.roll_back(0, 0)
    assert runner.length(0) == 0
