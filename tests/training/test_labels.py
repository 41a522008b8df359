"""A judge's rewards as what a regression learns: the right ones, kept on disk, in the judge's own format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.labels import LABELS_FILE, LabelJudge, as_probabilities
from rgtg_fast.training.launch import train_reward_model
from rgtg_fast.training.model import load_base
from tests.conftest import make_rm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.training.support import rows, save_lm

pytest.importorskip("peft", reason="LoRA training needs peft")

QUICK = TrainConfig(
    token_budget=128, gradient_accumulation_steps=2, learning_rate=0.01, max_length=64, held_out=0.2
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("base") / "lm")


def save_judge(folder: Path, template: str | None = "default") -> Path:
    make_rm(seed=5).save_pretrained(folder)
    tokenizer = make_tokenizer() if template == "default" else make_tokenizer(template)
    tokenizer.save_pretrained(folder)
    return folder


def expected(model: Any, row: dict[str, Any], chat: bool = True) -> list[float]:
    """The rewards of a row's two answers, each in a forward of its own."""
    tokenizer, found = make_tokenizer(), []
    for side in ("chosen", "rejected"):
        before = f"<user> {row['prompt']} <assistant>" if chat else row["prompt"]
        ids = tokenizer(f"{before} {row[side]} <eos>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model.score(model.base_model(ids).last_hidden_state[0, -1]).item())
    return found


def labels(folder: Path) -> dict[int, list[float]]:
    lines = (folder / LABELS_FILE).read_text().splitlines()
    return {row["index"]: [row["chosen"], row["rejected"]] for row in map(json.loads, lines)}


@pytest.mark.parametrize("objective", ["cd_fudge", "rad"])
def test_a_regression_learns_the_judges_rewards(base: Path, tmp_path: Path, objective: str) -> None:
    judge, data, said = save_judge(tmp_path / "judge"), rows(60), []
    result = train_reward_model(
        base,
        data,
        tmp_path / "out",
        QUICK,
        objective=objective,
        judge=str(judge),
        full=True,
        learning_rate=3e-3,
        num_train_epochs=8,
        device="cpu",
        progress=said.append,
    )
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    found = labels(tmp_path / "out")
    assert len(found) == result.data["train"]["kept"] + result.data["eval"]["kept"]
    for index, values in found.items():
        assert values == pytest.approx(expected(model, data[index]), abs=1e-4)
    assert any("rewards by" in line and "standard deviation" in line for line in said)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1).eval()
    every = [value for values in found.values() for value in values]
    mean = sum(every) / len(every)
    want, got = [], []
    for index, values in found.items():
        want += [1 / (1 + math.exp(mean - v)) if objective == "rad" else v for v in values]
        got += expected(trained, data[index])
    both = torch.corrcoef(torch.tensor([want, got]))[0, 1].item()
    # Four standard deviations above none, of some 120 answers; a prefix does not know the end.
    assert both > 0.37
    assert objective == "cd_fudge" or abs(sum(got) / len(got) - 0.5) < 0.2
    recipe = json.loads((tmp_path / "out" / "rgtg_fast.json").read_text())["recipe"]
    assert recipe["judge"] == str(judge)


def test_an_adapter_judges_as_the_model_that_it_stands_for(base: Path, tmp_path: Path) -> None:
    network, tokenizer = load_base(base)
    folder = write_adapter(tmp_path / "adapter", network, fork=1, seed=3)
    judge, data = LabelJudge(str(folder), (network, tokenizer)), rows(6)
    found = judge.label(data, set(range(6)), tmp_path / "labels.jsonl", 64)
    whole = Adapter.load(folder).merged(network)
    for index in range(6):
        assert list(found[index]) == pytest.approx(expected(whole, data[index]), abs=1e-4)


def test_a_judge_without_a_chat_template_reads_plain_prompts(base: Path, tmp_path: Path) -> None:
    judge, data = save_judge(tmp_path / "judge", None), rows(6)
    found = LabelJudge(str(judge), load_base(base)).label(data, set(range(6)), tmp_path / "labels", 64)
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    for index in range(6):
        assert list(found[index]) == pytest.approx(expected(model, data[index], chat=False), abs=1e-4)


def test_what_was_rated_is_not_rated_again(base: Path, tmp_path: Path) -> None:
    judge = LabelJudge(str(save_judge(tmp_path / "judge")), load_base(base))
    data, file, wanted = rows(20), tmp_path / "labels.jsonl", set(range(20))
    whole = judge.label(data, wanted, file, 64)
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 20
    # A kill in the middle of a line, and in the line before a reward that only a reader of the file can know.
    first = json.loads(lines[0])
    lines[0] = json.dumps(first | {"chosen": 123.0}) + "\n"
    file.write_text("".join(lines[:7]) + lines[7][:10])
    said: list[str] = []
    again = judge.label(data, wanted, file, 64, said.append)
    assert again.pop(first["index"])[0] == 123.0
    del whole[first["index"]]
    # To the last digit, since training goes on from these numbers.
    assert again == whole
    assert "of 13 pairs" in said[-1]
    said.clear()
    judge.label(data, wanted, file, 64, said.append)
    assert not said


def test_probabilities_keep_the_order() -> None:
    found = as_probabilities({3: (1.0, -1.0), 7: (5000.0, -5000.0)}, 1.0)
    assert found[3] == pytest.approx((0.5, 1 / (1 + math.exp(2))))
    assert found[7] == pytest.approx((1.0, 0.0), abs=1e-12)


def test_judges_that_cannot_be(base: Path, tmp_path: Path) -> None:
    def train(**settings: Any) -> None:
        train_reward_model(base, rows(10), tmp_path / "out", QUICK, device="cpu", **settings)

    with pytest.raises(RGTGError, match="full_bt compares answers and needs no rewards"):
        train(objective="full_bt", judge="anything")
    with pytest.raises(RGTGError, match="does not exist"):
        train(objective="rad", judge=str(tmp_path / "a" / "b"))
    broken: Any = make_rm(seed=5)
    broken.score.weight.data.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    judge = LabelJudge(str(tmp_path / "broken"), load_base(base))
    with pytest.raises(RGTGError, match="a reward that is not finite"):
        judge.label(rows(3), {0, 1, 2}, tmp_path / "labels.jsonl", 64)
    short: Any = make_rm(seed=5, max_position_embeddings=6)
    short.save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    judge = LabelJudge(str(tmp_path / "short"), load_base(base))
    with pytest.raises(RGTGError, match=r"cannot read the answers of row \d+ \(context 6\)"):
        judge.label(rows(20), set(range(20)), tmp_path / "short.jsonl", 64)
