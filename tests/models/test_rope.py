"""Longrope: every row is computed by the frequencies of its own length, as the model computes its text alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from rgtg_fast import (
    AutoregressiveReward,
    BestOfN,
    Blocks,
    ContrastiveReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RewardGuidedDecoder,
    RGTGError,
    Segments,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.models import verification
from rgtg_fast.models.attention import own_attention
from rgtg_fast.models.loading import language_runner, reward_runner
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.rope import RowRope
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.rewards.base import Prefix
from tests.conftest import make_lm, make_tokenizer
from tests.engine.host_reads import Guard
from tests.engine.naive import guided_greedy
from tests.engine.test_ahead import EagerRecorder, guard, recorded
from tests.models.adapters import write_adapter

__all__ = ["guard"]
ORIGINAL, CONTEXT = 16, 64
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 5.0, 0.3, 9.0]
FAMILIES = ("Phi3Config", "LlamaConfig", "PhimoeConfig")
GREEDY = Guidance(k=5, beta=1.0, temperature=0)
# Below the original context for good, crossing it soon and late, at its edge, and beyond it.
LENGTHS = (3, 12, 14, 15, 16, 17, 30)


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(6, 64, (length,), generator=generator).tolist()


def config(family: str = "Phi3Config", original: int = ORIGINAL, **settings: Any) -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": original,
    }
    if family == "PhimoeConfig":
        rope |= {"short_mscale": 1.1, "long_mscale": 1.3}
        settings |= {"num_local_experts": 4, "sliding_window": None}
    if family != "LlamaConfig":
        settings["original_max_position_embeddings"] = original
    return getattr(tf, family)(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "initializer_range": 0.4,
            "rope_parameters": rope,
            **settings,
        }
    )


def make(
    kind: str, family: str = "Phi3Config", seed: int = 0, dtype: Any = torch.float32, **settings: Any
) -> Any:
    torch.manual_seed(seed)
    if kind == "lm":
        model = tf.AutoModelForCausalLM.from_config(config(family, **settings))
        model.generation_config.eos_token_id = []
    else:
        model = tf.AutoModelForSequenceClassification.from_config(config(family, num_labels=1, **settings))
    return model.to(dtype).eval()


def runner_of(kind: str, family: str = "Phi3Config", **settings: Any) -> ModelRunner:
    load = language_runner if kind == "lm" else reward_runner
    return load(make(kind, family, **settings), "auto", None)


@torch.inference_mode()
def alone(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """The state [E] after a text by transformers' own forward of that text, without a cache."""
    with own_attention(runner.model):
        return runner.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


def equal(found: torch.Tensor, own: torch.Tensor) -> None:
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_the_two_sets_differ() -> None:
    """The reference itself changes at the limit, so that a wrong set of frequencies cannot pass."""
    runner, ids = runner_of("lm"), text(ORIGINAL + 1)
    with torch.inference_mode():
        own = runner.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, ORIGINAL - 1]
    assert float((own - alone(runner, ids[:ORIGINAL])).abs().max()) > 0.1


# ---- the runner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lm", "reward"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_ragged_rows_of_candidates_equal_uncached_forwards(family: str, kind: str) -> None:
    runner = runner_of(kind, family)
    assert runner.engine == "transformers"
    rows = [text(length) for length in LENGTHS]
    runner.reserve(len(rows), 48)
    for slot, ids in enumerate(rows):
        runner.begin(slot, ids)
    for step in range(8):
        candidates = torch.tensor([text(3, 10 * step + slot) for slot in range(len(rows))])
        hidden = runner.step(candidates)
        for slot, ids in enumerate(rows):
            for one in (0, 2):
                equal(hidden[slot, one], alone(runner, [*ids, int(candidates[slot, one])]))
        choice = torch.tensor([(step + slot) % 3 for slot in range(len(rows))])
        runner.commit(choice)
        rows = [[*ids, int(candidates[i, choice[i]])] for i, ids in enumerate(rows)]


