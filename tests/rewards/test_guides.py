"""Every guide against its formula computed naively, its cost against the table, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    FunctionReward,
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
    named_guide,
)
from rgtg_fast.methods import METHODS, Method
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.covering import daily, each
from tests.rewards import naive

EOS = 1
# A second guide of another shape, so that mixed-up caches would be seen.
OTHER = {"num_hidden_layers": 3, "num_key_value_heads": 4}


@dataclass
class Case:
    """A guide over tiny models and its formula."""

    reward: Reward
    formula: naive.Formula
    method: str


def _lm(seed: int, dtype: torch.dtype, **settings: Any) -> Any:
    return make_lm(seed, dtype, **settings)


def _pargs(dtype: torch.dtype) -> Case:
    model = make_rm(11, dtype)
    return Case(SequenceReward((model, None)), naive.sequence(model), "pargs")


def _rad(dtype: torch.dtype, invert: bool = False) -> Case:
    model = make_rm(12, dtype)
    return Case(RADReward((model, None), invert=invert), naive.rad(model, invert), "rad")


def _farma(dtype: torch.dtype) -> Case:
    model = _lm(13, dtype, **OTHER)
    return Case(VocabularyReward((model, None)), naive.farma(model), "farma")


def _genarm(dtype: torch.dtype) -> Case:
    model = _lm(14, dtype)
    return Case(AutoregressiveReward((model, None)), naive.genarm(model), "genarm")


def _eft(dtype: torch.dtype) -> Case:
    tuned, untuned = _lm(15, dtype), _lm(16, dtype, **OTHER)
    return Case(LogRatioReward((tuned, None), (untuned, None)), naive.log_ratio(tuned, untuned), "eft")


def _two_genarms(dtype: torch.dtype) -> Case:
    first, second = _genarm(dtype), _farma(dtype)
    return Case(
        MixtureReward([first.reward, second.reward], [0.75, -0.5]),
        naive.mixture((0.75, first.formula), (-0.5, second.formula)),
        "mixture",
    )


def _sequence_and_wide(dtype: torch.dtype) -> Case:
    parts = [_pargs(dtype), _eft(dtype), _farma(dtype)]
    weights = [1.5, 0.5, 0.25]
    return Case(
        MixtureReward([part.reward for part in parts], weights),
        naive.mixture(*zip(weights, [part.formula for part in parts], strict=True)),
        "mixture",
    )


MAKERS: dict[str, Callable[[torch.dtype], Case]] = {
    "pargs": _pargs,
    "rad": _rad,
    "rad inverse": lambda dtype: _rad(dtype, invert=True),
    "farma": _farma,
    "genarm": _genarm,
    "eft": _eft,
    "two wide ones": _two_genarms,
    "sequence and wide": _sequence_and_wide,
}
WIDE = ("farma", "genarm", "eft", "two wide ones")
# (engine, dtype): the fused layers know float32 and bfloat16 alone.
ENGINES = [("native", torch.float32), ("transformers", torch.float64)]


def decoder_for(reward: Any, engine: str, dtype: torch.dtype, max_batch: int = 3) -> RewardGuidedDecoder:
    base = (make_lm(0, dtype), None)
    return RewardGuidedDecoder.from_pretrained(base, reward=reward, engine=engine, max_batch=max_batch)


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 64) for _ in range(rng.randrange(1, 12))] for _ in range(count)]


def supports_of(name: str) -> tuple[str, ...]:
    return ("lm", "combined", "all") if name in WIDE else ("lm",)


CASES = [(name, support) for name in MAKERS for support in supports_of(name)]
# The default run has every two of guide, support and engine together.
CASES_ON_ENGINES = daily([(*case, *engine) for case, engine in product(CASES, ENGINES)])


@pytest.mark.parametrize(("name", "support", "engine", "dtype"), CASES_ON_ENGINES)
def test_greedy_equals_the_naive_formula(name: str, support: str, engine: str, dtype: torch.dtype) -> None:
    """More prompts than slots, of different lengths and ends, so that slots are refilled and rows move."""
    case = MAKERS[name](dtype)
    decoder = decoder_for(case.reward, engine, dtype)
    prompts = ragged_prompts(7)
    result = decoder.generate(prompts, 7, Guidance(5, 0.8, 0, support))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    lm = decoder.lm.runner.model
    for prompt, row in zip(prompts, result, strict=True):
        tokens, rewards = naive.guided(lm, case.formula, prompt, 5, 0.8, support, 7, EOS)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=tolerance)
        whole = sum(rewards) if case.reward.additive else rewards[-1]
        assert row.reward == pytest.approx(whole, abs=7 * tolerance)


@pytest.mark.parametrize(("name", "support", "engine", "dtype"), CASES_ON_ENGINES)
def test_a_trace_lists_the_rewards_of_the_support(
    name: str, support: str, engine: str, dtype: torch.dtype
) -> None:
    case = MAKERS[name](dtype)
    decoder = decoder_for(case.reward, engine, dtype)
    prompt = [9, 10, 11]
    row = decoder.generate([prompt], 3, Guidance(6, 0.8, 0.9, support), seed=5, trace=True)[0]
    lm = decoder.lm.runner.model
    for step in row.trace:
        answer = row.tokens[: step.position]
        logprobs = naive.logits_after(lm, [*prompt, *answer]).log_softmax(-1).tolist()
        values = {c.token: case.formula(prompt, answer, c.token) for c in step.candidates}
        for candidate in step.candidates:
            assert candidate.reward == pytest.approx(values[candidate.token], abs=1e-4)
            assert candidate.logprob == pytest.approx(logprobs[candidate.token], abs=1e-4)
        scores = logprobs
        if support != "lm":
            scores = [lp + 0.8 * case.formula(prompt, answer, v) for v, lp in enumerate(logprobs)]
        best = sorted(range(len(scores)), key=lambda v: -scores[v])[:6]
        assert {c.token for c in step.candidates} == set(best)


@pytest.mark.parametrize("name", MAKERS)
def test_scores_are_the_rewards_of_decoding(name: str) -> None:
    decoder = decoder_for(MAKERS[name](torch.float32).reward, "auto", torch.float32)
    prompts = ragged_prompts(4, seed=3)
    rows = decoder.generate(prompts, 6, Guidance(k=8, beta=0.5), seed=[1, 2, 3, 4])
    for row, scores in zip(rows, decoder.score(prompts, [row.tokens or [7] for row in rows]), strict=True):
        assert row.rewards == pytest.approx(scores[: len(row.rewards)], abs=1e-4)


@pytest.mark.parametrize(("name", "support"), daily(product(WIDE, ["lm", "combined", "all"]), each))
def test_a_row_depends_on_itself_alone(name: str, support: str) -> None:
    prompts, seeds = ragged_prompts(6, seed=8), list(range(6))
    guidance = Guidance(6, 0.7, 0.9, support)
    together = decoder_for(MAKERS[name](torch.float32).reward, "auto", torch.float32)
    rows = together.generate(prompts, 8, guidance, seeds)
    for prompt, seed, row in zip(prompts, seeds, rows, strict=True):
        assert together.generate([prompt], 8, guidance, seed)[0].tokens == row.tokens


@pytest.mark.parametrize("name", WIDE)
def test_rows_of_every_support_in_one_call(name: str) -> None:
    case = MAKERS[name](torch.float32)
    decoder = decoder_for(case.reward, "auto", torch.float32, max_batch=2)
    supports = ["all", "lm", "combined", "lm", "all", "combined"]
    prompts = ragged_prompts(6, seed=4)
    rows = decoder.generate(prompts, 5, [Guidance(5, 0.8, 0, support) for support in supports])
    for prompt, support, row in zip(prompts, supports, rows, strict=True):
        lm = decoder.lm.runner.model
        assert row.tokens == naive.guided(lm, case.formula, prompt, 5, 0.8, support, 5, EOS)[0]


@pytest.mark.parametrize(
    ("name", "support", "engine", "dtype"),
    daily(
        product(
            WIDE,
            ["lm", "combined", "all"],
            ["native", "transformers"],
            [torch.bfloat16, torch.float32],
        )
    ),
)
def test_wide_guides_serve_every_dtype(name: str, support: str, engine: str, dtype: torch.dtype) -> None:
    decoder = decoder_for(MAKERS[name](dtype).reward, engine, dtype)
    row = decoder.generate([[9, 10]], 4, Guidance(5, 0.5, 0, support))[0]
    rounding = 0.5 if dtype == torch.bfloat16 else 1e-4
    assert row.rewards == pytest.approx(decoder.score([[9, 10]], [row.tokens])[0], abs=rounding)


def test_a_guide_may_have_its_own_prompt_format() -> None:
    tokenizer = make_tokenizer()
    own = make_tokenizer("<system> w9 {% for m in messages %}<user> {{ m.content }} {% endfor %}w3")
    model = make_lm(14)
    for reward in (
        VocabularyReward((model, own)),
        VocabularyReward((model, tokenizer), chat_template=own.chat_template),
    ):
        decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=reward)
        chat = [{"role": "user", "content": "w1 w2"}]
        text = tokenizer("<system> w9 <user> w1 w2 w3")["input_ids"]
        row = decoder.generate(chat, 4, Guidance(5, 1.0, 0, "combined"))[0]
        for i, (token, reward_seen) in enumerate(zip(row.tokens, row.rewards, strict=True)):
            expected = naive.farma(model)(text, row.tokens[:i], token)
            assert reward_seen == pytest.approx(expected, abs=1e-4)


# ---- cost ------------------------------------------------------------------------------------------------------------


def _cost_cases() -> dict[str, Callable[[], Reward]]:
    def of(name: str) -> Callable[[], Reward]:
        return lambda: MAKERS[name](torch.float32).reward

    tokenizer = make_tokenizer()
    return {
        "pargs": of("pargs"),
        "args": of("pargs"),
        "cd-fudge": of("pargs"),
        "rad": of("rad"),
        "farma": of("farma"),
        "genarm": of("genarm"),
        "eft": of("eft"),
        "contrastive": lambda: ContrastiveReward("w1 w2", "w3"),
        "text": lambda: TextReward((make_rm(2, pad_token_id=0), tokenizer), template="{prompt} {answer}"),
        "function": lambda: FunctionReward(lambda prefix, ids: -ids.float()),
    }


@pytest.mark.parametrize("method", [m for m in METHODS if m.cost is not None], ids=lambda method: method.name)
def test_costs_are_the_table(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where tokens enter the models too, not by our counters alone."""
    reward = _cost_cases()[method.name]()
    tokenizer = make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=reward, max_batch=3)
    decoder.lm.runner.model.generation_config.eos_token_id = []  # no row ends early
    backbones = [("lm", decoder.lm.runner)]
    backbones += [("reward", runner) for runner in reward.models()]
    seen: dict[str, list[int]] = {"lm": [], "reward": []}
    for name, runner in backbones:
        forward = runner.layers.forward

        def counted(ids: torch.Tensor, *args: Any, name: str = name, forward: Any = forward) -> torch.Tensor:
            seen[name].append(ids.numel())
            return forward(ids, *args)

        monkeypatch.setattr(runner.layers, "forward", counted)
    prompts = [[7, 8, 9, 10], [11, 12], [13, 14, 15]]
    rows, k, steps = len(prompts), 6, 5
    texts: Any = [tokenizer.decode(ids) for ids in prompts]
    stats = decoder.generate(texts, steps, Guidance(k, 0.3)).stats
    cost = method.cost
    assert cost is not None
    assert stats.steps == steps
    assert stats.lm_calls == steps * cost.lm_calls
    assert stats.lm_tokens == steps * cost.lm_tokens(rows, k)
    assert stats.reward_calls == steps * cost.reward_calls
    if method.name != "text":
        assert stats.reward_tokens == steps * cost.reward_tokens(rows, k)
    in_steps = {"lm": steps * cost.lm_calls, "reward": steps * cost.reward_calls}
    for name in seen:
        if seen[name]:
            counter = {"lm": stats.lm_tokens, "reward": stats.reward_tokens}[name]
            assert sum(seen[name][-in_steps[name] :]) == counter
    prompt_tokens = sum(seen["reward"]) - stats.reward_tokens
    if seen["reward"]:
        assert stats.prompt_tokens_reward == prompt_tokens


