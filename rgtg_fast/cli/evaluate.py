"""`rgtg-fast evaluate`: runs a study and prints its summary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import Setup, quiet
from rgtg_fast.cli.terminal import console, note, print_json, status
from rgtg_fast.config import LENGTH, OUTPUT, option
from rgtg_fast.errors import RGTGError


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare decoding methods: answers, judges, intervals, one table and one report; continues where it stopped."""

    config: Path = option("The study: a YAML file (see docs/evaluation.md).")
    output: str | None = option("Folder of the results.", None, OUTPUT, shown="the file's")
    limit: int | None = option("Prompts to take at most.", None, LENGTH, shown="the file's", min=1)
    methods: str | None = option(
        "Methods to run, separated by commas; the baseline always runs.", None, shown="all of the file"
    )
    setup: Setup = include("device")
    json: bool = json_option()

    def run(self) -> None:
        """Runs the study, writes its report and prints the summary."""
        quiet()
        from rgtg_fast.evaluation.study.report import HTML, write_report
        from rgtg_fast.evaluation.study.run import run_study
        from rgtg_fast.evaluation.study.settings import Study

        study = Study.load(self.config, output=self.output, limit=self.limit, device=self.setup.device)
        if not study.output.strip():
            raise RGTGError("the study's output is empty: name a folder for its results")
        if self.methods is not None:
            names = [name.strip() for name in self.methods.split(",") if name.strip()]
            if not names:
                example = study.methods[0].name
                raise RGTGError(f"--methods {self.methods!r} names no method: use for example {example}")
            study = study.only(names)
        with status("Loading") as progress:
            source = study.model or str(embedded.default_model(progress))
            results = run_study(study, source, study.model or embedded.NAME, progress)
            progress("Writing the report")
            rows = write_report(results, _facts(study.device))
        for warning in results.warnings:
            note(f"note: {warning}")
        if self.json:
            print_json({"summary": rows, "warnings": results.warnings})
            return
        show(rows, study.baseline, console())
        note(f"written: {Path(study.output) / HTML}")


def _facts(device: str | None) -> dict[str, Any]:
    """Hardware and versions, for the report."""
    from rgtg_fast.bench.roofline import machine
    from rgtg_fast.models.loading import resolve_device

    found = machine(resolve_device(device))
    on = {"on": found["gpu"] or found["cpu"], "threads:": None if found["gpu"] else found["threads"]}
    return on | {
        "torch": found["torch"],
        "transformers": found["transformers"],
        "rgtg-fast": found["rgtg_fast"],
    }


def show(rows: list[dict[str, Any]], baseline: str, console: Console) -> None:
    """Prints a table of rewards, differences and speeds for each judge."""
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
            console.print(_read_at([row for row in rows if row["judge"] == judge]))


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
    if row[f"{stem}_lo"] is None:  # a single prompt
        return f"{row[name]:{form}} [–]"
    return f"{row[name]:{form}} [{row[f'{stem}_lo']:{form}}, {row[f'{stem}_hi']:{form}}]"