@torch.inference_mode()
def test_a_row_is_the_same_in_any_batch() -> None:
    runner = runner_of("lm")
    rows, found = [text(length) for length in LENGTHS], []
    for batch in (rows, *([ids] for ids in rows)):
        runner.reserve(len(batch), 48)
        for slot, ids in enumerate(batch):
            runner.begin(slot, ids)
        found += list(runner.step(torch.tensor([[7, 9]] * len(batch))))
    for together, single in zip(found[: len(rows)], found[len(rows) :], strict=True):
        torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_chunk_across_the_limit_gives_the_state_of_each_prefix() -> None:
    runner, ids = runner_of("reward"), text(24)
    for start in (0, 1, 9, 15, 16, 17):
        runner.reserve(1, 32)
        runner.prefill(0, ids[:start])
        hidden = runner.prefill(0, ids[start:])
        for i, state in enumerate(hidden):
            equal(state, alone(runner, ids[: start + i + 1]))
        assert runner.length(0) == 24
    uncached = runner.hidden_uncached(ids)
    for i, state in enumerate(uncached):
        equal(state, alone(runner, ids[: i + 1]))


@torch.inference_mode()
def test_a_row_that_is_cut_back_follows_its_length() -> None:
    runner, ids = runner_of("lm"), text(20)
    runner.reserve(2, 32)
    runner.begin(0, ids)
    for length in (10, 18, 15, 16, 3, 24):
        if length > runner.length(0):
            ids = [*ids[: runner.length(0)], *text(length - runner.length(0), length)]
            equal(runner.prefill(0, ids[runner.length(0) :])[-1], alone(runner, ids[:length]))
        else:
            runner.roll_back(0, length)
        equal(runner.step(torch.tensor([[9]]))[0, 0], alone(runner, [*ids[:length], 9]))
    runner.move(0, 1)
    equal(runner.step(torch.tensor([[8], [9]]))[1, 0], alone(runner, [*ids[:24], 9]))


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_any_order_of_operations(seed: int) -> None:
    """Rows begin, grow token by token and in chunks, are cut back, moved and copied in a random order."""
    runner, rng, slots = runner_of("lm", FAMILIES[seed % 3]), random.Random(seed), 3
    prompts = [text(length, seed) for length in (5, 14, 15, 16, 20)]
    runner.reserve(slots, 40)
    rows: list[list[int]] = []
    for slot in range(slots):
        rows.append(list(rng.choice(prompts)))
        runner.begin(slot, rows[slot])
    for number in range(40):
        slot, other = rng.randrange(slots), rng.randrange(slots)
        kind = rng.choice(["step", "step", "begin", "prefill", "roll_back", "move"])
        if kind == "step" and max(map(len, rows)) < 40:
            candidates = torch.tensor([text(2, 1000 * seed + 10 * number + b) for b in range(slots)])
            hidden, choice = runner.step(candidates), torch.tensor([rng.randrange(2) for _ in range(slots)])
            runner.commit(choice)
            for b, chosen in enumerate(choice.tolist()):
                rows[b] = [*rows[b], int(candidates[b, chosen])]
                equal(hidden[b, chosen], alone(runner, rows[b]))
        elif kind == "begin":
            rows[slot] = list(rng.choice(prompts))
            runner.begin(slot, rows[slot])
        elif kind == "prefill" and len(rows[slot]) < 34:
            start = len(rows[slot])
            rows[slot] = [*rows[slot], *text(6, number)]
            for i, state in enumerate(runner.prefill(slot, rows[slot][start:]), start + 1):
                equal(state, alone(runner, rows[slot][:i]))
        elif kind == "roll_back":
            rows[slot] = rows[slot][: rng.randrange(1, len(rows[slot]) + 1)]
            runner.roll_back(slot, len(rows[slot]))
        elif kind == "move":
            rows[other] = list(rows[slot])
            if slot != other:
                runner.move(slot, other)
        assert runner.lengths == [len(row) for row in rows]


