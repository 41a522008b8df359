"""Answers that were cut have no end token, and as wholes they are read at the last token of their text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import RGTGError
from rgtg_fast.evaluation.accuracy import length_verdicts, score_pairs, verdicts
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.data import PreferencePair, TokenizedPair, load_pairs, tokenize_pairs
from rgtg_fast.training.labels import LabelJudge
from rgtg_fast.training.launch import train_reward_model
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import load_base
from rgtg_fast.training.packing import collate, pack, packed_rewards, use_packed_attention
from rgtg_fast.training.trainer import PartialRewardTrainer
from tests.conftest import make_rm, make_tokenizer
from tests.training.support import EOS, rows, save_lm

REASONS = [("length", "eos"), ("stop", "length"), ("length", "length"), ("eos", None), (None, None)]


def data() -> list[dict[str, Any]]:
    """Pairs of which some answers were cut, and of which the data do not say it of all."""
    return [
        {**row, "chosen_finish_reason": chosen, "rejected_finish_reason": rejected}
        for row, (chosen, rejected) in zip(rows(25), REASONS * 5, strict=True)
    ]


def cut_pairs() -> list[TokenizedPair]:
    return tokenize_pairs(load_pairs(data())[0], make_tokenizer())[0]


def naive_ids(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and answer of a row, the answer with its end token where it was not cut."""
    tokenizer = make_tokenizer()
    ids = tokenizer(row[side])["input_ids"]
    return tokenizer(row["prompt"])["input_ids"], ids if row[f"{side}_finish_reason"] == "length" else [
        *ids,
        EOS,
    ]


@torch.no_grad()
def naive_rewards(model: Any, row: dict[str, Any], side: str) -> torch.Tensor:
    """One forward of transformers over one answer: a reward for each of its tokens."""
    prompt, answer = naive_ids(row, side)
    return model.score(model.model(torch.tensor([prompt + answer])).last_hidden_state)[0, len(prompt) :, 0]


# Token ids


def test_answers_that_were_cut_have_no_end_token() -> None:
    pairs, report = tokenize_pairs(load_pairs(data())[0], make_tokenizer())
    for pair in pairs:
        row = data()[pair.index]
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            assert ids == naive_ids(row, side)[1]
        assert pair.text_lengths == tuple(len(row[side].split()) for side in ("chosen", "rejected"))
    assert (report.cut, report.unstated) == (20, 15)
    assert report.end_line() == (
        "whole answers are read at the end token of 30 that ended (15 of them without a finish_reason, taken to have "
        "ended) and at the last text token of 20 that were cut"
    )


def test_without_a_finish_reason_all_have_ended_as_ever() -> None:
    plain = load_pairs(rows(25))[0]
    pairs, report = tokenize_pairs(plain, make_tokenizer())
    assert all(
        ids[-1] == EOS and EOS not in ids[:-1] for p in pairs for ids in (p.chosen_ids, p.rejected_ids)
    )
    assert report.end_line() == (
        "whole answers are read at the end token, which follows all 50 (50 of them without a finish_reason, "
        "taken to have ended)"
    )
    every, report = tokenize_pairs(load_pairs(rows(25), answers_ended="no")[0], make_tokenizer())
    assert [p.chosen_ids for p in every] == [p.chosen_ids[:-1] for p in pairs]
    assert report.end_line() == "whole answers are read at their last text token: all 50 were cut"
    told, _ = tokenize_pairs(load_pairs(data(), answers_ended="yes")[0], make_tokenizer())
    assert [(p.chosen_ids, p.rejected_ids) for p in told] == [(p.chosen_ids, p.rejected_ids) for p in pairs]


def test_end_tokens_in_texts_are_not_doubled() -> None:
    texts = [
        ("w2 <eos>", "w3"),
        ("w2 <eos><eos> ", "w4 w3"),
        ("w2 <eos> w3", "w5"),
        ("<eos>", "w6"),
        ("w7 <eos>", "w7"),
    ]
    pairs = [PreferencePair("w1", chosen, rejected, i) for i, (chosen, rejected) in enumerate(texts)]
    kept, report = tokenize_pairs(pairs, make_tokenizer())
    w2 = make_tokenizer()("w2")["input_ids"]
    assert [pair.chosen_ids for pair in kept] == [[*w2, EOS]] * 2
    assert (report.end_inside, report.empty, report.identical, report.end_texts) == (1, 1, 1, 2)
    assert "1 dropped: an end token inside an answer" in report.lines()


def test_a_prompt_that_the_template_refuses_costs_its_pair_alone() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}w1"
    system = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    pairs = [PreferencePair(prompt, "w3", "w4", i) for i, prompt in enumerate([system, system[1:]])]
    kept, report = tokenize_pairs(pairs, make_tokenizer(chat_template=template))
    assert ([pair.index for pair in kept], report.refused) == ([1], 1)
    assert report.lines()[1].startswith("1 dropped: the chat template refuses the prompt (first: row 0: ")
    with pytest.raises(RGTGError, match="no system role"):
        tokenize_pairs(pairs[:1], make_tokenizer(chat_template=template))


# Losses


