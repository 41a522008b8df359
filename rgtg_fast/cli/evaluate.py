"""Runs `rgtg-fast evaluate`: a study from its file to its report."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.cli.terminal import console, note, print_json, status
from rgtg_fast.errors import RGTGError


def run(config: Path, changes: dict[str, Any], methods: str | None, json: bool) -> None:
    """Decodes, judges and reports what a study's file asks for.

    Args:
        config: the YAML file.
        changes: fields of `Study` to set instead of the file's; None leaves them.
        methods: names separated by commas, to leave out the others; None takes all.

    Raises:
        RGTGError: everything that a user can get wrong.
    """
    quiet()
    from rgtg_fast.evaluation.study.report import HTML, write_report
    from rgtg_fast.evaluation.study.run import run_study
    from rgtg_fast.evaluation.study.settings import Study

    study = Study.load(config, **changes)
    if not study.output.strip():
        raise RGTGError("the study's output is empty: name a folder for its results")
    if methods is not None:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise RGTGError(f"--methods {methods!r} names no method: use for example {study.methods[0].name}")
        study = study.only(names)
    with status("Loading") as progress:
        source = study.model or str(embedded.default_model(progress))
        results = run_study(study, source, study.model or embedded.NAME, progress)
        progress("Writing the report")
        rows = write_report(results, _facts(study.device))
    for warning in results.warnings:
        note(f"note: {warning}")
    if json:
        print_json({"summary": rows, "warnings": results.warnings})
        return
    show(rows, study.baseline, console())
    note(f"written: {Path(study.output) / HTML}")


def _facts(device: str | None) -> dict[str, Any]:
    """What the answers were made on; speeds mean nothing without it."""
    from rgtg_fast.bench.benchmark import machine
    from rgtg_fast.models.loading import resolve_device

    found = machine(resolve_device(device))
    on = {"on": found["gpu"] or found["cpu"], "threads:": None if found["gpu"] else found["threads"]}
    return on | {
        "torch": found["torch"],
        "transformers": found["transformers"],
        "rgtg-fast": found["rgtg_fast"],
    }


def show(rows: list[dict[str, Any]], baseline: str, console: Console) -> None:
    """Rewards, differences and speeds as a table for each judge."""
    for judge in dict.fromkeys(row["judge"] for row in rows):
        title = f"against {baseline}, 95 % intervals over prompts"
        table = Table(box=box.SIMPLE, title=title if judge is None else f"judge {judge}, {title}")
        table.add_column("method", overflow="fold")
        for name in ("reward", "difference", "wins", "tokens/s"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row["judge"] == judge:
                table.add_row(
                    _name(row),
                    _number(row["reward"], 3),
                    _interval(row, "reward_diff", "diff", "+.3f"),
                    _interval(row, "win_rate", "win", ".2f"),
                    _number(row["tokens_per_second"], 0),
                )
        console.print(table)
        if judge is not None:
            console.print(_read_at([row for row in rows if row["judge"] == judge]), highlight=False)


def _read_at(rows: list[dict[str, Any]]) -> str:
    """At which token a judge read the answers."""
    cut, places = sum(row["cut"] for row in rows), sorted({row["read_at"] for row in rows})
    return f"read at the {places[-1]}; {cut} of {sum(row['answers'] for row in rows)} answers were cut"


def _name(row: dict[str, Any]) -> str:
    return row["method"] if row["beta"] is None else f"{row['method']} β={row['beta']:g}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(row: dict[str, Any], name: str, stem: str, form: str) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:{form}} [{row[f'{stem}_lo']:{form}}, {row[f'{stem}_hi']:{form}}]"
