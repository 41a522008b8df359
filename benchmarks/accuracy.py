"""Accuracy of the bundled reward models on held-out preferences: `python -m benchmarks.accuracy --data FILE`.

Writes to results/accuracy.csv: the accuracy of every reward model at 10, 25, 50, 75 and 100 % of the answers with 95 %
intervals, its difference from preferring the longer answer, and the differences between the reward models.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import MACHINE, RESULTS, append, read, shown
from rgtg_fast import bundled
from rgtg_fast.bench.roofline import machine
from rgtg_fast.cli.session import quiet
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.compare import PairData, compare_rewards

# Kinds of rows: accuracy, its difference from preferring the longer answer, the difference of two reward models, and
# the accuracy of preferring the longer answer.
ACCURACY, ABOVE_LONGER, DIFFERENCE, LONGER = "accuracy", "above_longer_wins", "difference", "longer_wins"
KEY = ("data", "data_sha256", "pairs", "max_length", "dtype")
COLUMNS = (
    "date",
    *MACHINE,
    *KEY,
    "figure",
    "guide",
    "other",
    "fraction",
    "value",
    "ci95_low",
    "ci95_high",
)


def rows_of(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a report of `rgtg-fast accuracy`."""
    longer = report["longer_wins"]
    yield _row(LONGER, "", "", 1.0, longer["accuracy"], longer["ci95"])
    for guide in report["guides"]:
        for point in guide["accuracy"]:
            yield _row(ACCURACY, guide["reward"], "", point["fraction"], point["accuracy"], point["ci95"])
        for gap in guide["above_longer_wins"]:
            yield _row(ABOVE_LONGER, guide["reward"], "", gap["fraction"], gap["difference"], gap["ci95"])
    for gap in report["differences"]:
        one, other = gap["rewards"]
        yield _row(DIFFERENCE, one, other, gap["fraction"], gap["difference"], gap["ci95"])


def _row(
    figure: str, guide: str, other: str, fraction: float, value: float, ci95: tuple[float, float]
) -> dict[str, Any]:
    numbers = {"fraction": fraction, "value": value, "ci95_low": ci95[0], "ci95_high": ci95[1]}
    return {"figure": figure, "guide": guide, "other": other, **numbers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="preference pairs that no reward model was trained on"
    )
    parser.add_argument("--reward", action="append", help="reward models (default: all bundled ones)")
    parser.add_argument("--lm", help="base model (default: the embedded SmolLM2)")
    parser.add_argument("--limit", type=int, help="pairs at most")
    parser.add_argument(
        "--max-length", type=int, default=1024, help="tokens of a prompt and its longer answer"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", type=Path, help="file that an interrupted run continues from")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.csv")
    given = parser.parse_args(arguments)
    quiet()
    try:
        data = PairData(str(given.data), limit=given.limit, max_length=given.max_length, keep=given.keep)
        rewards = given.reward or bundled.names()
        report, _ = compare_rewards(rewards, data, lm=given.lm, dtype=given.dtype, progress=print)
        facts = {
            "date": datetime.date.today().isoformat(),
            **machine(),
            "data": given.data.name.partition(".")[0],
            "data_sha256": hashlib.sha256(given.data.read_bytes()).hexdigest()[:16],
            "pairs": report["longer_wins"]["n"],
            "max_length": given.max_length,
            "dtype": given.dtype,
        }
        new = [{name: shown((facts | row)[name]) for name in COLUMNS} for row in rows_of(report)]
        # New rows replace those of the same data.
        key = tuple(str(facts[name]) for name in KEY)
        kept = [row for row in read(given.output) if tuple(row[name] for name in KEY) != key]
        given.output.unlink(missing_ok=True)
        append(given.output, [*kept, *new], COLUMNS)
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(new)} rows: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
