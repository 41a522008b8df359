"""The table about rounded weights, from results/weights.csv."""

from __future__ import annotations

from benchmarks.report.pages import Row, by_machine, interval, number, processor

NOT_MEASURED = "Not measured yet: run `python -m benchmarks.weights`."
_HEADER = (
    "| base | reward | engine | MB | MB per token | tokens/s | rank correlation | equal tokens | accuracy | "
    "equal verdicts |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def weights_block(rows: list[Row]) -> str:
    """Models with the weights of their files and with rounded ones, a table for every machine."""
    return "\n\n".join(map(_table, by_machine(rows).values())) or NOT_MEASURED


def _table(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        f"{first['lm']} and `{first['guide']}` as a model of its own, {processor(rows)}, "
        f"rgtg-fast {first['rgtg_fast']} ({first['commit']}).",
        "",
        *_HEADER.split("\n"),
    ]
    for row in rows:
        accuracy = interval(row, ("accuracy", "ci95_low", "ci95_high"), ".3f")
        same = f"{row['equal_verdicts']} of {row['pairs']}" if row["pairs"] else "–"
        cells = [
            row["weights"],
            row["reward_weights"],
            row["engine"],
            *(number(str(float(row[name]) / 1e6), ".0f") for name in ("weight_bytes", "bytes_per_token")),
            number(row["tokens_per_second"], ".1f"),
            number(row["rank_correlation"], ".3f"),
            f"{row['equal_tokens']} of {row['tokens']}",
            accuracy,
            same,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    judged = (
        f"*Accuracy* on {first['pairs']} pairs of {first['data']} of at most {first['max_length']} tokens, in brackets "
        "95 % intervals. "
    )
    lines += [
        "",
        f"Everything is compared with the first line; in the second the base model runs by its own blocks too, "
        f"and it shows what another order of adding up does to the same weights. *Rank "
        f"correlation* (Spearman) of the rewards of a step's {first['k']} candidates, the mean over up to "
        f"{first['steps']} steps. *Equal tokens* of greedy answers: before the first difference. "
        f"{judged if first['pairs'] else ''}*MB* are the weights of both models, the embeddings' too, and *MB per "
        "token* those that a forward of each reads. *Tokens/s* of one row without its prefill, the best of rounds in "
        "which every line had its turn.",
    ]
    return "\n".join(lines)
