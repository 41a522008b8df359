"""Runs `rgtg-fast bench` and shows what it measured."""

from typing import Any

from rich.console import Console
from rich.table import Table

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.cli.terminal import console, print_json, status


def run(options: dict[str, Any], json: bool) -> None:
    """Times the methods, with the embedded model where neither a model nor a shape is named.

    Args:
        options: the arguments of `rgtg_fast.bench.benchmark.run_bench`.
        json: print the result as JSON and nothing else on stdout.

    Raises:
        RGTGError: a bad option, or methods whose outputs differ.
    """
    quiet()
    with status("Loading") as progress:
        if options["lm"] is None and options["shape"] is None:
            options = {**options, "lm": str(embedded.default_model(progress))}
        from rgtg_fast.bench.benchmark import run_bench

        result = run_bench(**options, progress=progress)
    if json:
        print_json(result)
    else:
        _show(result, console())


def _show(result: dict[str, Any], console: Console) -> None:
    rows = result["methods"]
    table = Table(header_style="bold")
    table.add_column("method", no_wrap=True)
    for name in ("tokens/s", "ms/token", "weights", "cache kept", "cache at most", "same tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['ms_per_token']:.1f}",
            _mib(row["weight_bytes"]),
            _mib(row["cache_resident_bytes"]),
            _mib(row["cache_peak_bytes"]),
            {True: "yes", False: "no", None: "–"}[row["equal_to_reference"]],
        )
    console.print(table)
    phases = Table(header_style="bold", title="ms per token by phase", title_justify="left")
    phases.add_column("phase", no_wrap=True)
    for row in rows:
        phases.add_column(row["method"], justify="right")
    for phase in dict.fromkeys(name for row in rows for name in row["phases"]):
        phases.add_row(phase, *(_milliseconds(row["phases"].get(phase)) for row in rows))
    console.print(phases)
    extended = [row["method"] for row in rows if row["extrapolated"]]
    if extended:
        console.print(f"measured on part of the job and extended: {', '.join(extended)}", style="dim")
    for name, reason in result["left_out"].items():
        console.print(f"left out: {name}: {reason}", markup=False)


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _mib(count: int | dict[str, int]) -> str:
    total = sum(count.values()) if isinstance(count, dict) else count
    return f"{total / 2**20:.1f} MiB"
