"""Reward models with heads of others give the rewards of their own formula, or are refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from rgtg_fast import (
    Guidance,
    MixtureReward,
    RADReward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    TextReward,
)
from rgtg_fast.evaluation.accuracy import score_pairs
from rgtg_fast.evaluation.judge import Judge, load_classifier
from rgtg_fast.models.heads import RewardHead, describe, linear_part, scores_of, with_reward_head
from rgtg_fast.models.loading import load_sequence_classifier
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.model import load_base
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.kinds.heads import ENCODERS, REFUSED, SAVED, WIDTH, Saved, encoder, labels, save_encoder
from tests.rewards.naive import guided

Tensors = dict[str, torch.Tensor]
PROMPTS = [[6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]
ANSWERS = [[20, 21, 22, 23], [24, 25], [26, 27, 28]]


def plain(h: torch.Tensor, t: Tensors, prefix: str) -> float:
    """w · h of a linear head."""
    return float((h * t[f"{prefix}.weight"][0].double()).sum())


def two_layers(h: torch.Tensor, t: Tensors, prefix: str) -> float:
    """w₂ · max(0, W₁ h + b₁) + b₂."""
    first, second = t[f"{prefix}.0.weight"].double(), t[f"{prefix}.2.weight"].double()
    inner = (first @ h + t[f"{prefix}.0.bias"]).clamp_min(0)
    return float(second[0] @ inner + t[f"{prefix}.2.bias"][0])


def three_layers(h: torch.Tensor, t: Tensors) -> float:
    for i in (0, 2):
        h = (t[f"v_head.summary.{i}.weight"].double() @ h + t[f"v_head.summary.{i}.bias"]).clamp_min(0)
    return float(t["v_head.summary.4.weight"][0].double() @ h + t["v_head.summary.4.bias"][0])


# The reward of a state h (float64) by the weights of the files, as the models' own code computes it.
FORMULAS: dict[str, Callable[[torch.Tensor, Tensors], float]] = {
    "TRL, Skywork-Reward-V2 (Llama)": lambda h, t: plain(h, t, "score"),
    "Skywork-Reward-V2 (Qwen3)": lambda h, t: plain(h, t, "score"),
    "OpenRLHF": lambda h, t: plain(h, t, "value_head"),
    "OpenRLHF, normalized": lambda h, t: (plain(h, t, "value_head") - 0.7) / 2.5,
    "OpenRLHF, `score`, normalized": lambda h, t: (plain(h, t, "score") - 0.7) / 2.5,
    "OpenRLHF, a prefix of its own": lambda h, t: plain(h, t, "reward_out"),
    "UltraRM": lambda h, t: plain(h, t, "regression_head"),
    "Eurus": lambda h, t: plain(h, t, "regression_head"),
    "GRM": lambda h, t: two_layers(h, t, "v_head.summary"),
    "GRM, two hidden layers": three_layers,
    "GRM, linear": lambda h, t: plain(h, t, "v_head.summary") + float(t["v_head.summary.bias"]),
    "INF-ORM": lambda h, t: two_layers(h, t, "score"),
    "Qwen2.5-Math-RM": lambda h, t: two_layers(h, t, "score"),
    "a head with a bias": lambda h, t: plain(h, t, "score") + float(t["score.bias"]),
    "two labels": lambda h, t: float(t["score.weight"][1].double() @ h),
    "a sigmoid": lambda h, t: 1 / (1 + math.exp(-plain(h, t, "score"))),
    "one of two labels with a bias, tanh": lambda h, t: math.tanh(
        float(t["score.weight"][1].double() @ h) + float(t["score.bias"][1])
    ),
    "a vocabulary head beside the reward head": lambda h, t: plain(h, t, "score"),
}


class Reference:
    """A saved reward model's rewards, from its trunk and the formula of its head."""

    def __init__(self, name: str):
        self.trunk, self.tensors, self.formula = SAVED[name].trunk(), SAVED[name].tensors(), FORMULAS[name]

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> float:
        states = self.trunk(torch.tensor([ids]), use_cache=False).last_hidden_state
        return self.formula(states[0, -1].double(), self.tensors)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("heads")
    return {name: saved.save(where / str(number)) for number, (name, saved) in enumerate(SAVED.items())}


