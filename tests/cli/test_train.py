"""`rgtg-fast train`: from a file of pairs to a guide, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "preferences.jsonl"

pytest.importorskip("peft", reason="LoRA training needs peft")


def settings(lm: str, tmp_path: Path) -> list[object]:
    return [
        "train", "--model", lm, "--data", EXAMPLE, "--output", tmp_path / "guide", "--limit", 12,
        "--max-length", 250, "--batch-tokens", 800, "--trunk-cache", tmp_path / "trunk", "--device", "cpu",
        "--log-steps", 1,
    ]  # fmt: skip


def test_it_trains_on_the_projects_pairs(run: Run, lm: str, tmp_path: Path) -> None:
    figure = tmp_path / "accuracy.svg"
    arguments = [*settings(lm, tmp_path), "--fork-layer", 1, "--held-out", 0.3, "--json", "--figure", figure]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    (report,) = outcome.rows
    assert report["steps"] > 0
    assert report["recipe"]["fork_layer"] == 1
    assert [point["fraction"] for point in report["accuracy"]] == [0.1, 0.25, 0.5, 0.75, 1.0]
    assert report["metrics"]["accuracy"] == report["accuracy"][-1]["accuracy"]
    assert "139 of 139 pairs kept" in outcome.err
    assert "the first 12 of these are taken" in outcome.err
    assert "pairs/s" in outcome.err
    assert "prefixes/s" in outcome.err
    assert figure.stat().st_size > 0
    assert list((tmp_path / "trunk").glob("*.states"))
    assert (tmp_path / "guide" / "adapter_model.safetensors").is_file()
    log = (tmp_path / "guide" / "training_log.jsonl").read_text().splitlines()
    assert any("eval_accuracy_0.25" in json.loads(line) for line in log)
    answer = run(
        "generate", "Hello", "--lm", lm, "--reward", tmp_path / "guide", "--max-new-tokens", 2, "--json"
    )
    assert answer.code == 0, answer.err


def test_errors_are_one_line(run: Run, lm: str, tmp_path: Path) -> None:
    arguments = settings(lm, tmp_path)
    assert "fork_layer=9" in run(*arguments, "--fork-layer", 9).error
    assert "objective='dpo'" in run(*arguments, "--objective", "dpo").error
    assert "does not exist" in run(*arguments, "--data", tmp_path / "none" / "here").error
    assert "no pairs are left" in run(*arguments, "--min-answer-tokens", 900).error
    (tmp_path / "guide").mkdir(exist_ok=True)
    (tmp_path / "guide" / "file").touch()
    assert "is not empty" in run(*arguments).error


@pytest.mark.parametrize("objective", ["farma", "genarm"])
def test_vocabulary_sized_guides(run: Run, lm: str, tmp_path: Path, objective: str) -> None:
    arguments = [*settings(lm, tmp_path), "--held-out", 0.3, "--fork-layer", 1, "--objective", objective]
    outcome = run(*arguments, "--stop-gradient", "--beta-r", 0.1)
    assert outcome.code == 0, outcome.err
    assert f"--reward {objective}:{tmp_path / 'guide'}" in outcome.out.replace("\n", "")
    guide = f"{objective}:{tmp_path / 'guide'}"
    options = ("--lm", lm, "--support", "combined", "--max-new-tokens", 2, "--json")
    answer = run("generate", "Hello", "--reward", guide, *options)
    assert answer.code == 0, answer.err
    # The adapter runs in the base model's own forward.
    assert answer.rows[0]["stats"]["reward_calls"] == 0
    judged = run("accuracy", "--reward", guide, "--lm", lm, "--data", EXAMPLE, "--limit", 4, "--json")
    assert judged.code == 0, judged.err


def test_a_judge_rates_the_answers(run: Run, lm: str, rm: str, tmp_path: Path) -> None:
    arguments = [*settings(lm, tmp_path), "--held-out", 0.3, "--objective", "rad", "--judge", rm]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    assert "standard deviation" in outcome.err
    assert (tmp_path / "guide" / "judge_rewards.jsonl").is_file()
    wrong = [*settings(lm, tmp_path / "other"), "--judge", rm]
    assert "needs no rewards" in run(*wrong).error
