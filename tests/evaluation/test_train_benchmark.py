"""The benchmark of training, on a tiny model: what it writes, what it counts, and that it times nothing wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import train
from rgtg_fast.errors import RGTGError
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.packing import cost
from tests.conftest import make_lm, make_tokenizer

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: LoRA is NOT timed"
)
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None,
    reason="trl is not installed: the comparison with it is NOT tested",
)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A tiny model, eight pairs of unlike lengths, and where the results go."""
    make_lm().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with (tmp_path / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for i in range(8):
            words = [f"w{(5 * i + j) % 58}" for j in range(30)]
            row = {
                "prompt": " ".join(words[: 2 + i]),
                "chosen": " ".join(words[10 : 13 + i % 5]),
                "rejected": " ".join(words[20 : 22 + (3 * i) % 7]),
            }
            file.write(json.dumps(row) + "\n")
    return [
        *("--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl")),
        *("--output", str(tmp_path / "train.csv"), "--token-budget", "64", "--max-length", "40"),
    ]


def read(arguments: list[str]) -> list[dict[str, str]]:
    with Path(arguments[arguments.index("--output") + 1]).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@needs_peft
@needs_trl
def test_every_method_is_timed_on_the_same_pairs(arguments):
    assert train.main([*arguments, "--batches", "3", "--name", "tiny"]) == 0
    rows = read(arguments)
    assert [(row["method"], row["mode"]) for row in rows] == [
        ("packed", "eos"),
        ("packed", "hold"),
        ("one_row_per_prefix", "eos"),
        ("trl", ""),
    ]
    eos, hold, single, trl = ({k: float(row[k]) for k in NUMBERS} for row in rows)
    assert {(row["model"], row["tuning"], row["pairs"]) for row in rows} == {("tiny", "lora-16", "8")}
    assert all(float(row["pairs_per_second"]) > 0 for row in rows)
    assert float(rows[0]["gradient_difference"]) < 1e-4
    assert float(rows[2]["loss_difference"]) < 1e-5
    assert rows[2]["time_is"].startswith("extrapolated by tokens from 3 of")
    # The pairs are the whole data here: what was counted is what is computed without running.
    assert eos["tokens_per_pair"] >= eos["data_tokens_per_pair"] == eos["tokens_per_pair"] * eos["filled"]
    assert hold["data_tokens_per_pair"] < eos["data_tokens_per_pair"] < single["data_tokens_per_pair"]
    assert single["tokens_per_pair"] == single["data_tokens_per_pair"]
    assert trl["tokens_per_pair"] >= hold["tokens_per_pair"]
    assert 0.5 < trl["filled"] <= 1


NUMBERS = ("tokens_per_pair", "data_tokens_per_pair", "filled")


def test_full_training_without_the_peers_goes_behind_what_is_there(arguments):
    for _ in range(2):
        assert train.main([*arguments, "--full", "--limit", "5", "--methods", "packed"]) == 0
    rows = read(arguments)
    assert [row["mode"] for row in rows] == ["eos", "hold"] * 2
    assert {row["tuning"] for row in rows} == {"full"}
    assert {row["pairs"] for row in rows} == {"5"}


@needs_peft
@needs_trl
def test_bfloat16(arguments):
    assert train.main([*arguments, "--limit", "4", "--dtype", "bfloat16"]) == 0
    assert [row["dtype"] for row in read(arguments)] == ["bfloat16"] * 4


def test_nothing_is_timed_where_the_two_ways_differ(arguments, monkeypatch, capsys):
    right = train.loss_of_rows
    monkeypatch.setattr(train, "loss_of_rows", lambda *given: 1.01 * right(*given))
    assert train.main([*arguments, "--full"]) == 2
    error = capsys.readouterr().err
    assert "differ by 0.0099 in the loss" in error
    assert "nothing was timed" in error
    assert not Path(arguments[arguments.index("--output") + 1]).exists()


def test_published_rows_and_their_batches():
    pair = TokenizedPair([7, 8], [3, 4, 1], [5, 1], 0)
    assert list(train.prefixes(pair)) == [
        ([7, 8, 3], [7, 8, 5]),
        ([7, 8, 3, 4], [7, 8, 5, 1]),
        ([7, 8, 3, 4, 1], [7, 8, 5, 1, 1]),
    ]
    lengths = [5, 1, 4, 2, 3, 30]
    batches = train.batches_by_length(lengths, 16)
    assert batches == [[1, 3], [4, 2], [0], [5]]


def test_tokens_of_a_data_set_without_running():
    pairs = [TokenizedPair([7] * 4, [3, 1], [5, 5, 1], 0), TokenizedPair([7], [3, 1], [1], 1)]
    assert train.tokens_per_pair(pairs, "packed", "hold", 1, 64) == (9 + 4) / 2
    assert train.tokens_per_pair(pairs, "packed", "eos", 1, 64) == sum(cost(p, True) for p in pairs) / 2
    assert train.tokens_per_pair(pairs, "trl", "", 1, 64) == (14 + 6) / 2
    assert train.tokens_per_pair(pairs, "trl", "", 2, 64) == 28 / 2
    # Rows of 2, 3, 5, 6 and 7 tokens, twice each, two of them in a batch where the budget is 12.
    assert train.tokens_per_pair(pairs, "one_row_per_prefix", "eos", 1, 12) == (12 + 10 + 12 + 14) / 2


def test_pairs_are_drawn_by_seed_and_stay_in_order():
    pairs = [TokenizedPair([1], [1], [1], i) for i in range(50)]
    drawn = [pair.index for pair in train.draw(pairs, 10, seed=3)]
    assert drawn == sorted(drawn)
    assert drawn == [pair.index for pair in train.draw(pairs, 10, seed=3)]
    assert drawn != [pair.index for pair in train.draw(pairs, 10, seed=4)]


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RGTG_DATA", str(tmp_path))
    with pytest.raises(RGTGError, match=r"hh_guide_train.jsonl.gz is not in RGTG_DATA: set it to its folder"):
        train.default_data()


def test_the_meter_counts_what_enters_the_trunk():
    model = make_lm()
    meter = train.Meter(model)
    for shape in ((2, 5), (1, 3)):
        model.base_model(input_ids=torch.ones(shape, dtype=torch.long))
    assert meter.tokens == 13