def decoder_of(
    folder: Path, saved: Saved, reward: Any = SequenceReward, **settings: Any
) -> RewardGuidedDecoder:
    """A decoder of a random language model of the reward model's family, with the reward model's own tokenizer."""
    pair = (saved.language_model(), tf.AutoTokenizer.from_pretrained(folder))
    made = reward(str(folder), label=saved.label)
    return RewardGuidedDecoder.from_pretrained(pair, made, max_batch=3, **settings)


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(RGTGError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-4 * max(1.0, abs(wanted))


def test_every_saved_head_has_a_formula() -> None:
    assert FORMULAS.keys() == SAVED.keys()


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("name", SAVED)
def test_cached_rewards_are_those_of_the_models_own_formula(
    name: str, engine: str, folders: dict[str, Path]
) -> None:
    decoder, reference = decoder_of(folders[name], SAVED[name], engine=engine), Reference(name)
    given = decoder.score(PROMPTS, ANSWERS)
    for prompt, answer, rewards in zip(PROMPTS, ANSWERS, given, strict=True):
        assert len(rewards) == len(answer)
        assert all(close(r, reference([*prompt, *answer[: i + 1]])) for i, r in enumerate(rewards))
    rows = decoder.generate(PROMPTS, 6, Guidance(k=5, beta=1.0, temperature=0.8), seed=[3, 4, 5])
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.tokens
        for i in range(len(row.tokens)):
            assert close(row.rewards[i], reference([*prompt, *row.tokens[: i + 1]]))


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("name", ["GRM", "OpenRLHF, normalized", "a sigmoid", "two labels"])
def test_greedy_decoding_equals_a_loop_without_a_cache(
    name: str, engine: str, folders: dict[str, Path]
) -> None:
    decoder, reference = decoder_of(folders[name], SAVED[name], engine=engine), Reference(name)
    lm = SAVED[name].language_model()
    rows = decoder.generate(PROMPTS, 6, Guidance(k=6, beta=2.0, temperature=0))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens, rewards = guided(lm, lambda p, a, v: reference([*p, *a, v]), prompt, 6, 2.0, "lm", 6, 1)
        assert row.tokens[: len(tokens)] == tokens
        assert row.rewards == pytest.approx(rewards, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("name", SAVED)
def test_texts(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name]
    reward = TextReward(folder, template="{prompt} {answer}", batch_size=2, label=SAVED[name].label)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    decoder = RewardGuidedDecoder.from_pretrained((SAVED[name].language_model(), tokenizer), reward)
    rewards = decoder.score(["w1 w2 w3", "w4"], ["w5 w6", "w7 w8 w9"])
    reference = Reference(name)
    for prompt, answer, found in zip(("w1 w2 w3", "w4"), ("w5 w6", "w7 w8 w9"), rewards, strict=True):
        ids = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
        assert close(found[-1], reference(ids))


@pytest.mark.parametrize("name", ["INF-ORM", "OpenRLHF, normalized"])
def test_accuracy_and_judges(name: str, folders: dict[str, Path]) -> None:
    folder, reference = folders[name], Reference(name)
    base = (make_lm(), make_tokenizer())
    model, _ = load_classifier(str(folder), lambda _: base)
    pairs = [TokenizedPair(PROMPTS[i], [*ANSWERS[i], 1], [*ANSWERS[2 - i], 1], i) for i in range(3)]
    for pair, (chosen, rejected) in zip(pairs, score_pairs(model, pairs), strict=True):
        for ids, rewards in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
            assert close(rewards[-1], reference([*pair.prompt_ids, *ids]))
    judge = Judge(str(folder), base)
    ((_, rating),) = judge.rate([PROMPTS[0]], ["w14 w15"])
    assert close(rating.ended, reference([*PROMPTS[0], 20, 21, 1]))
    assert close(rating.unended, reference([*PROMPTS[0], 20, 21]))


def test_rad_clamps_what_the_head_gives(folders: dict[str, Path]) -> None:
    decoder, reference = decoder_of(folders["GRM"], SAVED["GRM"], RADReward), Reference("GRM")
    for prompt, answer, rewards in zip(PROMPTS, ANSWERS, decoder.score(PROMPTS, ANSWERS), strict=True):
        wanted = [reference([*prompt, *answer[: i + 1]]) for i in range(len(answer))]
        assert rewards == pytest.approx([min(max(value, 0), 1) for value in wanted], abs=1e-4)


# ---- the head itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["GRM", "OpenRLHF, normalized"])
def test_a_head_is_not_rounded_to_the_trunks_dtype(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    tensors = SAVED[name].tensors()
    model, _ = load_sequence_classifier(folders[name], make_lm(), dtype)
    head: Any = model.get_submodule("score")
    for layer in head.linears():
        assert layer.weight.dtype == torch.float32
    assert model.dtype == dtype
    if name == "GRM":
        assert torch.equal(head.linears()[0].weight, tensors["v_head.summary.0.weight"])
    else:
        assert torch.equal(head.linears()[0].weight, tensors["value_head.weight"])
    decoder = decoder_of(folders[name], SAVED[name], dtype=dtype)
    assert decoder.reward is not None
    assert decoder.reward.models()[0].dtype == dtype
    found, reference = decoder.score(PROMPTS[:1], ANSWERS[:1])[0], Reference(name)
    wanted = [reference([*PROMPTS[0], *ANSWERS[0][: i + 1]]) for i in range(4)]
    assert found == pytest.approx(wanted, abs=0.15)


@pytest.mark.parametrize(
    "name", ["GRM", "a sigmoid", "one of two labels with a bias, tanh", "OpenRLHF, normalized"]
)
def test_a_reward_has_the_same_bits_in_any_batch(name: str, folders: dict[str, Path]) -> None:
    model, _ = load_sequence_classifier(folders[name], make_lm(), None, SAVED[name].label)
    head: Any = model.get_submodule("score")
    states = torch.randn(67, WIDTH, generator=torch.Generator().manual_seed(5))
    together = scores_of(states, head)
    for size in (1, 2, 7, 33):
        parts = [scores_of(states[i : i + size], head) for i in range(0, 67, size)]
        assert torch.equal(torch.cat(parts), together)
    torch.testing.assert_close(head(states)[:, 0], together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_linear_heads_go_through_the_fused_tail(
    temperature: float, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "OpenRLHF, normalized"

    def rows() -> list[tuple[list[int], list[float]]]:
        decoder = decoder_of(folders[name], SAVED[name], engine="transformers")
        rows = decoder.generate(PROMPTS, 6, Guidance(k=4, beta=1.0, temperature=temperature), seed=[1, 2, 3])
        return [(row.tokens, row.rewards) for row in rows]

    wanted = rows()
    monkeypatch.setattr(SequenceReward, "fused", property(lambda reward: True))
    monkeypatch.setattr(SequenceReward, "score", None)
    for (tokens, rewards), (same, close_to) in zip(rows(), wanted, strict=True):
        assert tokens == same
        assert rewards == pytest.approx(close_to, abs=1e-4)


def test_a_cap_behind_a_head_is_noticed_at_load_time(folders: dict[str, Path]) -> None:
    model, _ = load_sequence_classifier(folders["GRM"], make_lm(), None)
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found

    model.forward = capped
    assert "its logits differ" in message_of(
        lambda: RewardGuidedDecoder.from_pretrained((make_lm(), None), (model, None))
    )


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_trunk_that_changes_its_dtype_is_noticed(engine: str, folders: dict[str, Path]) -> None:
    decoder = decoder_of(folders["GRM"], SAVED["GRM"], engine=engine)
    decoder.generate(PROMPTS, 2)
    assert decoder.reward is not None
    decoder.reward.models()[0].model.half()
    assert "float32 on cpu became torch.float16" in message_of(lambda: decoder.generate(PROMPTS, 2))


def test_which_heads_are_linear(folders: dict[str, Path]) -> None:
    found = {}
    for name, saved in SAVED.items():
        model, _ = load_sequence_classifier(folders[name], make_lm(), None, saved.label)
        found[name] = linear_part(model.get_submodule("score")) is not None  # pyright: ignore[reportArgumentType]
    mlps = ("GRM", "GRM, two hidden layers", "INF-ORM", "Qwen2.5-Math-RM")
    bounded = ("a sigmoid", "one of two labels with a bias, tanh")
    assert {name for name, linear in found.items() if not linear} == {*mlps, *bounded}


def test_a_head_in_words() -> None:
    assert describe(nn.Linear(4, 60, bias=False)) == "linear, 4 to 60"
    assert describe(nn.Linear(4, 1)) == "linear, 4 to 1, with bias"
    assert describe(RewardHead([nn.Linear(4, 2)], 0)) == "linear, 4 to 1, with bias, label 0 of 2"
    assert describe(RewardHead([nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)])) == "MLP 4-3-1"
    assert (
        repr(RewardHead([nn.Linear(4, 1), nn.Sigmoid()])) == "RewardHead(linear, 4 to 1, with bias, Sigmoid)"
    )
    scaled = RewardHead([nn.Linear(4, 1, bias=False)], normal=(0.5, 2))
    assert describe(scaled) == "linear, 4 to 1, normalized by mean 0.5 and std 2"


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


@pytest.mark.parametrize(
    ("labels", "score", "words"),
    [
        (2, _Doubled(WIDTH, 2), "holds _Doubled:"),
        (1, nn.Sequential(_Doubled(WIDTH, 4), nn.ReLU(), nn.Linear(4, 1)), "holds _Doubled:"),
        (2, _with_hook(nn.Linear(WIDTH, 2)), "holds Linear with hooks:"),
        (1, nn.Sequential(nn.Linear(WIDTH, 4), _with_hook(nn.ReLU()), nn.Linear(4, 1)), "holds ReLU with hooks:"),
        (1, _with_hook(nn.Sequential(nn.Linear(WIDTH, 1))), "holds Sequential with hooks:"),
    ],
)  # fmt: skip
def test_a_head_that_computes_more_than_its_weights_say(labels: int, score: nn.Module, words: str) -> None:
    model = make_rm(num_labels=labels)
    model.score = score
    label = 1 if labels > 1 else None
    assert words in message_of(lambda: with_reward_head(model, label, "rm"))


@pytest.mark.parametrize("kind", [SequenceReward, TextReward])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(kind: Any, value: float) -> None:
    model = make_rm()
    with torch.no_grad():
        model.get_submodule("score").weight[0, 3] = value
    pair = (model, make_tokenizer())
    message = message_of(
        lambda: RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), kind(pair))
    )
    assert "NaN or infini" in message
    assert "check" in message


def test_heads_that_cannot_be() -> None:
    linear = nn.Linear(4, 2)
    assert "Conv1d" in message_of(lambda: RewardHead([nn.Conv1d(1, 1, 1)]))
    assert "no linear layer" in message_of(lambda: RewardHead([nn.ReLU()]))
    for layers, label in (([linear], None), ([linear], 2), ([linear, nn.Linear(3, 1)], None)):
        assert "use a reward model with one score" in message_of(
            lambda layers=layers, label=label: RewardHead(layers, label)
        )


# ---- labels --------------------------------------------------------------------------------------------------------


def test_a_label_by_name_or_index_and_the_refusal_without_one(folders: dict[str, Path]) -> None:
    folder = folders["two labels"]
    lm = (make_lm(), make_tokenizer())

    def scores(label: Any, **how: Any) -> list[list[float]]:
        return RewardGuidedDecoder.from_pretrained(lm, str(folder), label=label, **how).score(
            PROMPTS, ANSWERS
        )

    assert scores("chosen") == scores(1) == scores("1")
    assert scores("rejected") == scores(0) != scores(1)
    without = message_of(lambda: scores(None))
    assert "2 labels ('rejected', 'chosen')" in without
    assert "--reward-label" in without
    # Where names are numbers, a number is an index and a text a name.
    turned = make_rm(id2label={0: "1", 1: "0"}, num_labels=2)
    heads = [with_reward_head(turned, label, "rm").get_submodule("score") for label in (1, "1", "0")]
    assert [getattr(head, "label", None) for head in heads] == [1, 0, 1]
    for wrong in ("better", 2, -1, "²", True, "9" * 5000):
        assert "choose one of 'rejected', 'chosen'" in message_of(lambda wrong=wrong: scores(wrong))
    twice = make_rm(id2label={0: "x", 1: "x"}, num_labels=2)
    assert "2 labels named 'x'" in message_of(lambda: with_reward_head(twice, "x", "rm"))
    one = str(folders["INF-ORM"])
    assert RewardGuidedDecoder.from_pretrained(lm, one, label="LABEL_0").score(
        PROMPTS, ANSWERS
    ) == RewardGuidedDecoder.from_pretrained(lm, one).score(PROMPTS, ANSWERS)
    assert "choose one of 'LABEL_0'" in message_of(
        lambda: RewardGuidedDecoder.from_pretrained(lm, one, label="good")
    )


def test_labels_belong_to_reward_models(folders: dict[str, Path]) -> None:
    lm = (make_lm(), make_tokenizer())
    for reward in ("contrastive", "farma:somewhere", f"mixture:1*{folders['two labels']}"):
        assert "leave it out" in message_of(
            lambda reward=reward: RewardGuidedDecoder.from_pretrained(lm, reward, label="chosen")
        )
    # Several labels in a mixture are chosen as the message says.
    mixture = f"mixture:1*{folders['two labels']}"
    message = message_of(lambda: RewardGuidedDecoder.from_pretrained(lm, mixture, label="chosen"))
    assert "MixtureReward([SequenceReward(..., label=...), ...])" in message
    part = SequenceReward(str(folders["two labels"]), label="chosen")
    mixed = RewardGuidedDecoder.from_pretrained(lm, MixtureReward([part], [2.0])).score(PROMPTS, ANSWERS)
    alone = RewardGuidedDecoder.from_pretrained(lm, part).score(PROMPTS, ANSWERS)
    assert mixed == [[2 * reward for reward in row] for row in alone]
    for reward in (None, SequenceReward("somewhere"), lambda prefixes, candidates: candidates):
        assert "a label belongs to" in message_of(
            lambda reward=reward: RewardGuidedDecoder.from_pretrained(lm, reward, label="chosen")
        )
    assert "leave it out" in message_of(lambda: TextReward(lambda prompts, answers: [], label="chosen"))


@pytest.mark.parametrize("kind", [SequenceReward, TextReward])
def test_a_loaded_pair_with_two_labels_does_not_change(kind: Any) -> None:
    model, tokenizer = make_rm(id2label={0: "bad", 1: "good"}, num_labels=2), make_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score = model.get_submodule("score")
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), kind((model, tokenizer), label="good")
    )
    prompts, answers = ["w1 w2", "w3"], ["w4 w5", "w6"]
    found = decoder.score(prompts, answers)
    for prompt, answer, rewards in zip(prompts, answers, found, strict=True):
        ids = tokenizer(f"{prompt} {answer}")["input_ids"]
        if kind is TextReward:  # the pair (prompt, answer)
            ids = tokenizer(prompt, answer)["input_ids"]
        with torch.inference_mode():
            assert close(rewards[-1], float(model(torch.tensor([ids])).logits[0, 1]))
    assert model.get_submodule("score") is score
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # A change of the weights is taken over by the next run.
    with torch.no_grad():
        score.weight *= 2
    assert decoder.score(prompts, answers)[1][-1] == pytest.approx(2 * found[1][-1], rel=1e-5)


