"""Accuracy and speed by the layer where an adapter begins, one row per adapter.

    python -m benchmarks.fork --data FILE --reward bundled:args --reward another-adapter

The reward models are adapters of one base model that differ only in their fork layer. Each is evaluated on preference
pairs that it was not trained on and timed with its base model (one row, k=10, bfloat16, a prompt of 128 tokens). Writes
results/fork.csv.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import MACHINE, RESULTS, append, shown
from rgtg_fast import bundled
from rgtg_fast.bench.run import run_bench
from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.compare import PairData, compare_rewards
from rgtg_fast.models.adapter import Adapter

METHODS = ("shared_trunk", "two_models", "ours_unguided")
FRACTIONS = (0.25, 0.5, 1.0)
COLUMNS = (
    "date",
    *MACHINE,
    "model",
    "dtype",
    "prompt_length",
    "k",
    "new_tokens",
    "data",
    "pairs",
    "objective",
    "fork_layer",
    "adapter_bytes",
    *(f"accuracy_{f:g}" for f in FRACTIONS),
    "ci95_low_1",
    "ci95_high_1",
    *(f"{method}_tokens_per_second" for method in METHODS),
)


def measure(reward: str, data: PairData, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one adapter."""
    lm = given.lm or str(embedded.default_model(print))
    folder = Path(bundled.resolve(reward))
    adapter = Adapter.load(folder)
    quiet()
    report, _ = compare_rewards([reward], data, FRACTIONS, lm=given.lm, dtype=given.dtype, progress=print)
    found = run_bench(
        lm=lm,
        rm=reward,
        prompt_length=given.prompt_length,
        k=given.k,
        new_tokens=given.new_tokens,
        dtype=given.dtype,
        methods=METHODS,
        repeats=given.repeats,
        progress=print,
    )
    config, points = found["config"], report["accuracy"]
    speeds = {f"{row['method']}_tokens_per_second": row["tokens_per_second"] for row in found["methods"]}
    return {
        "date": datetime.date.today().isoformat(),
        **found["machine"],
        **{name: config[name] for name in ("dtype", "prompt_length", "k", "new_tokens")},
        "model": given.lm or embedded.NAME,
        "data": given.data.name.partition(".")[0],
        "pairs": points[0]["n"],
        "objective": given.objective,
        "fork_layer": "none" if adapter.fork is None else adapter.fork,
        "adapter_bytes": adapter.nbytes,
        **{f"accuracy_{point['fraction']:g}": point["accuracy"] for point in points},
        "ci95_low_1": points[-1]["ci95"][0],
        "ci95_high_1": points[-1]["ci95"][1],
        **speeds,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="preference pairs that no adapter was trained on"
    )
    parser.add_argument("--reward", action="append", required=True, help="adapter: a folder or bundled:NAME")
    parser.add_argument("--objective", default="full_bt", help="what the adapters were trained with")
    parser.add_argument("--lm", help="base model (default: the embedded SmolLM2)")
    parser.add_argument("--limit", type=int, help="pairs at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "fork.csv")
    given = parser.parse_args(arguments)
    data = PairData(str(given.data), limit=given.limit)
    try:
        for reward in given.reward:
            row = measure(reward, data, given)
            append(given.output, [{name: shown(row.get(name)) for name in COLUMNS}], COLUMNS)
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(given.reward)} rows: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
