"""The study's results as a table for the documentation."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK = "study"
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


def _line(row: Row) -> str:
    named = (("β", "beta"), ("k", "top_k"), ("τ", "temperature"))
    cells = [
        row["method"],
        ", ".join(f"{letter} = {row[name]}" for letter, name in named if row[name]) or "–",
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
