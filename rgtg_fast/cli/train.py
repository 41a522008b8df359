"""Runs `rgtg-fast train` and shows what came out."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.cli.terminal import console, note, print_json, print_line, status

# What `--reward` puts before the folder of a guide; a folder alone is a `SequenceReward`.
_PREFIXES = {"rad": "rad:", "farma": "farma:", "genarm": "genarm:"}

Scores = list[tuple[list[float], list[float]]]


class PrefixAccuracy:
    """Accuracy by the share of the answers that is read, as numbers for the log; keeps the last evaluation."""

    def __init__(self) -> None:
        self.points: list[Any] = []

    def __call__(self, scores: Scores) -> dict[str, float]:
        from rgtg_fast.evaluation.accuracy import prefix_accuracy

        self.points = prefix_accuracy(scores)
        return {f"accuracy_{point.fraction:g}": point.accuracy for point in self.points}


def run(
    model: str | None,
    data: str,
    output: Path,
    recipe: dict[str, Any],
    options: dict[str, Any],
    trunk_cache: Path | None = None,
    figure: Path | None = None,
    json: bool = False,
) -> None:
    """Trains a reward model and tells what came out.

    Args:
        recipe: fields of `Recipe`.
        options: further arguments of `train_reward_model`.
        trunk_cache: folder for the activations below the fork, by default one beside the converted models.
        figure: file for accuracy by prefix length on the evaluation pairs.

    Raises:
        RGTGError: everything that a user can get wrong.
    """
    quiet()
    # transformers' own calls of what it has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    with status("Loading") as progress:
        from rgtg_fast.training.config import TrainConfig
        from rgtg_fast.training.launch import train_reward_model

        chosen = TrainConfig(**recipe)
        if figure is not None:
            from rgtg_fast.evaluation.accuracy import check_figure

            check_figure(figure)
        source = model if model is not None else str(embedded.default_model(progress))
    accuracy = PrefixAccuracy()
    result = train_reward_model(
        source,
        data,
        output,
        chosen,
        trunk_cache=trunk_cache or embedded.cache_folder() / "trunk",
        metrics=accuracy,
        progress=note,
        **options,
    )
    if figure is not None and accuracy.points:
        from rgtg_fast.evaluation.accuracy import figure as draw

        draw({chosen.objective: accuracy.points}, figure, title=f"{output.name}, held-out pairs")
    if json:
        points = [point.as_dict() for point in accuracy.points]
        told = {**asdict(result), "filled": result.packing_efficiency, "output": str(output)}
        print_json({**told, "recipe": chosen.saved(), "accuracy": points})
        return
    if accuracy.points:
        console().print(_table(accuracy.points))
        print_line(_read_at(result.data["eval"]))
    print_line(f"saved: {output}")
    guide = f"{_PREFIXES.get(chosen.objective, '')}{output}"
    print_line(f"try it: rgtg-fast generate --reward {guide} 'How do I get better at chess?'")


def _read_at(counts: dict[str, Any]) -> str:
    """At which token the held-out answers were read, of their counts."""
    from rgtg_fast.training.data import ends_text

    return ends_text(2 * counts["kept"] - counts["cut"], counts["cut"], counts["unstated"])


def _table(points: list[Any]) -> Table:
    table = Table(title=f"chosen preferred, {points[0].n} held-out pairs", title_justify="left")
    for name in ("answer read", "accuracy", "95 % interval"):
        table.add_column(name, justify="right")
    for point in points:
        low, high = point.ci95
        table.add_row(f"{point.fraction:.0%}", f"{point.accuracy:.3f}", f"{low:.3f} – {high:.3f}")
    return table
