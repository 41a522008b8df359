"""Methods against each other: settings chosen on other prompts, and intervals over prompts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from rgtg_fast.evaluation.study.settings import Cell
from rgtg_fast.evaluation.study.summary import at_setting_of_other_half, compare, write_comparisons
from tests.evaluation.studies import models, study


def cells(tmp_path: Path) -> list[Cell]:
    """unguided, greedy, pargs (β = 1), pargs (β = 4), best."""
    return study(tmp_path, models(tmp_path)).cells()


def test_no_prompt_chooses_the_setting_that_it_is_counted_with(tmp_path: Path) -> None:
    one, two = cells(tmp_path)[2:4]
    # Prompts 0, 2, 4 prefer the first setting, 1, 3, 5 the second: each half is counted at the other's choice.
    first = {i: 10.0 * (i % 2 == 0) for i in range(6)}
    second = {i: 10.0 * (i % 2 == 1) for i in range(6)}
    assert at_setting_of_other_half({one: first, two: second}) == dict.fromkeys(range(6), 0.0)
    # A setting that is better everywhere is chosen everywhere.
    better = {i: 20.0 + i for i in range(6)}
    assert at_setting_of_other_half({one: first, two: better}) == better
    # Prompts that a setting lacks are left out; a single one is counted at its own choice.
    assert at_setting_of_other_half({one: first, two: {2: 11.0}}) == {2: 11.0}


def test_many_useless_settings_give_no_advantage(tmp_path: Path) -> None:
    plain, _, one, two, _ = cells(tmp_path)
    noise = np.random.default_rng(0)
    baseline = dict.fromkeys(range(400), 0.0)
    gaps, naive = [], []
    for _ in range(100):
        settings = {cell: dict(enumerate(noise.normal(size=400))) for cell in (one, two)}
        gaps.append(compare("j", {plain: baseline, **settings})[0].difference)
        naive.append(max(np.mean(list(rewards.values())) for rewards in settings.values()))
    # The mean of 100 means of 400 values has a standard error of 0.005.
    assert abs(np.mean(gaps)) < 0.015
    assert np.mean(naive) > 0.02


def test_every_two_methods_are_compared_on_the_prompts_that_both_have(tmp_path: Path) -> None:
    plain, greedy, one, two, best = cells(tmp_path)
    rewards = {
        plain: {0: 1.0, 1: 2.0, 2: 4.0, 3: 4.0},
        greedy: {0: 1.5, 1: 2.5, 2: 4.5},
        one: {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0},
        two: {0: 2.0, 1: 3.0, 2: 5.0, 3: 5.0},
        best: {},
    }
    found = compare("judge", rewards)
    assert [(c.method, c.other) for c in found] == [
        ("greedy", "unguided"),
        ("pargs", "unguided"),
        ("pargs", "greedy"),
    ]
    assert [(c.difference, c.prompts) for c in found] == [(0.5, 3), (1.0, 4), (pytest.approx(0.5), 3)]
    assert [(c.settings, c.other_settings) for c in found] == [(1, 1), (2, 1), (2, 1)]
    assert all(c.low <= c.difference <= c.high for c in found)
    write_comparisons(found, tmp_path / "pairwise.csv")
    with (tmp_path / "pairwise.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["difference"] for row in rows] == ["0.5", "1", "0.5"]
    assert rows[1]["judge"] == "judge"