@pytest.mark.parametrize("name", ["full_bt", "partial_bt", "cd_fudge"])
def test_losses_are_those_of_one_answer_after_the_other(name: str) -> None:
    model: Any = make_rm()
    expected = []
    for row in data():
        chosen, rejected = (naive_rewards(model, row, side) for side in ("chosen", "rejected"))
        if name == "full_bt":
            expected.append(-torch.nn.functional.logsigmoid(chosen[-1] - rejected[-1]))
        elif name == "partial_bt":
            for i in range(max(len(chosen), len(rejected))):
                gap = chosen[min(i, len(chosen) - 1)] - rejected[min(i, len(rejected) - 1)]
                expected.append(-torch.nn.functional.logsigmoid(gap))
        else:
            expected += [0.5 * (reward - 1) ** 2 for reward in chosen] + [
                0.5 * reward**2 for reward in rejected
            ]
    pairs = cut_pairs()
    packed: Any = make_rm()
    use_packed_attention(packed)
    batch = collate(pairs, pack(pairs, 96), 0)
    with torch.no_grad():
        loss = Objective(name).loss(*packed_rewards(packed, batch))
    assert len(pairs) == 25
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_what_needs_an_end_token_is_refused() -> None:
    longer = TokenizedPair([5], [6, 7, 8], [6, EOS], 3, (False, True))
    shorter = TokenizedPair([5], [6, 7, 8, EOS], [6, 9], 4, (True, False))
    # The longer answer needs no padding.
    Objective(mode="eos").check_ends([longer])
    with pytest.raises(
        RGTGError, match=r"mode='eos' appends end tokens .* that of row 4 was cut: use mode='repeat_last'"
    ):
        Objective(mode="eos").check_ends([longer, shorter])
    Objective("farma").check_ends([shorter])
    with pytest.raises(
        RGTGError, match="head_fit fits the row of the end token, and an answer of row 4 was cut"
    ):
        Objective("farma").check_ends([shorter], head_fit=True)
    with pytest.raises(RGTGError, match="mode='eos'"):
        PartialRewardTrainer(make_rm(), Any, [shorter], objective=Objective(mode="eos"))  # pyright: ignore[reportArgumentType]


# Training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("base") / "lm", num_hidden_layers=1)


def test_a_run_knows_which_answers_ended(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA training needs peft")
    recipe = TrainConfig("full_bt", token_budget=128, max_length=64, held_out=0.2)
    said: list[str] = []
    seen: list[Any] = []

    def metrics(scores: Any) -> dict[str, float]:
        seen.extend(scores)
        return {}

    result = train_reward_model(
        base, data(), tmp_path / "out", recipe, device="cpu", progress=said.append, metrics=metrics
    )
    counts = [result.data[part] for part in ("train", "eval")]
    assert sum(part["cut"] for part in counts) == 20
    assert sum(part["unstated"] for part in counts) == 15
    assert any(line.startswith("data: whole answers are read at the end token of ") for line in said)
    # Every answer's rewards are those of its text's prefixes, and of the whole.
    lengths = [(len(row["chosen"].split()) + 1, len(row["rejected"].split()) + 1) for row in data()]
    assert len(seen) == counts[1]["kept"]
    assert all((len(chosen), len(rejected)) in lengths for chosen, rejected in seen)
    facts = json.loads((tmp_path / "out" / "rgtg_fast.json").read_text())
    assert facts["recipe"]["answers_ended"] == "auto"
    with pytest.raises(RGTGError, match="began with other pairs"):
        train_reward_model(
            base, data(), tmp_path / "out", recipe, answers_ended="yes", resume=True, device="cpu"
        )
    with pytest.raises(RGTGError, match="answers_ended='some' is unknown"):
        TrainConfig(answers_ended="some")


def test_a_labelling_judge_reads_a_cut_answer_at_its_last_token(base: Path, tmp_path: Path) -> None:
    model: Any = make_rm(seed=3)
    model.save_pretrained(tmp_path / "judge")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "judge")
    judge, wanted = LabelJudge(str(tmp_path / "judge"), load_base(base)), set(range(25))
    found = judge.label(data(), wanted, tmp_path / "labels.jsonl", 64)
    for index, row in enumerate(data()):
        expected = [naive_rewards(model, row, side)[-1].item() for side in ("chosen", "rejected")]
        assert list(found[index]) == pytest.approx(expected, abs=1e-5)
    always = judge.label(data(), wanted, tmp_path / "always.jsonl", 64, answers_ended="yes")
    moved = {i for i in wanted if math.dist(always[i], found[i]) > 1e-4}
    assert moved == {i for i in wanted if "length" in REASONS[i % 5]}


# Accuracy


def test_accuracy_reads_the_last_token_of_a_cut_answer() -> None:
    model: Any = make_rm()
    rewards = [[naive_rewards(model, row, side) for side in ("chosen", "rejected")] for row in data()]
    use_packed_attention(model)
    pairs = cut_pairs()
    scores = score_pairs(model, pairs, 96)
    for fraction in (0.3, 0.5, 1):
        expected = []
        for row, both in zip(data(), rewards, strict=True):
            read = []
            for side, of_tokens in zip(("chosen", "rejected"), both, strict=True):
                words = len(row[side].split())
                read.append(of_tokens[-1 if fraction == 1 else math.ceil(fraction * words) - 1].item())
            expected.append(float(read[0] > read[1]))
        assert verdicts(scores, fraction) == expected
    words = [[len(row[side].split()) for side in ("chosen", "rejected")] for row in data()]
    assert length_verdicts(pairs) == [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in words]


def test_scores_do_not_depend_on_what_was_known() -> None:
    """To the last digit, so that an interrupted run gives the numbers of a whole one."""
    model = make_rm()
    use_packed_attention(model)
    pairs = cut_pairs()
    whole = score_pairs(model, pairs, 64)
    for known in ({0}, set(range(0, 25, 2)), set(range(1, 25))):
        assert score_pairs(model, pairs, 64, known={i: whole[i] for i in known}) == whole