def test_a_loaded_pair_is_normalized_as_its_configuration_says() -> None:
    model: Any = make_rm()
    plain = RewardGuidedDecoder.from_pretrained((make_lm(), None), (model, None)).score(PROMPTS, ANSWERS)
    model.config.normalize_reward, model.config.mean, model.config.std = True, 0.5, 2.0
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), None), (model, None))
    for raw, found in zip(plain, decoder.score(PROMPTS, ANSWERS), strict=True):
        assert found == pytest.approx([(value - 0.5) / 2 for value in raw], abs=1e-5)
    with torch.no_grad():
        model.score.weight.zero_()
    assert decoder.score(PROMPTS, ANSWERS)[0] == [-0.25] * 4


def test_a_pair_whose_score_is_a_sequential_of_its_owner() -> None:
    model: Any = make_rm()
    torch.manual_seed(9)
    model.score = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 1)).eval()
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), None), (model, None))
    for prompt, answer, rewards in zip(PROMPTS, ANSWERS, decoder.score(PROMPTS, ANSWERS), strict=True):
        with torch.inference_mode():
            wanted = float(model(torch.tensor([[*prompt, *answer]])).logits)
        assert close(rewards[-1], wanted)
    model.score = nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    assert "LayerNorm" in message_of(
        lambda: RewardGuidedDecoder.from_pretrained((make_lm(), None), (model, None))
    )


