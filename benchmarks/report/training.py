"""Tables and the figure about training, from results/accuracy.csv and results/train.csv."""

from __future__ import annotations

from pathlib import Path

from benchmarks.accuracy import ABOVE_LONGER, ACCURACY, DIFFERENCE, LONGER
from benchmarks.report.pages import Row, by_machine, grouped, interval, latest, processor
from rgtg_fast.evaluation.accuracy import FractionAccuracy, figure

NO_ACCURACY = "Not measured yet: run `python -m benchmarks.accuracy --data FILE`."
NO_FORK = "Not measured yet: run `python -m benchmarks.fork`."
NO_COST = "Not measured yet: run `python -m benchmarks.train`."


def accuracy_block(rows: list[Row]) -> str:
    """Accuracy of every reward model by the share of the answers that it has read, and how they differ."""
    parts = []
    for judged in grouped(rows, ("data", "pairs", "dtype")):
        first = judged[0]
        longer = next(row for row in judged if row["figure"] == LONGER)
        points = [row for row in judged if row["figure"] == ACCURACY]
        fractions = list(dict.fromkeys(row["fraction"] for row in points))
        lines = [
            f"{first['data']}, {first['pairs']} pairs, {first['dtype']}; the longer answer is the chosen one in "
            f"{_share(longer)} (rgtg-fast {first['rgtg_fast']}, {first['commit']}). In brackets 95 % intervals.",
            "",
            "| answer read | " + " | ".join(f"{100 * float(f):g} %" for f in fractions) + " |",
            "|---|" + "--:|" * len(fractions),
        ]
        for name in dict.fromkeys(row["guide"] for row in points):
            lines.append(_line(f"`{name}`", [r for r in points if r["guide"] == name], _share))
            above = [r for r in judged if r["figure"] == ABOVE_LONGER and r["guide"] == name]
            lines.append(_line(f"`{name}` − longer wins", above, _gap))
        gaps = [row for row in judged if row["figure"] == DIFFERENCE]
        for one, other in dict.fromkeys((row["guide"], row["other"]) for row in gaps):
            pair = [row for row in gaps if (row["guide"], row["other"]) == (one, other)]
            lines.append(_line(f"`{one}` − `{other}`", pair, _gap))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_ACCURACY


def _line(name: str, rows: list[Row], cell: object) -> str:
    assert callable(cell)
    return f"| {name} | " + " | ".join(str(cell(row)) for row in rows) + " |"


def _share(row: Row) -> str:
    return interval(row, ("value", "ci95_low", "ci95_high"), ".3f")


def _gap(row: Row) -> str:
    return interval(row, ("value", "ci95_low", "ci95_high"), "+.3f")


def cost_block(rows: list[Row]) -> str:
    """The cost of a pair packed, one row per prefix, and in TRL's full-sequence trainer."""
    key = ("model", "dtype", "tuning", "data", "pairs", "max_length")
    parts = []
    for same in (same for own in by_machine(rows).values() for same in grouped(own, key)):
        timed = latest(same, ("method", "mode"))
        first = timed[0]
        slowest = next(row for row in timed if row["method"] == "one_row_per_prefix")
        lines = [
            f"{first['model']}, {first['tuning']}, {first['dtype']}, {first['pairs']} pairs of {first['data']} on "
            f"{processor(timed)}; torch {first['torch']}, "
            f"transformers {first['transformers']}, trl {first['trl']}, rgtg-fast {first['rgtg_fast']} "
            f"({first['commit']}). Before anything was timed, loss and gradient of the packed rows and of one row per "
            f"prefix were compared: {float(slowest['loss_difference']):.0e} and "
            f"{float(slowest['gradient_difference']):.0e} apart, relative.",
            "",
            "| trainer | tokens of a pair through the model | pairs/s | packed is faster by | time is |",
            "|---|--:|--:|--:|---|",
        ]
        packed = {row["mode"]: float(row["pairs_per_second"]) for row in timed if row["method"] == "packed"}
        for row in timed:
            speed = float(row["pairs_per_second"])
            same = packed.get(row["mode"], max(packed.values()))
            lines.append(
                f"| {_NAMES[row['method']]}{', ' + row['mode'] if row['mode'] else ''} "
                f"| {float(row['tokens_per_pair']):,.0f} | {speed:.3g} "
                f"| {'' if row['method'] == 'packed' else f'{same / speed:.3g}×'} | {row['time_is']} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_COST


def fork_block(rows: list[Row]) -> str:
    """Held-out accuracy and speed of adapters that differ in their first layer."""
    key = ("model", "dtype", "data", "pairs", "objective")
    parts = []
    for equal in (equal for own in by_machine(rows).values() for equal in grouped(own, key)):
        same = latest(equal, ("fork_layer",))
        first = same[0]
        lines = [
            f"{first['model']}, adapters trained with `{first['objective']}` on the same pairs, judged on "
            f"{first['pairs']} pairs of {first['data']}; {first['dtype']}, one row, P={first['prompt_length']}, "
            f"k={first['k']}, {first['new_tokens']} tokens, {processor(same)} "
            f"(rgtg-fast {first['rgtg_fast']}, {first['commit']}). In brackets 95 % intervals.",
            "",
            "| adapter from layer | accuracy, half of the answer | whole answer | adapter MiB | tokens/s | ÷ unguided "
            "| ÷ two models |",
            "|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in sorted(same, key=lambda row: (row["fork_layer"] == "none", row["fork_layer"].zfill(4))):
            speed = float(row["shared_trunk_tokens_per_second"])
            unguided, two = (float(row[f"{m}_tokens_per_second"]) for m in ("ours_unguided", "two_models"))
            name = "score head alone" if row["fork_layer"] == "none" else row["fork_layer"]
            lines.append(
                f"| {name} | {float(row['accuracy_0.5']):.3f} | {float(row['accuracy_1']):.3f} "
                f"[{float(row['ci95_low_1']):.3f}, {float(row['ci95_high_1']):.3f}] "
                f"| {float(row['adapter_bytes']) / 2**20:.1f} | {speed:.1f} | {speed / unguided:.2f} "
                f"| {speed / two:.2f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_FORK


_NAMES = {
    "packed": "packed prefixes",
    "one_row_per_prefix": "one row per prefix (published)",
    "trl": "TRL, full sequences only",
}


def draw_accuracy(rows: list[Row], folder: Path) -> list[Path]:
    """One figure a data set: accuracy over the share of the answers read."""
    paths = []
    for judged in grouped(rows, ("data", "pairs", "dtype")):
        curves: dict[str, list[FractionAccuracy]] = {}
        for row in judged:
            if row["figure"] == ACCURACY:
                curves.setdefault(row["guide"], []).append(_point(row))
        longer = next(row for row in judged if row["figure"] == LONGER)
        paths.append(folder / f"accuracy_{judged[0]['data']}.svg")
        figure(curves, paths[-1], _point(longer), f"{judged[0]['data']}, {judged[0]['pairs']} pairs")
    return paths


def _point(row: Row) -> FractionAccuracy:
    interval = (float(row["ci95_low"]), float(row["ci95_high"]))
    return FractionAccuracy(float(row["fraction"]), float(row["value"]), interval, int(row["pairs"]))
