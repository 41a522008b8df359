"""What the study keeps beside its tables: the budgets of its models and an archive of its answers."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import read
from benchmarks.report.study import NOT_RUN, budgets_block, headline_block
from benchmarks.study.archive import ARCHIVE, pack
from benchmarks.study.budgets import BUDGETS, LOGS, keep
from rgtg_fast.evaluation.study.summary import COLUMNS

LOG = [
    {"step": 10, "loss": 0.7, "learning_rate": 1e-4},
    {"step": 20, "loss": 0.6},
    {"step": 21, "train_runtime": 90.0},
    {"step": 21, "eval_rewards/accuracies": 0.55},
]


def trained(folder: Path, steps: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    recipe = {"objective": "dpo", "fork_layer": 25, "lora_rank": 8, "epochs": 1, "seed": 0}
    facts = {
        "recipe": recipe,
        "base_model": "/somewhere",
        "data_sha256": "abc",
        "data": {"train": {"kept": 1789}},
    }
    (folder / "rgtg_fast.json").write_text(json.dumps(facts | steps))
    (folder / "training_log.jsonl").write_text("\n".join(map(json.dumps, LOG)))


def test_budgets_of_finished_models_are_kept_with_their_logs(tmp_path: Path) -> None:
    trained(tmp_path / "models" / "dpo", {"steps": 21})
    trained(tmp_path / "models" / "unfinished", {})
    keep(tmp_path / "models", ["dpo", "unfinished", "none"], tmp_path / "results")
    rows = read(tmp_path / "results" / BUDGETS)
    assert [row["model"] for row in rows] == ["dpo"]
    assert (
        budgets_block(rows).splitlines()[-1]
        == "| dpo | `dpo` | 1,789 | 25 | 8 | 21 | 2 | 0.700 to 0.600 | 0.550 |"
    )
    assert "somewhere" not in (tmp_path / "results" / BUDGETS).read_text()
    assert [path.name for path in (tmp_path / "results" / LOGS).iterdir()] == ["dpo.jsonl"]


def test_budgets_of_models_that_are_not_here_stay(tmp_path: Path) -> None:
    for name in ("dpo", "treg"):
        trained(tmp_path / "models" / name, {"steps": 21})
    keep(tmp_path / "models", ["dpo", "treg"], tmp_path / "results")
    before = (tmp_path / "results" / BUDGETS).read_bytes()
    assert b"\r" not in before
    shutil.rmtree(tmp_path / "models" / "dpo")
    keep(tmp_path / "models", ["dpo", "treg"], tmp_path / "results")
    assert (tmp_path / "results" / BUDGETS).read_bytes() == before
    keep(tmp_path / "none", ["dpo"], tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def answer(method: str, beta: float | None, response: str) -> dict[str, Any]:
    setting = {"base": "tiny", "temperature": 1.0} | ({} if beta is None else {"beta": beta})
    place = {"method": method, "setting": setting, "index": 3, "seed": 0}
    return {**place, "prompt": "a prompt", "response": response, "tokens": 2, "finish": "eos"}


def test_the_archive_has_answers_and_rewards_and_no_prompts(tmp_path: Path) -> None:
    assert pack(tmp_path) is None
    answers = [answer("unguided", None, "one"), answer("pargs", 2.0, "two"), answer("pargs", 5.0, "three")]
    scores = [
        {
            **{key: each[key] for key in ("method", "setting", "index", "seed")},
            "judge": judge,
            "reward": reward,
        }
        for each, reward in zip(answers, (0.1, 0.2, 0.3), strict=True)
        for judge in ("one", "two")
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)) + "\n")
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, scores)) + "\n")
    assert pack(tmp_path) == tmp_path / ARCHIVE
    first = (tmp_path / ARCHIVE).read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(first).decode().splitlines()]
    assert [(row["method"], row["beta"], row["response"], row["rewards"]) for row in rows] == [
        ("unguided", None, "one", {"one": 0.1, "two": 0.1}),
        ("pargs", 2.0, "two", {"one": 0.2, "two": 0.2}),
        ("pargs", 5.0, "three", {"one": 0.3, "two": 0.3}),
    ]
    assert b"a prompt" not in gzip.decompress(first)
    pack(tmp_path)
    assert (tmp_path / ARCHIVE).read_bytes() == first


def test_the_headline_takes_settings_that_were_chosen_on_other_prompts() -> None:
    empty = dict.fromkeys(COLUMNS, "")
    rows = [
        empty | {"judge": judge, "method": method, "reward": "0.2", "tokens_per_second": speed}
        for judge in ("one", "the-other")
        for method, speed in (("unguided", "400"), ("pargs", "99"), ("pargs", "101"))
    ]
    pair = {"method": "pargs", "other": "unguided", "difference": "0.25", "low": "-0.1", "high": "0.6"}
    pairs = [pair | {"judge": "one"}, pair | {"judge": "the-other", "difference": "0.3"}]
    lines = headline_block(rows, pairs).splitlines()
    assert "reward_over_kl_the_other.svg" in lines[0]
    assert lines[4:] == [
        "| unguided | 1 | – | – | 400 |",
        "| pargs | 2 | +0.250 [-0.100, +0.600] | +0.300 [-0.100, +0.600] | 100 |",
    ]
    assert headline_block([empty], []) == NOT_RUN
