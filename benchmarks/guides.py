"""Trains reward models with several configurations, one after another, and measures their accuracy.

    python -m benchmarks.guides --data hh_guide_train.jsonl.gz --folder guides              # meant for a GPU
    python -m benchmarks.guides --data ... --folder guides --only args-lora pargs-lora      # some of them
    python -m benchmarks.guides --list

Accuracies are those on the development split, a tenth of the pairs by prompt, so that they may serve to choose a
configuration; `benchmarks.accuracy` evaluates the chosen one on other pairs. Each configuration becomes a subfolder and
a row of `guides.csv` in the folder. A run that was stopped continues with the configurations that have no row yet.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import MACHINE, append, read, shown
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.accuracy import PairScores, prefix_accuracy
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.launch import train_reward_model

TABLE = "guides.csv"
FRACTIONS = ("0.1", "0.25", "0.5", "0.75", "1")
FIELDS = (
    *("objective", "weight", "full", "fork_layer", "lora_rank", "lora_alpha", "epochs", "learning_rate"),
    *("head_learning_rate", "head_fit", "weight_decay", "token_budget", "accumulation", "seed"),
)
COLUMNS = (
    *("date", *MACHINE, "model", "data", "name", *FIELDS, "pairs", "steps", "seconds", "loss"),
    *(f"accuracy_{fraction}" for fraction in FRACTIONS),
)
OBJECTIVES = {"args": "full_bt", "pargs": "partial_bt"}
# The first is that of the bundled reward models, but with adapters on all layers, for training on a GPU.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 16, "lora_alpha": 32.0, "num_train_epochs": 2.0, "learning_rate": 2e-4},
    "lora-wide": {"lora_rank": 64, "lora_alpha": 64.0, "num_train_epochs": 3.0, "learning_rate": 1e-4},
    "lora-decay": {
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "num_train_epochs": 3.0,
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
    },
    "full": {"full": True, "num_train_epochs": 2.0, "learning_rate": 2e-5},
}


def recipes() -> dict[str, TrainConfig]:
    """Every setting with either objective, by name."""
    common = {
        "weight": "pair",
        "head_fit": 0.3,
        "head_learning_rate": 1e-4,
        "token_budget": 8192,
        "gradient_accumulation_steps": 1,
    }
    return {
        f"{method}-{name}": TrainConfig(objective=objective, bf16=True, **common, **settings)
        for name, settings in SETTINGS.items()
        for method, objective in OBJECTIVES.items()
    }


def accuracies(scores: Sequence[PairScores]) -> dict[str, float]:
    """Accuracy by the share of the answers that is read."""
    found = prefix_accuracy(scores, [float(fraction) for fraction in FRACTIONS])
    return {f"accuracy_{fraction}": point.accuracy for fraction, point in zip(FRACTIONS, found, strict=True)}


def train(
    name: str, recipe: TrainConfig, lm: str, data: Path, folder: Path, device: str | None
) -> dict[str, Any]:
    """Trains one reward model into the folder of its name and returns its row."""
    # Left behind by a run that was stopped.
    shutil.rmtree(folder / name, ignore_errors=True)
    result = train_reward_model(
        lm, data, folder / name, recipe, device=device, cache_trunk=False, metrics=accuracies, progress=print
    )
    shutil.rmtree(folder / name / "trunk", ignore_errors=True)
    for checkpoint in (folder / name).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    metrics = result.metrics
    return {
        "name": name,
        **{field: recipe.saved()[field] for field in FIELDS},
        "pairs": result.data["train"]["kept"],
        "steps": result.steps,
        "seconds": result.seconds,
        "loss": metrics.get("loss"),
        **{f"accuracy_{fraction}": metrics.get(f"accuracy_{fraction}") for fraction in FRACTIONS},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="preference pairs, as in `rgtg-fast train`")
    parser.add_argument(
        "--folder", type=Path, default=Path("guides"), help="of the reward models and their table"
    )
    parser.add_argument("--lm", help="base model (default: the embedded SmolLM2)")
    parser.add_argument("--only", nargs="+", choices=sorted(recipes()), help="these recipes")
    parser.add_argument("--limit", type=int, help="pairs at most")
    parser.add_argument("--seconds", type=float, help="begin no recipe later than this")
    parser.add_argument("--device", choices=("cpu",), help="cpu: keep to it where there is a GPU")
    parser.add_argument("--list", action="store_true", help="print the recipes and stop")
    given = parser.parse_args(arguments)
    wanted = {name: recipe for name, recipe in recipes().items() if given.only is None or name in given.only}
    if given.list:
        for name, recipe in wanted.items():
            print(name, recipe)
        return 0
    if given.data is None:
        parser.error("--data is missing: name preference pairs")
    quiet()
    began, table = time.perf_counter(), given.folder / TABLE
    try:
        lm = given.lm or str(embedded.default_model(print))
        cuda = torch.cuda.is_available() and given.device is None
        about = machine("cuda" if cuda else "cpu")
        for name, recipe in wanted.items():
            if name in {row["name"] for row in read(table)}:
                print(f"{name}: present")
                continue
            if given.seconds is not None and time.perf_counter() - began > given.seconds:
                print(f"{name}: left out, {given.seconds:g} s are over")
                continue
            print(f"{name}: {recipe}")
            recipe = TrainConfig(**{**vars(recipe), "limit": given.limit})
            row = train(name, recipe, lm, given.data, given.folder, given.device)
            row |= {column: about[column] for column in MACHINE}
            row |= {"date": datetime.date.today().isoformat(), "model": given.lm or embedded.NAME}
            row |= {"data": given.data.name.partition(".")[0]}
            append(table, [{column: shown(row.get(column)) for column in COLUMNS}], COLUMNS)
            print(name, *(f"{f}: {shown(row[f'accuracy_{f}'])}" for f in FRACTIONS), sep="  ")
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