@torch.inference_mode()
def test_a_prompt_is_not_copied_from_a_row_of_the_other_set() -> None:
    runner, ids = runner_of("lm"), text(14)
    runner.reserve(2, 32)
    runner.begin(0, ids)
    for token in (7, 8, 9):
        runner.step(torch.tensor([[token]]))
        runner.commit(torch.tensor([0]))
    runner.begin(1, ids)
    assert runner.encoded(1) == 14
    runner.begin(1, ids)
    assert runner.encoded(1) == 0
    hidden = runner.step(torch.tensor([[5], [6]]))
    equal(hidden[0, 0], alone(runner, [*ids, 7, 8, 9, 5]))
    equal(hidden[1, 0], alone(runner, [*ids, 6]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("original", [ORIGINAL, 1000])
def test_other_dtypes_and_a_long_original_context_are_verified(original: int, dtype: torch.dtype) -> None:
    runner = runner_of("lm", dtype=dtype, original=original, max_position_embeddings=2000)
    assert runner.rope is not None
    assert runner.rope.original == original
    assert runner.model.config.rope_parameters["original_max_position_embeddings"] == original


@pytest.mark.parametrize("original", [ORIGINAL, 1000])
@pytest.mark.parametrize("broken", ["_follow", "_by_row"])
def test_verification_notices_the_wrong_set(
    broken: str, original: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "_follow":
        monkeypatch.setattr(ModelRunner, "_follow", lambda self, slot, length: None)
    else:
        monkeypatch.setattr(RowRope, "_by_row", RowRope._long)
    with pytest.raises(RGTGError, match="cached forward differs"):
        runner_of("lm", original=original, max_position_embeddings=2000)


def test_a_model_without_longrope_and_a_short_cache_have_no_row_rope() -> None:
    assert language_runner(make_lm(), "transformers", None).rope is None
    short = language_runner(make("lm"), "auto", ORIGINAL)
    assert short.rope is None
    assert short.limit == ORIGINAL
    runner = runner_of("lm")
    assert "forward" not in vars(runner.model.base_model.rotary_emb)


def test_the_native_engine_says_that_it_cannot() -> None:
    with pytest.raises(RGTGError, match="rope type 'longrope'"):
        language_runner(make("lm", "LlamaConfig"), "native", None)


def test_a_longrope_of_unknown_code_is_refused_beyond_its_original_context() -> None:
    model = make("lm")
    model.model.rotary_emb.rope_type = "su"
    with pytest.raises(RGTGError, match=r"max_length=16 works") as error:
        language_runner(model, "auto", None)
    assert "\n" not in str(error.value)
    assert language_runner(model, "auto", ORIGINAL).limit == ORIGINAL


def test_the_probe_reaches_both_sets() -> None:
    runner = runner_of("lm")
    assert len(verification.probe(runner)) == ORIGINAL + 2


# ---- the decoder -----------------------------------------------------------------------------------------------------

PROMPTS = [text(length) for length in (4, 13, 16, 17, 25)]


def decoder_of(reward: Any, lm: Any = None, **settings: Any) -> RewardGuidedDecoder:
    base = (make("lm") if lm is None else lm, make_tokenizer())
    return RewardGuidedDecoder.from_pretrained(base, reward=reward, **{"max_batch": 3, **settings})


@pytest.mark.parametrize("family", FAMILIES[:2])
@torch.inference_mode()
def test_greedy_decoding_equals_the_naive_loop(family: str) -> None:
    lm, rm = make("lm", family), make("reward", family, 1)
    decoder = decoder_of(SequenceReward((rm, make_tokenizer())), lm)
    rows = decoder.generate(PROMPTS, 16, GREEDY)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.tokens == guided_greedy(lm, rm, prompt, 5, 1.0, 16)
        scores = decoder.reward.score_answer(Prefix(Prompt(prompt), prompt), row.tokens)
        assert row.rewards == pytest.approx(scores, abs=1e-4)


@torch.inference_mode()
def test_an_adapter_in_the_base_models_forward(tmp_path: Path) -> None:
    lm = make("lm", "LlamaConfig", num_hidden_layers=3)
    folder = write_adapter(tmp_path, lm, 1)
    shared = decoder_of(SequenceReward(folder, share_trunk=True), lm)
    own = decoder_of(SequenceReward(folder, share_trunk=False), lm)
    for row, other in zip(*(d.generate(PROMPTS, 16, GREEDY) for d in (shared, own)), strict=True):
        assert row.tokens == other.tokens
        assert row.rewards == pytest.approx(other.rewards, abs=1e-4)
        scores = shared.reward.score_answer(
            Prefix(Prompt(PROMPTS[row.index]), PROMPTS[row.index]), row.tokens
        )
        assert row.rewards == pytest.approx(scores, abs=1e-4)


REWARDS: dict[str, Callable[[], Any]] = {
    "sequence": lambda: SequenceReward((make("reward", seed=1), make_tokenizer())),
    "farma": lambda: VocabularyReward((make("lm", seed=3), make_tokenizer())),
    "genarm": lambda: AutoregressiveReward((make("lm", seed=4), make_tokenizer())),
    "eft": lambda: LogRatioReward(
        (make("lm", seed=5), make_tokenizer()), (make("lm", seed=6), make_tokenizer())
    ),
    "contrastive": lambda: ContrastiveReward("w1 w2", "w3"),
    "mixture": lambda: MixtureReward([REWARDS["sequence"](), ContrastiveReward("w1", "w2 w3 w4")]),
}


@pytest.mark.parametrize("reward", REWARDS)
@torch.inference_mode()
def test_decoded_rewards_are_those_of_the_answer(reward: str) -> None:
    """Against uncached forwards, and the same row alone; the rows differ in which set they are in."""
    decoder = decoder_of(REWARDS[reward]())
    prompts = [" ".join(f"w{token - 6}" for token in prompt) for prompt in PROMPTS]
    rows = decoder.generate(prompts, 16, GREEDY)
    for prompt, ids, row in zip(prompts, PROMPTS, rows, strict=True):
        scores = decoder.reward.score_answer(Prefix(Prompt(prompt), ids), row.tokens)
        assert row.rewards == pytest.approx(scores, abs=2e-4)
        assert row.tokens == decoder.generate([prompt], 16, GREEDY)[0].tokens


class StepsOnly(EagerRecorder):
    """Refuses a prefill within a recorded step, whose Python code a graph does not run."""

    def __init__(self, decoder: RewardGuidedDecoder, monkeypatch: pytest.MonkeyPatch):
        super().__init__(decoder)
        self.inside, run_causal = False, ModelRunner._run_causal

        def checked(runner: ModelRunner, *args: Any) -> torch.Tensor:
            assert not self.inside, "a prefill within a recorded step"
            return run_causal(runner, *args)

        monkeypatch.setattr(ModelRunner, "_run_causal", checked)

    def _within(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any) -> Any:
            self.inside = True
            try:
                return run(*args)
            finally:
                self.inside = False

        return within

    def warm_up(self, step: Callable[[], object]) -> None:
        self._within(super().warm_up)(step)

    def record(self, *args: Any) -> Callable[[], Any]:
        return self._within(self._within(super().record)(*args))


@pytest.mark.parametrize("pad_batch", [False, True])
@pytest.mark.parametrize("reward", ["sequence", "genarm"])
def test_steps_that_are_replayed_ahead_of_the_host(
    reward: str, pad_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guidance = Guidance(k=5, beta=1.0, temperature=0.9)
    decoders = [decoder_of(REWARDS[reward](), pad_batch=pad_batch and i == 1) for i in range(2)]
    for decoder in decoders:
        decoder.lm.runner.model.generation_config.eos_token_id = [1, *range(8, 64, 9)]
    graphs = recorded(decoders[1])
    graphs.recorder = StepsOnly(decoders[1], monkeypatch)
    prompts = [text(length, seed) for seed, length in enumerate((4, 13, 16, 17, 25, 14, 15, 2, 11))]
    want, got = (d.generate(prompts, 20, guidance, seed=list(range(9))) for d in decoders)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    assert any(len(row.tokens) > 4 for row in got)
    assert len(graphs) > 0
    for row, other in zip(got, want, strict=True):
        assert row.rewards == pytest.approx(other.rewards, abs=1e-5)


def test_a_slot_without_a_row_never_crosses() -> None:
    """Two rows end after 14 tokens; one slot stays empty, and the host counts on to 26 of a cache of 14."""
    decoder = decoder_of(REWARDS["sequence"](), max_batch=2, pad_batch=True)
    prompts = [text(2, seed) for seed in range(3)]
    rows = decoder.generate(prompts, 12, GREEDY)
    assert rows[2].tokens == decoder.generate([prompts[2]], 12, GREEDY)[0].tokens
    assert rows.stats.prompt_tokens_reward == 6


def test_a_row_that_crosses_reads_nothing_on_the_host(guard: Guard) -> None:
    decoder = decoder_of(REWARDS["sequence"]())
    decoder.max_in_flight = 1
    want = decoder.generate(PROMPTS, 12, GREEDY)
    with guard.watched():
        got = decoder.generate(PROMPTS, 12, GREEDY)
    assert [row.tokens for row in got] == [row.tokens for row in want]


def test_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as they would be compiled, and then run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (
        decoder_of(None, make("lm", num_hidden_layers=1), compile=compiles) for compiles in (False, True)
    )
    for row, other in zip(*(d.generate(PROMPTS[:3], 8, GREEDY) for d in (plain, compiled)), strict=True):
        assert row.tokens == other.tokens
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "strategy", [BestOfN(n=3), Blocks(k=2, length=4), Segments(max_tokens=5, target=3.0)]
)
@torch.inference_mode()
def test_strategies_score_the_answer_that_they_give(strategy: Any) -> None:
    decoder = decoder_of(REWARDS["sequence"]())
    rows = decoder.generate(PROMPTS, 14, strategy=strategy, seed=[3] * len(PROMPTS))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        scores = decoder.reward.score_answer(Prefix(Prompt(prompt), prompt), row.tokens)
        assert row.reward == pytest.approx(scores[-1], abs=1e-4)
        logits = [
            decoder.lm.runner.model(torch.tensor([[*prompt, *row.tokens[:i]]])).logits[0, -1]
            for i in range(len(row.tokens))
        ]
        own = [float(x.log_softmax(-1)[token]) for x, token in zip(logits, row.tokens, strict=True)]
        assert row.logprobs == pytest.approx(own, abs=1e-3)


@torch.inference_mode()
def test_a_gate_that_keeps_the_reward_out_of_some_steps() -> None:
    decoder = decoder_of(REWARDS["sequence"]())
    gated = Guidance(k=5, beta=1.0, temperature=0, gate_entropy=2.8)
    rows = decoder.generate(PROMPTS, 16, gated)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        scores = decoder.reward.score_answer(Prefix(Prompt(prompt), prompt), row.tokens)
        found = [(r, s) for r, s in zip(row.rewards, scores, strict=True) if r == r]
        assert 0 < len(found) < len(scores)
        assert [r for r, _ in found] == pytest.approx([s for _, s in found], abs=1e-4)
        assert row.tokens == decoder.generate([prompt], 16, gated)[0].tokens


@torch.inference_mode()
def test_texts_of_a_batch_do_not_change_one_another() -> None:
    tokenizer, rm = make_tokenizer(), make("reward", seed=1)
    decoder = decoder_of(TextReward((rm, tokenizer), template="{prompt} {answer}"))
    words = [f"w{token - 6}" for token in text(30)]
    prefixes = [Prefix(Prompt(" ".join(words[:n])), []) for n in (3, 12, 28)]
    found = decoder.reward._rewards(prefixes, ["w1"] * 3)
    for prefix, reward in zip(prefixes, found.tolist(), strict=True):
        ids = tokenizer(f"{prefix.prompt.given} w1")["input_ids"]
        assert reward == pytest.approx(float(rm(torch.tensor([ids])).logits[0, 0]), abs=1e-4)


def test_a_dynamic_rope_ends_with_its_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    lm = make_lm(rope_parameters=rope, max_position_embeddings=32)
    with pytest.raises(
        RGTGError, match=r"dynamic rope, the cache is for 33 tokens \(max_length=32 works\)"
    ) as error:
        decoder_of(None, lm, max_length=33)
    assert "\n" not in str(error.value)
    decoder = decoder_of(None, lm, max_length=32)
    with pytest.raises(
        RGTGError, match=r"exceed its 32, beyond which every further token changes .* dynamic"
    ):
        decoder.generate([text(20)], 13)
    assert len(decoder.generate([text(20)], 12)[0].tokens) <= 12
