"""The figures of a study, as SVG: reward over the weight β, over the divergence, over speed; accuracy."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rgtg_fast.evaluation.accuracy import FractionAccuracy, check_matplotlib, drawn, label, plain_labels
from rgtg_fast.evaluation.study.ratings import Agreement
from rgtg_fast.evaluation.study.summary import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A palette for color-blind readers (Okabe and Ito); markers distinguish the methods in black and white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Ticks of a logarithmic axis of speeds.
_TICKS = tuple(float(f"{digit}e{power}") for power in range(-2, 6) for digit in (1, 2, 5))
# Standard errors on either side of a 95 % interval.
_Z = 1.96


def reward_over_beta(rows: Sequence[Row], baseline: str) -> str | None:
    """Reward against β, one curve a method with at least two weights; None if there is none.

    Args:
        rows: rows of one judge, as `summarize` gives them.
        baseline: method whose reward is a horizontal line.
    """
    swept = {
        method: points
        for method, points in _by_method(rows, "beta").items()
        if len({point["beta"] for point in points}) > 1
    }
    if not swept:
        return None

    def draw(axes: Axes) -> None:
        looks = _looks(rows)
        for method, points in swept.items():
            x, y = [p["beta"] for p in points], [p["reward"] for p in points]
            low, high = ([p["reward"] + side * _Z * p["reward_se"] for p in points] for side in (-1, 1))
            axes.fill_between(x, low, high, color=looks[method]["color"], alpha=0.1, linewidth=0)
            axes.plot(x, y, ms=5, label=label(method), **looks[method])
        _baseline(axes, rows, baseline)
        axes.set(xlabel="weight of the guide β", ylabel="mean reward under the judge")

    return _svg(draw)


def reward_over_kl(rows: Sequence[Row], baseline: str) -> str | None:
    """Reward against the divergence from the base model; None where no divergence is known."""
    known = _by_method([row for row in rows if row["kl"] is not None], "kl")
    if not known:
        return None

    def draw(axes: Axes) -> None:
        looks = _looks(rows)
        for method, points in known.items():
            _points(axes, method, points, "kl", looks[method])
            for point in points if len(points) > 1 else []:
                text = f"β={point['beta']:g}"
                at = (point["kl"], point["reward"])
                axes.annotate(text, at, xytext=(3, 3), textcoords="offset points", fontsize=6)
        _baseline(axes, rows, baseline)
        axes.set(xlabel="KL(method ‖ base model), nats an answer", ylabel="mean reward under the judge")

    return _svg(draw)


def reward_over_speed(rows: Sequence[Row], baseline: str) -> str | None:
    """Reward against tokens per second; None where no speed is known."""
    known = _by_method([row for row in rows if row["tokens_per_second"] is not None], "beta")
    if not known:
        return None

    def draw(axes: Axes) -> None:
        looks = _looks(rows)
        for method, points in known.items():
            _points(axes, method, points, "tokens_per_second", looks[method], line=False)
        _baseline(axes, rows, baseline)
        axes.set(xscale="log", xlabel="tokens per second", ylabel="mean reward under the judge")
        speeds = [point["tokens_per_second"] for points in known.values() for point in points]
        ticks = [t for t in _TICKS if min(speeds) / 1.3 <= t <= max(speeds) * 1.3]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()

    return _svg(draw)


def accuracy_over_length(agreements: Sequence[Agreement], title: str) -> str | None:
    """Accuracy of reward models on preference pairs against the share of the answers read; None without any."""
    if not agreements:
        return None
    curves = {one.name: [FractionAccuracy(**point) for point in one.accuracy] for one in agreements}
    return _as_svg(drawn(curves, FractionAccuracy(**agreements[0].longer_wins), title))


def _by_method(rows: Sequence[Row], order: str) -> dict[str, list[Row]]:
    """The rows with a reward, by method, in the order of a column."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["reward"] is not None and row["reward_se"] is not None:
            found.setdefault(row["method"], []).append(row)
    return {
        method: sorted(points, key=lambda p: -1.0 if p[order] is None else p[order])
        for method, points in found.items()
        if order != "beta" or len(points) == 1 or all(p["beta"] is not None for p in points)
    }


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Color and marker of each method, the same in every figure."""
    count = len(COLORS)
    return {
        method: {"color": COLORS[n % count], "marker": MARKERS[(n + n // count) % count]}
        for n, method in enumerate(dict.fromkeys(row["method"] for row in rows))
    }


def _points(
    axes: Axes, method: str, points: Sequence[Row], x: str, look: dict[str, Any], line: bool = True
) -> None:
    axes.errorbar(
        [point[x] for point in points],
        [point["reward"] for point in points],
        yerr=[_Z * point["reward_se"] for point in points],
        ms=5,
        linestyle="-" if line else "",
        linewidth=1,
        elinewidth=0.6,
        label=label(method),
        **look,
    )


def _baseline(axes: Axes, rows: Sequence[Row], baseline: str) -> None:
    reward = next((row["reward"] for row in rows if row["method"] == baseline), None)
    if reward is not None:
        axes.axhline(
            reward, color="#7f7f7f", linestyle="--", linewidth=1, label=label(f"{baseline} (baseline)")
        )


def _svg(draw: Callable[[Any], None]) -> str:
    check_matplotlib()
    from matplotlib.figure import Figure

    with plain_labels():
        drawing = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = drawing.subplots()
        axes.grid(alpha=0.3)
        draw(axes)
        drawing.legend(loc="outside right upper", fontsize="small", frameon=False)
        return _as_svg(drawing)


def _as_svg(drawing: Figure) -> str:
    """A figure as SVG text; the same points give the same text."""
    import matplotlib

    file = io.StringIO()
    with (
        plain_labels(),
        matplotlib.rc_context({"svg.hashsalt": "rgtg-fast", "svg.fonttype": "none"}),
    ):
        drawing.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