def test_a_mixture_costs_what_its_guides_cost() -> None:
    parts = [_pargs(torch.float32).reward, _eft(torch.float32).reward, ContrastiveReward("w1", "w2")]
    tokenizer = make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=MixtureReward(parts))
    decoder.lm.runner.model.generation_config.eos_token_id = []  # no row ends early
    stats = decoder.generate(["w1 w2", "w3"], 5, Guidance(k=6)).stats
    assert (stats.lm_calls, stats.lm_tokens) == (5, 5 * 2 * 3)
    assert (stats.reward_calls, stats.reward_tokens) == (5 * 3, 5 * (2 * 6 + 2 * 2))
    # A sequence reward's prompt is prefilled whole; a wide guide's last token is decoded.
    assert stats.prompt_tokens_reward == (2 + 1) + 2 * (1 + 0)
    assert stats.cache_bytes["reward"] == decoder.reward.cache_bytes() > 0


# ---- mixtures --------------------------------------------------------------------------------------------------------


def test_weights_per_request() -> None:
    first, second = _farma(torch.float32), _pargs(torch.float32)
    mixture = MixtureReward([first.reward, second.reward], [1.0, 1.0])
    decoder = decoder_for(mixture, "auto", torch.float32)
    weights = [(1.0, 0.0), (0.0, 1.0), (0.3, -0.7), None, (0.5, 0.5), (2.0, 0.1)]
    prompts = ragged_prompts(6, seed=2)
    guidance = [Guidance(6, 1.0, 0, weights=w) for w in weights]
    rows = decoder.generate(prompts, 6, guidance)
    for prompt, given, row in zip(prompts, weights, rows, strict=True):
        pair = given or (1.0, 1.0)
        formula = naive.mixture((pair[0], first.formula), (pair[1], second.formula))
        tokens, rewards = naive.guided(decoder.lm.runner.model, formula, prompt, 6, 1.0, "lm", 6, EOS)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=1e-4)
    mixture.weights = (0.0, 2.0)
    assert decoder.score([[9]], [[10, 11]])[0] == pytest.approx(
        [2 * second.formula([9], [], 10), 2 * second.formula([9], [10], 11)], abs=1e-4
    )


