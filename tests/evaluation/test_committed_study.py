"""The committed study: its file, the commands that make its models, and its table in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks.report.blocks import CONTROL, STUDY
from benchmarks.report.pages import ROOT
from benchmarks.report.study import NOT_RUN, study_block
from benchmarks.study.__main__ import CONFIG, MODELS, TRAINING, main, training
from benchmarks.study.__main__ import CONTROL as CONTROL_CONFIG
from rgtg_fast import bundled
from rgtg_fast.cli.main import app
from rgtg_fast.evaluation.judge import folders_of
from rgtg_fast.evaluation.study.settings import Study
from rgtg_fast.evaluation.study.summary import COLUMNS


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("RGTG_DATA", "/data")
    return Study.load(CONFIG)


def test_every_model_comes_with_the_package_or_is_made(study: Study) -> None:
    named = [cell.reward for cell in study.cells() if cell.reward] + [cell.model for cell in study.cells()]
    named += [judge.model for judge in study.judges.values()]
    places = {folder for name in named if name for folder in folders_of(name)}
    made = {str((MODELS / name).relative_to(ROOT)) for name in TRAINING}
    assert places == made | {bundled.resolve(name) for name in bundled.names()}
    assert {TRAINING[name][0] for name in TRAINING if name != "judge"} == {"hh_guide_train.jsonl.gz"}
    assert TRAINING["judge"][0] == "hh_judge_train.jsonl.gz"


def test_no_guide_judges(study: Study) -> None:
    guides = {folder for cell in study.cells() if cell.reward for folder in folders_of(cell.reward)}
    assert not guides & {folder for judge in study.judges.values() for folder in folders_of(judge.model)}


def test_the_control_is_guided_by_its_judge(study: Study) -> None:
    control = Study.load(CONTROL_CONFIG)
    judges = {settings.model for settings in control.judges.values()}
    assert judges == {settings.model for settings in study.judges.values()}
    assert {cell.reward for cell in control.cells()} - {None} == judges
    assert (control.max_new_tokens, control.dtype) == (study.max_new_tokens, study.dtype)
    assert ROOT / control.output / "summary.csv" == CONTROL


@pytest.mark.parametrize("name", TRAINING)
def test_the_commands_exist(name: str) -> None:
    source, options = TRAINING[name]
    command, *rest = training(name, Path("/data") / source, options)
    known = get_command(app).commands[command]  # pyright: ignore[reportAttributeAccessIssue]
    assert set(re.findall(r"--[a-z0-9-]+", " ".join(rest))) <= {o for p in known.params for o in p.opts}
    known.make_context(command, rest)


def test_missing_data_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RGTG_DATA", str(tmp_path / "none"))
    assert main([]) == 2
    assert "set RGTG_DATA" in capsys.readouterr().err


def test_the_table() -> None:
    numbers = {
        "reward": "0.5",
        "reward_se": "0.1",
        "reward_diff": "0.25",
        "diff_lo": "-0.1",
        "diff_hi": "0.6",
    }
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"judge": "j", "method": "unguided", "reward": "0.25", "reward_se": "0.1"},
        dict.fromkeys(COLUMNS, "") | {"judge": "j", "method": "pargs", "beta": "2", "top_k": "10"} | numbers,
    ]
    lines = study_block(rows).splitlines()
    assert lines[4] == "| unguided | – | 0.250 ± 0.100 | – | – | – | – | – |"
    assert lines[5] == "| pargs | β = 2, k = 10 | 0.500 ± 0.100 | +0.250 [-0.100, +0.600] | – | – | – | – |"
    assert study_block([]) == NOT_RUN


def test_the_documentation_has_the_tables_of_this_study(study: Study) -> None:
    """That they are up to date is tested with all tables."""
    assert ROOT / study.output / "summary.csv" == STUDY
