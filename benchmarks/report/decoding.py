"""Speed of decoding: tables and figures from results/decode*.csv."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.cells import SHARED, shown_places
from benchmarks.harness import PHASES
from benchmarks.report.pages import LINES, STYLE, Machine, Row, by_machine, processor, save_figure
from rgtg_fast.bench.methods import METHODS

# Methods of the figure, in the order of its legend.
DRAWN = ("ours", "args_replicated", "pargs_serial", "unguided")
NOTES = (
    "¹ the reward model's cache held k times and re-ordered every step; ² every candidate encoded from the "
    "start, one by one; both our own re-implementations at their best, one row at a time, as published (so the "
    "cache of ARGS is that of one row). "
    "³ transformers' own greedy `generate`, no reward model. ⁴ decoding time over the time that reading both "
    "models' weights and caches once a step takes at the measured bandwidth. ⁵ the shortest prefill of both models "
    "by transformers' own blocks (twice that of unguided, or that of ARGS, or that of our decoder on these blocks) "
    "divided by ours. ≈ measured on fewer tokens or rows, prefill counted in full."
)
TRUNK_NOTES = (
    "The reward model is a LoRA adapter of the base model. *Shared trunk*: base model and reward model in one forward, "
    "one copy of the weights. *Two models*: the same reward model as a model of its own, the adapter merged into its "
    "copy. *ARGS*: the published algorithm with that model. *Shared ÷ …*: the speed of the shared trunk divided by "
    "that of the other method; above 1 the shared trunk is faster. ¹ this package's own engine without a reward model."
)
NO_TRUNK = "Not measured yet: run `python -m benchmarks.decode --shared --reward bundled:pargs`."
NOT_DECODED = {
    "cpu": "Not measured yet: run `python -m benchmarks.decode`.",
    "cuda": "Not measured yet: run `bash benchmarks/gpu.sh` on a machine with a GPU.",
}
PHASE_COLOURS = ("#bbbbbb", "#0072b2", "#56b4e9", "#d55e00", "#f0e442", "#009e73", "#cc79a7")

Place = tuple[str, int, int, int]


def place(row: Row) -> Place:
    """A row's place in the tables: dtype, B, P, k."""
    return row["dtype"], int(row["batch"]), int(row["prompt_length"]), int(row["k"])


class Group(NamedTuple):
    """What the rows of one table have in common."""

    machine: Machine
    device: str
    model: str
    new_tokens: str


def groups(rows: list[Row]) -> dict[Group, dict[Place, dict[str, Row]]]:
    """Rows by group, place and method, the machines by name; of equals the later counts."""
    found: dict[Group, dict[Place, dict[str, Row]]] = {}
    for machine, own in by_machine(rows).items():
        for row in own:
            key = Group(machine, row["device"], row["model"], row["new_tokens"])
            found.setdefault(key, {}).setdefault(place(row), {})[row["method"]] = row
    return found


def speed_block(rows: list[Row], device: str = "cpu") -> str:
    """Tokens per second of the headline cells, a table for every machine and model."""
    parts = []
    for key, at in groups(rows).items():
        shown = [at[where] for where in shown_places(device) if where in at and "ours" in at[where]]
        if shown and key.device == device:
            parts.append(_table(shown))
    return "\n\n".join([*parts, NOTES]) if parts else NOT_DECODED[device]


def trunk_block(rows: list[Row]) -> str:
    """Tokens per second of both models in one forward, beside two models, ARGS and no reward model."""
    parts = [_trunk_table(cells) for at in groups(rows).values() if (cells := _trunk_cells(at))]
    return "\n\n".join([*parts, TRUNK_NOTES]) if parts else NO_TRUNK


def _trunk_cells(at: dict[Place, dict[str, Row]]) -> list[dict[str, Row]]:
    return [at[cell.place] for cell in SHARED if "shared_trunk" in at.get(cell.place, {})]


def range_block(rows: list[Row]) -> str:
    """The speed of the shared trunk compared with no reward model, from the slowest cell of any CPU to the fastest."""
    ratios = [
        float(cell["shared_trunk"]["tokens_per_second"]) / float(cell["ours_unguided"]["tokens_per_second"])
        for key, at in groups(rows).items()
        for cell in _trunk_cells(at)
        if key.device == "cpu" and "ours_unguided" in cell
    ]
    if not ratios:
        return NO_TRUNK
    ends = " to ".join(dict.fromkeys(f"{end:.1f}" for end in (min(ratios), max(ratios))))
    return (
        "On a CPU, decoding with k = 10 and a reward model that is an adapter of the language model reaches "
        f"{ends} times the speed of unguided decoding ([measured](#how-fast-it-is))."
    )