def test_weights_follow_their_row_to_another_slot() -> None:
    """The first row ends at once, and the last row takes its slot."""
    first = _farma(torch.float32)
    ending = FunctionReward(lambda prefix, ids: 1e4 * (ids == EOS).float())
    decoder = decoder_for(MixtureReward([first.reward, ending]), "auto", torch.float32)
    weights = [(1.0, 1.0), (0.5, 0.0), (-2.0, 0.0)]
    prompts = ragged_prompts(3, seed=5)
    rows = decoder.generate(prompts, 8, [Guidance(64, 1.0, 0, weights=w) for w in weights])
    assert rows[0].tokens == []
    for prompt, (weight, _), row in list(zip(prompts, weights, rows, strict=True))[1:]:
        formula = naive.mixture((weight, first.formula))
        assert row.tokens == naive.guided(decoder.lm.runner.model, formula, prompt, 64, 1.0, "lm", 8, EOS)[0]


def test_a_mixture_of_contexts_texts_and_functions() -> None:
    """Guides that need rows of the base model's batch, their own cache, or the rows' texts, in any order."""
    model, tokenizer = make_rm(11), make_tokenizer()
    better, worse = "w1 w2", "w3"

    def by_id(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        return torch.stack([len(p) * row / 50 for p, row in zip(prefix_ids, candidates, strict=True)])

    weights = [0.5, 1.0, 0.25, 2.0]
    mixture = MixtureReward(
        [
            FunctionReward(by_id),
            SequenceReward((model, tokenizer)),
            ContrastiveReward(better, worse),
            TextReward(lambda prompts, answers: [float(len(a.split())) for a in answers]),
        ],
        weights,
    )
    lm = make_lm()
    decoder = RewardGuidedDecoder.from_pretrained((lm, tokenizer), reward=mixture, max_batch=2)
    texts = ["w4 w5 w6", "w7", "w8 w9", "w10 w11 w12 w13"]

    def contrastive(prompt: list[int], answer: list[int], token: int) -> float:
        rewards = [
            naive.genarm(lm)([*tokenizer(instruction)["input_ids"], *prompt], answer, token)
            for instruction in (better, worse)
        ]
        return rewards[0] - rewards[1]

    formula = naive.mixture(
        (0.5, lambda prompt, answer, token: len(prompt + answer) * token / 50),
        (1.0, naive.sequence(model)),
        (0.25, contrastive),
        (2.0, lambda prompt, answer, token: len([t for t in [*answer, token] if t > 2])),
    )
    rows = decoder.generate(texts, 6, Guidance(5, 0.5, 0))
    for text, row in zip(texts, rows, strict=True):
        prompt = tokenizer(text)["input_ids"]
        tokens, rewards = naive.guided(lm, formula, prompt, 5, 0.5, "lm", 6, EOS)
        assert row.tokens == tokens
        assert row.rewards == pytest.approx(rewards[: len(tokens)], abs=1e-3)


def test_a_weight_of_zero_takes_out_what_a_guide_says() -> None:
    nothing = FunctionReward(lambda prefix, ids: torch.full(ids.shape, torch.nan))
    farma = _farma(torch.float32)
    decoder = decoder_for(MixtureReward([farma.reward, nothing], [1.0, 0.0]), "auto", torch.float32)
    row = decoder.generate([[9, 10]], 5, Guidance(k=5, temperature=0))[0]
    lm = decoder.lm.runner.model
    assert row.tokens == naive.guided(lm, farma.formula, [9, 10], 5, 1.0, "lm", 5, EOS)[0]
    assert decoder.score([[9]], [[10]])[0] == pytest.approx([farma.formula([9], [], 10)], abs=1e-4)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 rewards"),
        ([1.0, float("nan")], "weights[1]=nan is not finite"),
        ([-float("inf"), 1.0], "weights[0]=-inf is not finite"),
        ([1.0, "much"], "weights[1]='much' is not a number"),
        ("11", "weights='11' is not a list of numbers"),
        (3.0, "weights=3.0 is not a list of numbers"),
    ],
)
def test_weights_that_cannot_be(weights: Any, message: str) -> None:
    parts = [ContrastiveReward(), FunctionReward(lambda prefix, ids: ids.float())]
    with pytest.raises(RGTGError) as error:
        MixtureReward(parts, weights)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if len(parts) != 2 or "for 2 rewards" not in message:
        with pytest.raises(RGTGError):
            Guidance(weights=weights)


