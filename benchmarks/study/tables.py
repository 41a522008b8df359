"""The study's results as a table for the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from rgtg_fast.evaluation.report import file_name

BLOCK, HEADLINE = "study", "study-headline"
FRONTIER = "benchmarks/study/results/figures/reward_over_kl_{judge}.svg"
NOT_RUN = "Not run yet: `python -m benchmarks.study`."
Row = dict[str, str]


def study_block(rows: Sequence[Row]) -> str:
    """Every method and setting against the baseline, a table for each judge.

    Args:
        rows: of the study's summary.csv.
    """
    tables = []
    for judge in dict.fromkeys(row["judge"] for row in rows if row["reward"]):
        lines = [
            f"Judge `{judge}`; in brackets 95 % intervals over prompts.",
            "",
            "| method | setting | reward ± SE | difference | win rate | difference, same length | KL | tokens/s |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [_line(row) for row in rows if row["judge"] == judge]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) or NOT_RUN


def headline_block(rows: Sequence[Row]) -> str:
    """Under the study's first judge, every method at the setting that this judge likes best, and the frontier.

    Args:
        rows: of the study's summary.csv.
    """
    judge = next((row["judge"] for row in rows if row["reward"]), None)
    if judge is None:
        return NOT_RUN
    best: dict[str, Row] = {}
    for row in rows:
        if row["judge"] == judge and row["reward"]:
            best[row["method"]] = max(
                row, best.get(row["method"], row), key=lambda each: float(each["reward"])
            )
    lines = [
        f"![Reward against the divergence from the base model]({FRONTIER.format(judge=file_name(judge))})",
        "",
        "| method | its best setting | judge's reward, difference to `unguided` | win rate | KL, nats | tokens/s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in best.values():
        cells = [
            row["method"],
            _setting(row),
            _interval(row, ("reward_diff", "diff_lo", "diff_hi"), "+.3f"),
            _interval(row, ("win_rate", "win_lo", "win_hi"), ".3f"),
            _number(row["kl"], ".1f"),
            _number(row["tokens_per_second"], ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(row: Row) -> str:
    named = (("β", "beta"), ("k", "top_k"), ("τ", "temperature"))
    return ", ".join(f"{letter} = {float(row[name]):g}" for letter, name in named if row[name]) or "–"


def _line(row: Row) -> str:
    cells = [
        row["method"],
        _setting(row),
        f"{_number(row['reward'], '.3f')} ± {_number(row['reward_se'], '.3f')}",
        _interval(row, ("reward_diff", "diff_lo", "diff_hi"), "+.3f"),
        _interval(row, ("win_rate", "win_lo", "win_hi"), ".3f"),
        _interval(row, ("length_matched_diff", "lm_lo", "lm_hi"), "+.3f"),
        _number(row["kl"], ".2f"),
        _number(row["tokens_per_second"], ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def _interval(row: Row, names: tuple[str, str, str], form: str) -> str:
    value, low, high = (_number(row[name], form) for name in names)
    return "–" if value == "–" else f"{value} [{low}, {high}]"


def _number(text: str, form: str) -> str:
    return f"{float(text):{form}}" if text else "–"
