"""Kinds of models that are served or refused: tables from models.csv, which the tests write."""

from __future__ import annotations

from benchmarks.report.pages import Row, number

NONE = "None yet."


def kinds_block(rows: list[Row], group: str) -> str:
    """The kinds of a group: first those that are served."""
    shown = [row for row in rows if row["group"] == group]
    if not shown:
        return NONE
    lines = ["| kind | | how, or why not | engine | largest difference |", "|---|---|---|---|--:|"]
    for row in sorted(shown, key=lambda row: row["outcome"] != "served"):
        why = row["how"] if row["outcome"] == "served" else f"“{row['how']}”"
        cells = [row["name"], row["outcome"], why, row["engine"] or "–"]
        lines.append("| " + " | ".join([*cells, number(row["largest_difference"], ".0e")]) + " |")
    return "\n".join(lines)