def test_mixtures_that_cannot_be() -> None:
    contrastive = ContrastiveReward()
    for rewards, message in (
        ([], "a mixture of no rewards"),
        ([contrastive, contrastive], "the same reward twice"),
        ([MixtureReward([contrastive])], "a mixture inside a mixture"),
        (["some/path"], "takes reward objects and got 'some/path'"),
    ):
        with pytest.raises(RGTGError, match=message):
            MixtureReward(rewards)


def test_weights_for_a_guide_that_is_no_mixture() -> None:
    decoder = decoder_for(_farma(torch.float32).reward, "auto", torch.float32)
    with pytest.raises(RGTGError, match="2 weights in the guidance and this decoder mixes 0 rewards"):
        decoder.generate([[9]], 2, Guidance(weights=(1.0, 2.0)))
    mixed = decoder_for(_two_genarms(torch.float32).reward, "auto", torch.float32)
    with pytest.raises(RGTGError, match="3 weights in the guidance and this decoder mixes 2 rewards"):
        mixed.generate([[9]], 2, Guidance(weights=(1.0, 2.0, 3.0)))


def test_a_mixture_that_is_not_wide_has_no_whole_vocabulary() -> None:
    decoder = decoder_for(_sequence_and_wide(torch.float32).reward, "auto", torch.float32)
    for support in ("combined", "all"):
        with pytest.raises(RGTGError, match=f"support='{support}' needs a reward over the whole vocabulary"):
            decoder.generate([[9]], 2, Guidance(support=support))


