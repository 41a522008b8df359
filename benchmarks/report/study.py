"""The study's results as tables for the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.pages import Row, interval, number
from rgtg_fast.evaluation.study.report import file_name

FRONTIER = "../benchmarks/study/results/figures/reward_over_kl_{judge}.svg"
NOT_RUN = "Not run yet: `python -m benchmarks.study`."


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


def headline_block(rows: Sequence[Row], pairs: Sequence[Row]) -> str:
    """The figure of reward over divergence under the study's last judge, and every method's gain under each judge.

    Args:
        rows: of the study's summary.csv.
        pairs: of its pairwise.csv.
    """
    judged = [row for row in rows if row["reward"]]
    if not judged:
        return NOT_RUN
    judges = list(dict.fromkeys(row["judge"] for row in judged))
    baseline = judged[0]["method"]
    gains = {(pair["judge"], pair["method"]): pair for pair in pairs if pair["other"] == baseline}
    lines = [
        f"![Reward against the divergence from the base model]({FRONTIER.format(judge=file_name(judges[-1]))})",
        "",
        f"| method | settings | {' | '.join(f'reward above `{baseline}`, `{judge}`' for judge in judges)} | tokens/s |",
        f"|---|--:|{'--:|' * len(judges)}--:|",
    ]
    for method in dict.fromkeys(row["method"] for row in judged):
        own = [row for row in judged if row["method"] == method]
        speeds = [float(row["tokens_per_second"]) for row in own if row["tokens_per_second"]]
        gaps = [gains.get((judge, method)) for judge in judges]
        cells = [
            method,
            str(len(own) // len({row["judge"] for row in own})),
            *("–" if gap is None else interval(gap, ("difference", "low", "high"), "+.3f") for gap in gaps),
            f"{sum(speeds) / len(speeds):.0f}" if speeds else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def setting(row: Row) -> str:
    """The settings of a row, a dash where none is known."""
    named = (("β", "beta"), ("k", "top_k"), ("τ", "temperature"))
    return ", ".join(f"{letter} = {float(row[name]):g}" for letter, name in named if row[name]) or "–"


def _line(row: Row) -> str:
    cells = [
        row["method"],
        setting(row),
        f"{number(row['reward'], '.3f')} ± {number(row['reward_se'], '.3f')}",
        interval(row, ("reward_diff", "diff_lo", "diff_hi"), "+.3f"),
        interval(row, ("win_rate", "win_lo", "win_hi"), ".3f"),
        interval(row, ("length_matched_diff", "lm_lo", "lm_hi"), "+.3f"),
        number(row["kl"], ".2f"),
        number(row["tokens_per_second"], ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def budgets_block(rows: Sequence[Row]) -> str:
    """The rows of `training.csv` as a table for the documentation."""
    if not rows:
        return "Not trained yet: `python -m benchmarks.study --only train`."
    lines = [
        "| model | objective | pairs | from layer | rank | steps | minutes | loss, first to last | held-out accuracy |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row["model"],
            f"`{row['objective']}`",
            f"{int(row['pairs']):,}",
            row["fork_layer"],
            row["lora_rank"],
            row["steps"],
            f"{float(row['seconds']) / 60:.0f}",
            f"{float(row['first_loss']):.3f} to {float(row['last_loss']):.3f}",
            f"{float(row['held_out_accuracy']):.3f}" if row["held_out_accuracy"] else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
