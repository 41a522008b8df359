"""The table of docs/methods/README.md that is made of a study's summary.csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import read
from benchmarks.report.methods import NO_EVIDENCE, evidence_block, source_of
from rgtg_fast.evaluation.study.summary import COLUMNS, PAIRWISE, Comparison, write_comparisons, write_summary

ROOT = Path(__file__).parents[2]


def row(method: str, reward: float, **more: object) -> dict[str, object]:
    known = {"method": method, "judge": "held-apart", "reward": reward, "reward_se": 0.0512}
    return {**dict.fromkeys(COLUMNS), **known, **more}


def gap(difference: float, low: float, high: float) -> dict[str, object]:
    return {"reward_diff": difference, "diff_lo": low, "diff_hi": high}


COSTS = {
    "tokens_per_second": 81.234,
    "lm_calls_per_token": 0.125,
    "rm_calls_per_token": 0.0,
    "lm_tokens_per_token": 10.0,
    "rm_tokens_per_token": 10.0,
}


@pytest.fixture
def study(tmp_path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Summary and pairs, through the files that `rgtg-fast evaluate` writes."""
    rows = [
        row("unguided", 0.5, temperature=1.0, top_k=10, **{**COSTS, "rm_tokens_per_token": 0.0}),
        row("pargs", 0.7, beta=1.0, temperature=1.0, top_k=10, **gap(0.2, 0.1, 0.3), **COSTS),
        row("pargs", 0.9, beta=5.0, temperature=1.0, top_k=10, **gap(0.4, 0.25, 0.55), **COSTS),
        row("best-of-10", 0.4, top_k=10, **gap(-0.1, -0.2, -0.01), **COSTS),
        row("dpo", 0.55, **gap(0.05, -0.1, 0.2)),
        row("pargs", 3.0, judge="other", **gap(1, 0.5, 1.5)),
        row("nothing", 0.0, judge=None),
    ]
    rows[-1]["reward"] = None
    write_summary(rows, tmp_path / "summary.csv")
    # The best setting's own difference (0.4) is not what a setting chosen on other prompts gains.
    pairs = [
        Comparison("held-apart", "pargs", "unguided", 2, 1, 0.3, -0.05, 0.65, 9),
        Comparison("held-apart", "best-of-10", "unguided", 1, 1, -0.1, -0.2, -0.01, 9),
        Comparison("held-apart", "best-of-10", "pargs", 1, 2, -0.4, -0.5, -0.3, 9),
        Comparison("other", "pargs", "unguided", 1, 1, 1.0, 0.5, 1.5, 9),
    ]
    write_comparisons(pairs, tmp_path / PAIRWISE)
    return read(tmp_path / "summary.csv"), read(tmp_path / PAIRWISE)


def test_each_method_stands_at_its_best_setting_with_source_interval_and_cost(
    study: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> None:
    text = evidence_block(*study)
    first, second, notes = text.split("\n\nJudge")[0], *text.split("\n\n")[-2:]
    lines = [line for line in first.splitlines() if line.startswith("| ")][1:]
    assert lines == [
        "| unguided | – | k = 10, τ = 1 | 0.500 ± 0.051 | – | – | 81.2 | 0.125, 10 | 0, 0 |",
        "| pargs | arXiv 2406.07780 | β = 5, k = 10, τ = 1 (of 2) | 0.900 ± 0.051 | +0.300 [-0.050, +0.650] | unclear "
        "| 81.2 | 0.125, 10 | 0, 10 |",
        "| best-of-10 | – | k = 10 | 0.400 ± 0.051 | -0.100 [-0.200, -0.010] | no | 81.2 | 0.125, 10 | 0, 10 |",
        "| dpo | arXiv 2305.18290 | – | 0.550 ± 0.051 | – | – | – | – | – |",
    ]
    assert "Judge `held-apart`. *Difference*: to `unguided`" in first
    assert "| pargs | arXiv 2406.07780 | – | 3.000 ± 0.051 | +1.000 [+0.500, +1.500] | yes |" in second
    assert "nothing" not in text
    assert notes.startswith("A method that was run with several settings")


def test_without_a_study_the_table_says_so() -> None:
    assert evidence_block([], []) == NO_EVIDENCE


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("PARGS-G", "2406.07780"),
        ("pargs_greedy", "2406.07780"),
        ("args", "2402.01694"),
        ("ARGS bundled:args", "2402.01694"),
        ("CARDS", "2406.16306"),
        ("blockwise", "2310.17022"),
        ("cd-fudge", "2310.17022"),
        ("T-REG", "2412.02685"),
        ("treg_simpo", "2412.02685"),
        ("genarm 2", "2410.08193"),
        ("proxy tuning", "2401.08565"),
        ("best of 10", None),
        ("greedy", None),
        ("argsimilar", None),
        ("mixture", None),
    ],
)
def test_sources_are_found_by_name(name: str, source: str | None) -> None:
    assert source_of(name) == "–" if source is None else source in source_of(name)