@pytest.mark.parametrize("make", [VocabularyReward, AutoregressiveReward, lambda m: LogRatioReward(m, m)])
@pytest.mark.parametrize("width", [63, 65])
def test_a_head_of_another_width(make: Any, width: int) -> None:
    with pytest.raises(RGTGError) as error:
        decoder_for(make((make_lm(3, vocab_size=width), None)), "auto", torch.float32)
    assert f"gives {width} scores and the base model's vocabulary has 64 tokens" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wider_padded_head_over_the_same_tokenizer_serves() -> None:
    tokenizer = make_tokenizer()
    wider = make_lm(3, vocab_size=80)
    for reward in (VocabularyReward((wider, make_tokenizer())), AutoregressiveReward((wider, tokenizer))):
        decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=reward)
        row = decoder.generate([[9, 10]], 6, Guidance(5, 3.0, 0, "all"))[0]
        assert max(row.tokens) < 64


def test_mixtures_over_different_vocabularies() -> None:
    tokenizer = make_tokenizer()
    other = make_tokenizer(words=[*reversed(["<pad>", "<eos>", "<unk>"]), *(f"v{i}" for i in range(61))])
    mixture = MixtureReward(
        [VocabularyReward((make_lm(3), tokenizer)), AutoregressiveReward((make_lm(4), other))]
    )
    with pytest.raises(RGTGError, match=r"the tokenizers of .* differ in \d+ of \d+ tokens: token 0"):
        RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=mixture)