# ---- encoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, sigmoid: bool, tmp_path: Path) -> None:
    folder, (_, label) = save_encoder(name, tmp_path / "rm"), ENCODERS[name]
    if sigmoid:
        file = folder / "config.json"
        named = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    tokenizer = make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), TextReward(str(folder), label=label, batch_size=2)
    )
    prompts, answers = ["w1 w2 w3 w4 w5", "w6"], ["w7", "w8 w9 w10"]
    found = decoder.score(prompts, answers)
    for prompt, answer, rewards in zip(prompts, answers, found, strict=True):
        with torch.inference_mode():
            logits = encoder(name)(**tokenizer(prompt, answer, return_tensors="pt")).logits[0]
        wanted = float(logits[0 if label is None else 1])
        assert close(rewards[-1], 1 / (1 + math.exp(-wanted)) if sigmoid else wanted)
    if label is not None:
        assert "2 labels ('worse', 'better')" in message_of(
            lambda: RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), TextReward(str(folder)))
        )


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "text:", "rad:"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused_by_name(name: str, how: str, tmp_path: Path) -> None:
    saved, reason = REFUSED[name]
    folder = saved.save(tmp_path / "rm")
    message = message_of(
        lambda: RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), f"{how}{folder}")
    )
    assert reason in message
    assert "use" in message