def _trunk_table(cells: list[dict[str, Row]]) -> str:
    lines = [
        f"Tokens per second, {_where(cells, 'shared_trunk')}",
        "",
        "| dtype | rows B | prompt P | k | unguided¹ | **shared trunk** | two models | ARGS | shared ÷ unguided "
        "| shared ÷ two models | shared ÷ ARGS | same tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for cell in cells:
        shared = cell["shared_trunk"]
        others = [cell.get(name) for name in ("ours_unguided", "two_models", "args_replicated")]
        shown = [shared[name] for name in ("dtype", "batch", "prompt_length", "k")]
        shown += [_speed(others[0]), f"**{_speed(shared)}**", _speed(others[1]), _speed(others[2])]
        shown += [_ratio(shared, other) for other in others]
        lines.append("| " + " | ".join([*shown, _equality(shared)]) + " |")
    return "\n".join(lines)


def phases_block(rows: list[Row]) -> str:
    """Where a token's time goes, and how far decoding is from the least time that reading the weights takes."""
    tables: dict[Machine, list[str]] = {}
    for key, at in groups(rows).items():
        for where in shown_places(key.device):
            for method, engine in (
                ("ours", "native"),
                ("ours_eager", "transformers"),
                ("ours_transformers", "transformers"),
            ):
                row = at.get(where, {}).get(method)
                # The phases of a captured step cannot be told apart.
                if row is not None and row["lm_ms_per_token"]:
                    line = _phases_line(key.machine.gpu or key.machine.cpu, engine, row)
                    tables.setdefault(key.machine, []).append(line)
    header = (
        "| on | engine | dtype | B | P | k | "
        + " | ".join(PHASES)
        + " | sum | weights read | floor | time ÷ floor |\n"
        + "|---|---|---|--:|--:|--:|"
        + "--:|" * (len(PHASES) + 4)
    )
    notes = (
        "Milliseconds per token of the batch, prefill spread over the answer. *Weights read*: MB per token, both "
        "models, once a step. *Floor*: ms that reading them and the caches takes at the measured bandwidth; "
        "*time ÷ floor* leaves the prefill out. On a GPU the engine is always transformers."
    )
    return "\n\n".join([*("\n".join([header, *lines]) for lines in tables.values() or [[]]), notes])


def _phases_line(machine: str, engine: str, row: Row) -> str:
    phases = [float(row[f"{phase}_ms_per_token"] or 0) for phase in PHASES]
    shown = [machine, "transformers" if row["gpu"] else engine]
    shown += [row["dtype"], row["batch"], row["prompt_length"], row["k"]]
    shown += [f"{value:.2f}" for value in (*phases, sum(phases))]
    shown.append(f"{float(row['weight_bytes_per_token']) / 1e6:.0f}")
    shown += [f"{float(row['floor_ms_per_token']):.2f}", f"{float(row['achieved_over_floor']):.2f}"]
    return "| " + " | ".join(shown) + " |"


def _where(cells: list[dict[str, Row]], method: str) -> str:
    """What was measured, and on what."""
    any_row = cells[0][method]
    roles = (
        any_row["model"] if " with " in any_row["model"] else f"{any_row['model']} as base and reward model"
    )
    return (
        f"{roles}, greedy, {any_row['new_tokens']} new tokens, prefill included. "
        f"{measured_on([list(cell.values()) for cell in cells])}"
    )


def measured_on(cells: list[list[Row]]) -> str:
    """The machine and the versions that measured these rows, a list of rows for every cell."""
    rows = [row for cell in cells for row in cell]
    bandwidths = sorted(float(cell[0]["memory_bandwidth_gb_s"]) for cell in cells)
    commits = sorted({row["commit"] for row in rows} - {""})
    return (
        f"{processor(rows)}, {bandwidths[len(bandwidths) // 2]:.0f} GB/s of memory bandwidth (measured); "
        f"torch {rows[0]['torch']}, transformers {rows[0]['transformers']}, rgtg-fast {rows[0]['rgtg_fast']}"
        + (f" ({', '.join(commits)})." if commits else ".")
    )


def _table(cells: list[dict[str, Row]]) -> str:
    lines = [
        f"Tokens per second, {_where(cells, 'ours')}",
        "",
        "| dtype | rows B | prompt P | k | rgtg-fast | ARGS¹ | PARGS² | unguided³ | vs. ARGS | vs. PARGS "
        "| reward cache, ours : ARGS | same tokens | time ÷ floor⁴ | prefill vs. transformers⁵ |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    lines += [_line(cell) for cell in cells]
    return "\n".join(lines)


def _line(cell: dict[str, Row]) -> str:
    ours, replicated, serial = cell["ours"], cell.get("args_replicated"), cell.get("pargs_serial")
    return (
        "| "
        + " | ".join(
            [
                ours["dtype"],
                ours["batch"],
                ours["prompt_length"],
                ours["k"],
                f"**{_speed(ours)}**",
                _speed(replicated),
                _speed(serial),
                _speed(cell.get("unguided")),
                _ratio(ours, replicated),
                _ratio(ours, serial),
                _caches(ours, replicated),
                _equality(ours),
                f"{float(ours['achieved_over_floor']):.2f}",
                _times(prefill_ratio(cell)),
            ]
        )
        + " |"
    )


def _speed(row: Row | None) -> str:
    if row is None:
        return "–"
    value = float(row["tokens_per_second"])
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return ("≈ " if row["time_is"] != "measured" else "") + f"{value:.{digits}f}"


def _ratio(ours: Row, other: Row | None) -> str:
    if other is None:
        return "–"
    return _times(float(ours["tokens_per_second"]) / float(other["tokens_per_second"]))


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def prefill_ratio(cell: dict[str, Row]) -> float | None:
    """The shortest prefill of both models by transformers' own blocks, divided by ours; None where there is none.

    Args:
        cell: rows by method, of a reward model as large as the base model.
    """
    # Unguided decoding has one model, and both take as long.
    peers = {"ours_transformers": 1, "args_replicated": 1, "unguided": 2}
    times = {name: row["prefill_ms_per_token"] for name, row in cell.items()}
    known = [models * float(times[name]) for name, models in peers.items() if times.get(name)]
    return min(known) / float(times["ours"]) if known and times.get("ours") else None


def _caches(ours: Row, other: Row | None) -> str:
    names = [row["cache_resident_reward_bytes"] for row in (ours, other) if row is not None]
    if len(names) < 2 or not all(names):
        return "–"
    return " : ".join(f"{float(name) / 2**20:.1f}" for name in names) + " MiB"


def _equality(row: Row) -> str:
    if row["reference"] in ("", row["method"]):
        return "–"
    if row["equal_to_reference"] == "True":
        return f"all {row['tokens_compared']}"
    gap = row["first_difference_score_gap"]
    apart = f"scores {float(gap):.2g} apart" if gap else "another top k"
    return f"first {row['first_difference_position']}, then {apart}"


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draws, for the CPU and model with the most rows, speed over prompt length and where time goes; they name it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    at = max((at for key, at in groups(rows).items() if key.device == "cpu"), key=len, default=None)
    if at is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    one = next(iter(next(iter(at.values())).values()))
    about = f"{one['model']}, {one['cpu']}, {one['threads']} threads"
    return [
        _draw_speed(at, folder / "decode_speed.svg", about),
        _draw_phases(at, folder / "decode_phases.svg", about),
    ]


def _draw_speed(at: dict[Place, dict[str, Row]], path: Path, about: str) -> Path:
    from matplotlib import pyplot

    panels = sorted(
        {(dtype, batch) for dtype, batch, _, _ in at}, key=lambda panel: (panel[0] != "float32", panel[1])
    )
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.3), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (dtype, batch) in zip(axes[0], panels, strict=True):
        here = {where: methods for where, methods in at.items() if where[:2] == (dtype, batch)}
        for method in DRAWN:
            colour = LINES[method][0]
            for k, style in ((5, ":"), (10, "-"), (40, "--")):
                points = sorted(
                    (where[2], float(methods[method]["tokens_per_second"]))
                    for where, methods in here.items()
                    if where[3] == k and method in methods
                )
                if points:
                    label = METHODS[method].label + ("" if method == "unguided" else f", k={k}")
                    axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colour, label=label)
        axis.set(xscale="log", yscale="log", title=f"{dtype}, B={batch}", xlabel="prompt length P (tokens)")
        ticks = sorted({where[2] for where in here})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens per second, prefill included")
    figure.suptitle(about, fontsize=9)
    return save_figure(figure, path, columns=4, fontsize=8)