def test_guides_that_belong_to_no_decoder() -> None:
    with pytest.raises(RGTGError, match="this VocabularyReward belongs to no decoder yet"):
        _ = VocabularyReward("x").name


def test_files_that_are_no_such_guide(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_rm(1).save_pretrained(tmp_path / "rm")
    make_lm(1).save_pretrained(tmp_path / "lm")
    for folder in ("rm", "lm"):
        tokenizer.save_pretrained(tmp_path / folder)

    def load(reward: Reward) -> RewardGuidedDecoder:
        return RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=reward)

    with pytest.raises(RGTGError, match="needs a vocabulary head: use SequenceReward"):
        load(VocabularyReward(tmp_path / "rm"))
    with pytest.raises(RGTGError, match="and a reward model needs 1"):
        load(RADReward(tmp_path / "lm"))
    with pytest.raises(RGTGError, match=r"reward model .* does not exist"):
        load(AutoregressiveReward(tmp_path / "nothing"))
    assert load(AutoregressiveReward(tmp_path / "lm")).describe()["reward_engine"]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_of_guides() -> None:
    for name, kind in (
        ("some/path", SequenceReward),
        ("pargs:some/path", SequenceReward),
        ("args:some/path", SequenceReward),
        ("cd-fudge:some/path", SequenceReward),
        ("rad:some/path", RADReward),
        ("farma:some/path", VocabularyReward),
        ("genarm:some/path", AutoregressiveReward),
        ("eft:tuned, untuned", LogRatioReward),
        ("text:some/path", TextReward),
        ("contrastive", ContrastiveReward),
        ("C:/models/rm", SequenceReward),
    ):
        assert type(named_guide(name)) is kind, name
    inverse = named_guide("rad-inverse:p")
    assert isinstance(inverse, RADReward)
    assert inverse.invert
    sequence = named_guide("pargs: some/path")
    assert isinstance(sequence, SequenceReward)
    assert sequence.source == "some/path"


def test_mixtures_by_name() -> None:
    mixture = named_guide("mixture:0.7*pargs:a+b/c++ + -1e-1*farma:d+.5*contrastive")
    assert isinstance(mixture, MixtureReward)
    assert mixture.weights == (0.7, -0.1, 0.5)
    assert [type(part) for part in mixture.rewards] == [SequenceReward, VocabularyReward, ContrastiveReward]
    assert mixture.rewards[0].source == "a+b/c++"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("farma:", "'farma:' names no model"),
        ("rad:  ", "names no model"),
        ("eft:one", "names one model and needs two"),
        ("eft:one,", "names one model and needs two"),
        ("mixture:pargs:a", "'pargs:a' is not a term of a mixture"),
        ("mixture:0.5*", "is not a term of a mixture"),
        ("mixture:0.5*mixture:1*contrastive", "a mixture inside a mixture"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(RGTGError) as error:
        named_guide(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
