"""A study's file: sweeps, short forms, and every mistake in one line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from rgtg_fast import Guidance, RGTGError
from rgtg_fast.evaluation.study.settings import JudgeSettings, Method, Study, canonical

PLAIN: dict[str, Any] = {"output": "out", "prompts": ["Hello"], "methods": [{"name": "unguided"}]}


def study(**changes: Any) -> Study:
    return Study.of(PLAIN | changes)


def test_a_list_is_a_sweep_over_every_setting() -> None:
    method = {"name": "pargs", "reward": "some", "beta": [1, 2.5], "top_k": [5, 40], "temperature": 0.7}
    found = study(seeds=[3, 4], methods=[{"name": "unguided"}, method]).cells()[1:]
    assert [(cell.beta, cell.top_k) for cell in found] == [(1, 5), (2.5, 5), (1, 40), (2.5, 40)]
    assert found[1].guidance == Guidance(5, 2.5, 0.7)
    assert found[1].seeds == (3, 4)
    assert found[1].label == "pargs (β = 2.5, k = 5, τ = 0.7)"
    assert len({canonical(cell.setting()) for cell in found}) == 4


def test_several_guides_are_several_methods() -> None:
    method = {"name": "pargs", "reward": ["none", "some", "other"]}
    found = study(methods=[{"name": "unguided"}, method]).cells()[1:]
    assert [(cell.method, cell.reward) for cell in found] == [
        ("pargs none", None),
        ("pargs some", "some"),
        ("pargs other", "other"),
    ]


def test_without_a_guide_there_is_no_weight_to_sweep() -> None:
    (cell,) = study(methods=[{"name": "unguided", "beta": [1, 2, 3]}]).cells()
    assert cell.beta is None
    assert cell.guidance.beta == 0


def test_greedy_answers_are_decoded_once() -> None:
    greedy, cold = study(
        seeds=[5, 6],
        baseline="greedy",
        methods=[{"name": "greedy", "greedy": True}, {"name": "cold", "temperature": 0}],
    ).cells()
    assert greedy.guidance.temperature == 0
    assert greedy.seeds == cold.seeds == (5,)


def test_strategies_take_the_sampling_settings_they_do_not_name() -> None:
    methods = [
        {"name": "unguided"},
        {"name": "a", "reward": "some", "best_of": 4, "temperature": 0.8},
        {"name": "b", "reward": "some", "strategy": "segment:target=2,temperature=0.5", "top_k": 7},
        {"name": "c", "reward": "some", "strategy": "blockwise", "support": "all"},
    ]
    assert [cell.strategy for cell in study(methods=methods).cells()[1:]] == [
        "best_of_n:n=4,temperature=0.8,top_k=10",
        "segment:target=2,temperature=0.5,top_k=7",
        "blockwise:temperature=1",
    ]


def test_judges_are_names_or_tables() -> None:
    found = study(judges={"one": "some", "other": {"model": "more", "ends": "finished"}}).judges
    assert found == {"one": JudgeSettings("some"), "other": JudgeSettings("more", "finished")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": ["x"]}, "'prompt' is unknown: use output, prompts"),
        ({"methods": []}, "no methods"),
        ({"methods": ["unguided"]}, "methods is not a list of methods"),
        ({"methods": [{"name": "unguided"}] * 2}, "two methods are called 'unguided'"),
        ({"methods": [{"name": "x"}]}, "baseline='unguided' is not a method of the study: use one of x"),
        ({"methods": [{"name": "unguided", "top_k": [5, 6]}]}, "baseline 'unguided' has 2 settings"),
        ({"methods": [{"reward": "x"}]}, "method 0: name is missing"),
        ({"methods": [{"name": "unguided", "reward": 3}]}, "reward=3 is not a str or list of str"),
        ({"methods": [{"name": "unguided", "top_k": 2.5}]}, "top_k=2.5 is not an int or list of int"),
        ({"methods": [{"name": "unguided", "top_k": True}]}, "top_k=True is not an int or list of int"),
        ({"methods": [{"name": "unguided", "top_k": 0}]}, "k=0 is below 1"),
        ({"methods": [{"name": "unguided", "best_of": 3}]}, "chooses by reward: name a reward"),
        ({"methods": [{"name": "unguided", "outputs": "x", "reward": "y"}]}, "outputs and reward exclude"),
        ({"methods": [{"name": "unguided", "reward": "x", "strategy": "tree"}]}, "strategy='tree:"),
        (
            {"methods": [{"name": "unguided"}, {"name": "a", "reward": "b", "beta": [1, 1]}]},
            "a (β = 1, k = 10",
        ),
        ({"seeds": [1, 1]}, "seeds="),
        ({"seeds": [True]}, "seeds=(True,) is not a list of int"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"limit": "all"}, "limit='all' is not an int"),
        ({"judges": ["x"]}, "judges is not a table"),
        ({"judges": {"x": {"path": "y"}}}, "judge 'x': 'path' is unknown: use model, ends"),
        ({"judges": {"x": {"model": "y", "ends": "never"}}}, "ends='never' is unknown"),
        ({"judges": {"x": 3}}, "judge 'x': 3 is not a table"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RGTGError) as error:
        study(**changes)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_with_an_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("output: out\nprompts: ${STUDY_DATA}/p.jsonl\nmethods: [{name: unguided}]\n")
    with pytest.raises(RGTGError, match=r"uses \$\{STUDY_DATA\}, which is not set"):
        Study.load(path)
    monkeypatch.setenv("STUDY_DATA", "/somewhere")
    found = Study.load(path, limit=3, output=None)
    assert (found.prompts, found.limit, found.output) == ("/somewhere/p.jsonl", 3, "out")
    # What is kept beside the results names no place of this machine, and says what was changed.
    assert "/somewhere" not in found.as_yaml()
    assert "limit: 3" in found.as_yaml()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "contains no settings"),
        ("- a\n", "contains no settings"),
        ("a: [\n", "is not YAML"),
        ("a: 1\n", "'a' is unknown"),
        ("output: x\nmethods: [{name: unguided}]\n", "prompts is missing"),
    ],
)
def test_files_that_are_no_study(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(RGTGError) as error:
        Study.load(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(RGTGError, match="cannot read the study"):
        Study.load(tmp_path / "none.yaml")


def test_a_study_from_python_is_written_as_a_file_that_reads_the_same(tmp_path: Path) -> None:
    made = Study(
        output="out",
        prompts=("Hello", "Bye"),
        methods=(Method("unguided"), Method("pargs", "some", beta=(1.0, 2.0))),
        judges={"one": JudgeSettings("more", "finished")},
        seeds=(0, 2),
    )
    path = tmp_path / "study.yaml"
    path.write_text(made.as_yaml())
    assert Study.load(path) == made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("settings.Study", "study.settings.Study"),
        ("report.write_report", "study.report.write_report"),
        ("study.run_study", "study.run.run_study"),
    ],
)
def test_import_paths_of_before(old: str, new: str) -> None:
    module, name = f"rgtg_fast.evaluation.{old}".rsplit(".", 1)
    if not old.startswith("study."):
        sys.modules.pop(module, None)
    with pytest.warns(DeprecationWarning, match=f"is now rgtg_fast.evaluation.{new.rsplit('.', 1)[0]}"):
        former = getattr(importlib.import_module(module), name)
    module, name = f"rgtg_fast.evaluation.{new}".rsplit(".", 1)
    assert former is getattr(importlib.import_module(module), name)