def _draw_phases(at: dict[Place, dict[str, Row]], path: Path, about: str) -> Path:
    from matplotlib import pyplot

    order = sorted(at, key=lambda where: (where[0] != "float32", where[1], where[2], where[3]))
    bars = [(where, at[where].get("ours_eager", at[where].get("ours"))) for where in order if where[3] == 10]
    bars = [(where, row) for where, row in bars if row is not None and row["lm_ms_per_token"]]
    figure, axis = pyplot.subplots(figsize=(7.5, 0.34 * len(bars) + 1.6), layout="constrained")
    names = [f"{dtype}, B={batch}, P={length}" for (dtype, batch, length, _), _ in bars]
    left = [0.0] * len(bars)
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        widths = [float(row[f"{phase}_ms_per_token"] or 0.0) for _, row in bars]
        axis.barh(names, widths, left=left, color=colour, label=phase, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    # prefill is not decoding: the floor counts from where it ends
    floors = [float(row["prefill_ms_per_token"]) + float(row["floor_ms_per_token"]) for _, row in bars]
    axis.plot(floors, names, "k|", ms=11, label="prefill + floor of decoding")
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds per token, k=10", title=f"rgtg-fast: where the time goes\n{about}")
    return save_figure(figure, path, columns=4, fontsize=8)
