"""`rgtg-fast evaluate`: files and table, mistakes in one line, and a run that is killed and goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.support import read_rows, run_until

PROMPTS = [f"Question number {n}?" for n in range(6)]


@pytest.fixture
def config(tmp_path: Path, lm: str, rm: str) -> Callable[..., Path]:
    """Writes a study's file."""

    def write(**changes: Any) -> Path:
        values = {
            "output": str(tmp_path / "out"),
            "prompts": PROMPTS,
            "model": lm,
            "judges": {"judge": rm},
            "max_new_tokens": 5,
            "methods": [{"name": "unguided"}, {"name": "pargs", "reward": rm, "beta": [1, 3]}],
        }
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps(values | changes))
        return path

    return write


def test_the_table_and_the_files(run: Run, config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    done = run("evaluate", "--config", path)
    assert done.code == 0
    assert "judge judge, against unguided" in done.out
    assert "pargs β=3" in done.out
    assert "the judge judge is the reward model" in done.err
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.yaml",
        "answers.jsonl",
        "scores.jsonl",
        "summary.csv",
        "report.md",
        "report.html",
    }
    assert (tmp_path / "out" / "config.yaml").read_text() == path.read_text()
    (report,) = run("evaluate", "--config", path, "--json").rows
    assert [row["method"] for row in report["summary"]] == ["unguided", "pargs", "pargs"]
    assert len(read_rows(tmp_path / "out" / "answers.jsonl")) == 18


def test_options_go_before_the_file(run: Run, config: Callable[..., Path], tmp_path: Path) -> None:
    done = run("evaluate", "--config", config(), "--output", tmp_path / "other", "--limit", 2, "--json")
    assert done.code == 0
    assert len(read_rows(tmp_path / "other" / "answers.jsonl")) == 6
    kept = (tmp_path / "other" / "config.yaml").read_text()
    assert "# changed on the command line:" in kept
    assert "#   limit: 2" in kept


def test_one_prompt_has_no_interval(run: Run, config: Callable[..., Path], tmp_path: Path) -> None:
    done = run("evaluate", "--config", config(), "--limit", 1)
    assert done.code == 0
    assert done.out.count("[–]") == 4
    rows = run("evaluate", "--config", config(), "--limit", 1, "--json").out
    assert '"diff_lo": null' in rows
    assert "[–]" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8").replace("\\", "")


def test_some_of_the_methods(run: Run, config: Callable[..., Path], tmp_path: Path) -> None:
    methods = [
        {"name": "unguided"},
        {"name": "late", "model": "/none/at/all"},
        {"name": "greedy", "greedy": True},
    ]
    path = config(methods=methods)
    assert "method late: /none/at/all contains no model" in run("evaluate", "--config", path).error
    (report,) = run("evaluate", "--config", path, "--methods", "greedy", "--json").rows
    assert [row["method"] for row in report["summary"]] == ["unguided", "greedy"]
    error = run("evaluate", "--config", path, "--methods", "greedy,beam").error
    assert "'beam' is not a method of the study: use unguided, late, greedy" in error


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": "/none/at/all.jsonl"}, "cannot read"),
        ({"method": []}, "'method' is unknown"),
        ({"model": "/none/at/all"}, "does not exist"),
        ({"judges": {"judge": "/none/at/all"}}, "judge judge: /none/at/all contains no model"),
        (
            {"methods": [{"name": "unguided", "reward": "/none/at/all"}]},
            "unguided: /none/at/all contains no model",
        ),
    ],
)
def test_mistakes_are_one_line(
    run: Run, config: Callable[..., Path], changes: dict[str, Any], told: str
) -> None:
    assert told in run("evaluate", "--config", config(**changes)).error


def test_a_broken_results_file_is_told(run: Run, config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    assert run("evaluate", "--config", path).code == 0
    answers = tmp_path / "out" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([*lines[:3], "broken\n", *lines[3:]]))
    assert "answers.jsonl:4 is not a row of such a file" in run("evaluate", "--config", path).error


def test_a_run_that_was_killed_goes_on(run: Run, config: Callable[..., Path], tmp_path: Path) -> None:
    """Killed in the second method, between two portions of two rows."""
    path = config(seeds=[0, 1], batch_size=1)
    answers = tmp_path / "out" / "answers.jsonl"
    killed = run_until("generate", 8, signal.SIGKILL, "evaluate", "--config", path)
    assert killed.code == -signal.SIGKILL
    kept = answers.read_bytes()
    assert kept.count(b"\n") == 16
    assert run("evaluate", "--config", path).code == 0
    assert answers.read_bytes().startswith(kept)
    rows = read_rows(answers)
    assert len(rows) == 3 * 6 * 2
    assert len({(r["method"], json.dumps(r["setting"]), r["index"], r["seed"]) for r in rows}) == len(rows)