OPENRLHF = SAVED["OpenRLHF, normalized"]
MLP = SAVED["GRM"]
UNFIT: dict[str, tuple[Saved, str]] = {
    "std 0": (replace(OPENRLHF, config={**OPENRLHF.config, "std": 0}), "std=0"),
    "std NaN": (replace(OPENRLHF, config={**OPENRLHF.config, "std": math.nan}), "std=nan"),
    "a text": (replace(OPENRLHF, config={**OPENRLHF.config, "mean": "0.7"}), "mean="),
    "a mean beyond float32": (replace(OPENRLHF, config={**OPENRLHF.config, "mean": 10**60}), "mean=1000"),
    "a std below float32": (replace(OPENRLHF, config={**OPENRLHF.config, "std": 1e-320}), "std=1e-320"),
    "normalized by a text": (
        replace(OPENRLHF, config={**OPENRLHF.config, "normalize_reward": "false"}),
        "normalize_reward='false'",
    ),
    "a number of labels that is none": (replace(OPENRLHF, config={"num_labels": "1"}), "num_labels='1'"),
    "names of labels without numbers": (
        replace(OPENRLHF, config={"id2label": ["bad", "good"]}),
        "id2label=['bad', 'good']",
    ),
    "names in the place of numbers": (replace(OPENRLHF, config={"id2label": {"a": 0}}), "id2label={'a': 0}"),
    "the usual head beside the one that its configuration names": (
        replace(
            OPENRLHF,
            head={"value_head.weight": (1, WIDTH), "score.weight": (1, WIDTH)},
            config={**OPENRLHF.config, "value_head_prefix": "value_head"},
        ),
        "two reward heads, 'value_head.*' and 'score.weight'",
    ),
    "names from a wrapper": (
        Saved({"module.value_head.weight": (1, WIDTH)}, OPENRLHF.config),
        "begin with 'module.'",
    ),
    "no std": (replace(OPENRLHF, config={"normalize_reward": True, "mean": 1.0}), "std=None"),
    "too wide": (replace(OPENRLHF, head={"value_head.weight": (1, WIDTH + 8)}), "head on 40 numbers"),
    "two labels in the files": (
        replace(OPENRLHF, head={"value_head.weight": (3, WIDTH)}),
        "head of 3 labels and its config.json lists 2",
    ),
    "two labels in the configuration": (
        replace(OPENRLHF, config={**OPENRLHF.config, **labels("a", "b")}),
        "head of 1 labels and its config.json lists 2",
    ),
    "layers that do not follow": (
        replace(MLP, head={**MLP.head, "v_head.summary.2.weight": (1, 21)}),
        "head on 21 numbers",
    ),
    "a layer without its weight": (
        replace(MLP, head={k: v for k, v in MLP.head.items() if k != "v_head.summary.0.weight"}),
        "neither a linear head nor an MLP",
    ),
    "two heads": (
        replace(OPENRLHF, head={"value_head.weight": (1, WIDTH), "regression_head.weight": (1, WIDTH)}),
        "'regression_head.weight'",
    ),
    "weights beside the head": (
        replace(OPENRLHF, head={"value_head.weight": (1, WIDTH), "adapter.weight": (1, WIDTH)}),
        "'adapter.weight' not in the model",
    ),
    "a function that is no name": (
        replace(OPENRLHF, config={"sbert_ce_default_activation_function": ["Sigmoid"]}),
        "names ['Sigmoid']",
    ),
    "a softmax": (
        replace(
            OPENRLHF,
            config={"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Softmax"}},
        ),
        "Softmax",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_heads_that_do_not_fit(case: str, tmp_path: Path) -> None:
    saved, reason = UNFIT[case]
    folder = saved.save(tmp_path / "rm")
    lm = (make_lm(), make_tokenizer())
    assert reason in message_of(lambda: RewardGuidedDecoder.from_pretrained(lm, str(folder)))


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = SAVED["UltraRM"].save(tmp_path / "rm")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    decoder, reference = decoder_of(folder, SAVED["UltraRM"]), Reference("UltraRM")
    found = decoder.score(PROMPTS[:1], ANSWERS[:1])[0]
    assert close(found[-1], reference([*PROMPTS[0], *ANSWERS[0]]))
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "steps": 3}, folder / "pytorch_model.bin")
    assert "'steps' not in the model" in message_of(lambda: decoder_of(folder, SAVED["UltraRM"]))


