"""What all tables and figures share: rows of results, marked sections of a page, and how numbers and lines look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
# The same numbers give the same file: no random ids.
STYLE: dict[Any, Any] = {"svg.hashsalt": "rgtg-fast", "svg.fonttype": "none", "font.size": 9}
# Colour and line of every method that is drawn; their labels are in the table of methods.
LINES = {
    "ours": ("#0072b2", "-"),
    "ours_compiled": ("#56b4e9", "-"),
    "ours_eager": ("#0072b2", ":"),
    "args_replicated": ("#d55e00", "-"),
    "pargs_serial": ("#cc79a7", "-"),
    "ours_genarm": ("#009e73", "-"),
    "genarm_published": ("#009e73", ":"),
    "unguided": ("#7f7f7f", "--"),
}
# A row of a results file.
Row = dict[str, str]


class Machine(NamedTuple):
    """What tells the machines of the results apart, as the results name it."""

    cpu: str
    isa: str
    threads: str
    gpu: str


def by_machine(rows: Sequence[Row]) -> dict[Machine, list[Row]]:
    """The rows of every machine, the machines by name, each one's rows in their order.

    A row without an instruction set is older than that column: it goes with the rows of its processor that name one,
    if they all name the same.
    """
    names = ("cpu", "threads", "gpu")
    known: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        known.setdefault(tuple(row[name] for name in names), set()).add(row.get("isa", ""))
    found: dict[Machine, list[Row]] = {}
    for row in rows:
        isas = known[tuple(row[name] for name in names)] - {""}
        isa = row.get("isa", "") or (min(isas) if len(isas) == 1 else "")
        found.setdefault(Machine(row["cpu"], isa, row["threads"], row["gpu"]), []).append(row)
    return dict(sorted(found.items()))


def processor(rows: Sequence[Row]) -> str:
    """What the rows of one machine were measured on: its GPU, or processor, threads and instruction sets."""
    first, last = rows[0], next((row for row in reversed(rows) if row.get("isa")), None)
    if first["gpu"]:
        return first["gpu"]
    text = f"{first['cpu']}, {first['threads']} thread{'' if first['threads'] == '1' else 's'}"
    if last is None:
        return text
    peer = f" (torch's own products: {last['peer_isa']})" if last["peer_isa"] else ""
    return f"{text}, instruction set {last['isa']}{peer}"


def latest(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Of the rows that have the same values in these columns the last, in the order of the first ones."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def write_block(page: Path, text: str, name: str) -> bool:
    """Put the text between a page's markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: a marker is missing.
    """
    old = page.read_text(encoding="utf-8")
    begin, end = _markers(name)
    if begin not in old or end not in old:
        raise ValueError(f"{page} has no {begin} and {end}: put them where the table belongs")
    head, _, rest = old.partition(begin)
    new = f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    if new != old:
        page.write_text(new, encoding="utf-8")
    return new != old


def current_block(page: Path, name: str) -> str:
    """The text between a page's markers."""
    begin, end = _markers(name)
    return page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip("\n")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def grouped(rows: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    """The rows that have the same values in these columns, together, in the order of their first ones."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def number(text: str, form: str) -> str:
    """A number of a results file in a format, a dash where there is none."""
    return f"{float(text):{form}}" if text else "–"


def interval(row: Row, names: tuple[str, str, str], form: str) -> str:
    """A value and its interval, from the columns of these names; a dash where there is no value."""
    value, low, high = (number(row[name], form) for name in names)
    return "–" if value == "–" else f"{value} [{low}, {high}]"


def save_figure(figure: Any, path: Path, columns: int, fontsize: int) -> Path:
    """Writes a figure of several panels, each of their labels once in a legend below them, and closes it.

    Args:
        figure: of pyplot.
        path: of the SVG file.
        columns: of the legend.
        fontsize: of the legend.
    """
    from matplotlib import pyplot

    entries = {
        label: line
        for axis in figure.axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=fontsize,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
