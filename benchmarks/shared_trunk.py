"""Draws which model runs which layers in a step, with two models and with one trunk (docs/figures/shared_trunk.svg).

`python -m benchmarks.shared_trunk` draws it for SmolLM2's 30 layers and an adapter from layer 20 on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "shared_trunk.svg"
_BASE, _ADAPTER, _BOTH = "#4c78a8", "#f58518", "#b8b8b8"


def figure(layers: int = 30, fork: int = 20, k: int = 10) -> Any:
    """The figure: layers from bottom to top, one box for every pass over a stack of weights.

    Args:
        layers: L.
        fork: f, the adapter's first layer.
        k: candidates.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.2, 4.2))
    left, right = drawn.subplots(1, 2, sharey=True)

    def box(axes: Any, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
        axes.bar(x + width / 2, height, width, bottom=y, color=color, edgecolor="white", linewidth=1.5)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)

    box(left, 0, 0, 1, layers, _BASE, f"base model\nlayers 0–{layers - 1}\n1 row\n(the newest token)")
    box(left, 0, layers, 1, 3, _BASE, "vocabulary head")
    box(left, 1.4, 0, 1, layers, _ADAPTER, f"reward model\nlayers 0–{layers - 1}\n{k} rows\n(the candidates)")
    box(left, 1.4, layers, 1, 3, _ADAPTER, "score head")
    left.set_title("two models: all weights twice", fontsize=10)
    box(right, 0, 0, 2.4, fork, _BOTH, f"layers 0–{fork - 1}, once\n{k} rows: the same for both")
    upper = f"layers {fork}–{layers - 1}\n{k} rows"
    box(right, 0, fork, 1.2, layers - fork, _BASE, f"{upper}\nas they are")
    box(right, 1.2, fork, 1.2, layers - fork, _ADAPTER, f"{upper}\n+ B·A of the adapter")
    box(right, 0, layers, 1.2, 3, _BASE, "vocabulary head\n(the chosen candidate)")
    box(right, 1.2, layers, 1.2, 3, _ADAPTER, "score head\n(all candidates)")
    right.set_title("one trunk: each layer's weights once", fontsize=10)
    for axes in (left, right):
        axes.set_xlim(-0.1, 2.5)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    left.set_yticks([0, fork, layers], ["0", f"f = {fork}", f"L = {layers}"])
    left.set_ylabel("layer")
    drawn.tight_layout()
    return drawn


def main() -> None:
    import matplotlib

    # The same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "rgtg-fast", "svg.fonttype": "none"}):
        figure().savefig(FIGURE, metadata={"Date": None})
    print(FIGURE)


if __name__ == "__main__":
    main()