def test_a_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = Saved(
        {"value_head.weight": (1, WIDTH), "value_head.bias": (1,)}, {"architectures": ["LlamaForCausalLM"]}
    )
    folder = saved.save(tmp_path / "rm")
    whole = load_file(folder / "model.safetensors")
    head = {f"v_head.summary.{part}": whole[f"value_head.{part}"] for part in ("weight", "bias")}
    rest = {name: value for name, value in whole.items() if not name.startswith("value_head")}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    for name, write in (("value_head.bin", torch.save), ("value_head.safetensors", save_file)):
        write(head, folder / name)
        message = message_of(lambda: decoder_of(folder, saved))
        assert f"in a file of its own ({name})" in message
        (folder / name).unlink()
    # The way out of the message.
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        state = saved.trunk()(torch.tensor([[*PROMPTS[0], *ANSWERS[0]]])).last_hidden_state[0, -1].double()
    wanted = plain(state, whole, "value_head") + float(whole["value_head.bias"])
    assert close(decoder_of(folder, saved).score(PROMPTS[:1], ANSWERS[:1])[0][-1], wanted)


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is recognized in the files of the hub's cache."""
    cache, revision = tmp_path / "hub", "a" * 40
    folder = cache / "models--some--rm"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    SAVED["INF-ORM"].save(folder / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), "some/rm")
    found, reference = decoder.score(PROMPTS[:1], ANSWERS[:1])[0], Reference("INF-ORM")
    assert close(found[-1], reference([*PROMPTS[0], *ANSWERS[0]]))


