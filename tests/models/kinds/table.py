"""Writes what the tests of the kinds found, for the tables of docs/models.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tests.models.kinds import Kind, all_kinds

COLUMNS: tuple[str, ...] = ("name", "group", "outcome", "how", "engine", "largest_difference")


def write_row(path: Path, kind: Kind, report: dict[str, Any]) -> None:
    """Writes a kind's row in place of its old one; the rows have the order of `all_kinds`, and no others stay.

    Args:
        path: the CSV.
        kind: the kind.
        report: what `rgtg-fast check --json` printed for it.
    """
    rows = {(row["group"], row["name"]): row for row in read_rows(path)} if path.exists() else {}
    rows[kind.group, kind.name] = _row(kind, report)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        keys = [(each.group, each.name) for each in all_kinds()]
        writer.writerows(rows[key] for key in keys if key in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _row(kind: Kind, report: dict[str, Any]) -> dict[str, str]:
    row = {"name": kind.name, "group": kind.group, "engine": "", "largest_difference": ""}
    if not report["served"]:
        return row | {"outcome": "refused", "how": kind.refused}
    lm, *own = report["models"]
    shown = [lm] if kind.group == "language model" else own or [lm]
    found = report["cached_vs_uncached"]
    return row | {
        "outcome": "served",
        "how": kind.served,
        "engine": ", ".join(dict.fromkeys(model["engine"] for model in shown)),
        "largest_difference": f"{max(found['logprob'], found['reward'] or 0.0):.0e}",
    }
