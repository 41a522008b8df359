"""The goals for a CPU with AMX, beside what was measured there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cells import ADAPTER, GOALS, TRUNK_GOALS
from benchmarks.harness import Cell
from benchmarks.report.decoding import Group, groups, measured_on, prefill_ratio
from benchmarks.report.pages import Machine, Row
from rgtg_fast.bundled import embedded

NOT_YET = "not measured yet"
NO_GOALS = "Not measured yet: run `python -m benchmarks.decode --goals` on a CPU with AMX."
# The instruction set that the goals are for.
ISA = "amx"


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        what: is compared.
        cell: in which configuration.
        goal: the figure.
        value: from the rows of the cell by method; None where a method is missing.
        at_least: whether the figure is to be exceeded, not undercut.
    """

    what: str
    cell: Cell
    goal: float
    value: Callable[[dict[str, Row]], float | None]
    at_least: bool = True

    def line(self, measured: float | None) -> str:
        """Its line of the table."""
        cell, sign = self.cell, "≥" if self.at_least else "≤"
        found = NOT_YET if measured is None else f"{measured:.2f}"
        where = f"{cell.dtype} | {cell.batch} | {cell.prompt_length} | {cell.new_tokens}"
        return f"| {self.what} | {where} | {sign} {self.goal:g} | {found} |"


def _speed(ours: str, other: str) -> Callable[[dict[str, Row]], float | None]:
    def value(cell: dict[str, Row]) -> float | None:
        if ours not in cell or other not in cell:
            return None
        return float(cell[ours]["tokens_per_second"]) / float(cell[other]["tokens_per_second"])

    return value


def _over_floor(cell: dict[str, Row]) -> float | None:
    return float(cell["two_models"]["achieved_over_floor"]) if "two_models" in cell else None


_LONG, _ROWS, _FLOAT = GOALS
_TRUNK, _TRUNK_ROWS = TRUNK_GOALS
_OVER_ARGS = "two models: tokens/s ÷ ARGS's"
TARGETS = (
    Goal("prefill of both models: its speed ÷ transformers'", _LONG, 0.95, prefill_ratio),
    Goal("prefill of both models: its speed ÷ transformers'", _FLOAT, 0.95, prefill_ratio),
    Goal(_OVER_ARGS, _LONG, 3.3, _speed("ours", "args_replicated")),
    Goal(_OVER_ARGS, _ROWS, 5.5, _speed("ours", "args_replicated")),
    Goal(_OVER_ARGS, _FLOAT, 2.7, _speed("ours", "args_replicated")),
    Goal("shared trunk: tokens/s ÷ our own unguided", _TRUNK, 0.8, _speed("shared_trunk", "ours_unguided")),
    Goal(
        "shared trunk: tokens/s ÷ our own unguided", _TRUNK_ROWS, 0.5, _speed("shared_trunk", "ours_unguided")
    ),
    Goal("two models: decoding time ÷ floor", _TRUNK, 1.25, _over_floor, at_least=False),
)
NOTES = (
    "k = 10. Every line compares methods of one interleaved run. *Prefill* is compared with the shortest one by "
    "transformers' own blocks, as in the table above. Repeated by `python -m benchmarks.decode --goals --fresh` and "
    "`python -m benchmarks.report`."
)


def goals_block(rows: list[Row]) -> str:
    """Every goal beside what was measured, a table for every CPU with the instruction set that they are for."""
    found = groups(rows)
    tables = []
    for machine in dict.fromkeys(key.machine for key in found if key.device == "cpu"):
        cells = {
            cell: found.get(_group(machine, cell), {}).get(cell.place, {}) for cell in (*GOALS, *TRUNK_GOALS)
        }
        values = [goal.value(cells[goal.cell]) for goal in TARGETS]
        if machine.isa != ISA or all(value is None for value in values):
            continue
        lines = [
            measured_on([list(cell.values()) for cell in cells.values() if cell]),
            "",
            "| what | dtype | rows B | prompt P | new tokens | goal | measured |",
            "|---|---|--:|--:|--:|--:|--:|",
            *(goal.line(value) for goal, value in zip(TARGETS, values, strict=True)),
        ]
        tables.append("\n".join(lines))
    return "\n\n".join([*tables, NOTES]) if tables else NO_GOALS


def _group(machine: Machine, cell: Cell) -> Group:
    model = embedded.NAME if cell in GOALS else f"{embedded.NAME} with {ADAPTER}"
    return Group(machine, "cpu", model, str(cell.new_tokens))