def test_an_encoder_with_the_head_of_a_causal_model(tmp_path: Path) -> None:
    folder = save_encoder("BERT, two labels", tmp_path / "rm")
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("classifier.")}
    save_file({**kept, "value_head.weight": torch.ones(2, WIDTH)}, file, metadata={"format": "pt"})
    lm = (make_lm(), make_tokenizer())
    assert "no `score` head over a causal trunk" in message_of(
        lambda: RewardGuidedDecoder.from_pretrained(lm, TextReward(str(folder), label="better"))
    )


def test_another_vocabulary_is_told_apart_and_the_text_path_offered(folders: dict[str, Path]) -> None:
    words = [*(f"v{i}" for i in range(6)), *(f"w{i}" for i in range(58))]
    pair = (make_lm(), make_tokenizer(words=["<pad>", "<eos>", "<unk>", *words[3:]]))
    folder = str(folders["GRM"])
    message = message_of(lambda: RewardGuidedDecoder.from_pretrained(pair, folder))
    assert "token 3 is 'v3'" in message
    assert "TextReward" in message
    RewardGuidedDecoder.from_pretrained(pair, f"text:{folder}")


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "OpenRLHF",
        "UltraRM",
        "GRM",
        "INF-ORM",
        "a head with a bias",
        "a sigmoid",
        "OpenRLHF, `score`, normalized",
    ],
)
def test_training_does_not_begin_with_another_head(name: str, folders: dict[str, Path]) -> None:
    message = message_of(lambda: load_base(folders[name]))
    assert "base model" in message


def test_training_begins_with_a_linear_head_whatever_lies_beside_it(folders: dict[str, Path]) -> None:
    name = "a vocabulary head beside the reward head"
    model, _ = load_base(folders[name])
    assert torch.equal(model.get_submodule("score").weight, SAVED[name].tensors()["score.weight"])
    model, _ = load_sequence_classifier(folders["GRM"], make_lm(), None)
    assert "no one-label `score` head" in message_of(lambda: load_base((model, make_tokenizer())))
