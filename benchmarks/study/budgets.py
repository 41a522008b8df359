"""How the study's models were trained and for how long, from the folders that training leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import append, read
from rgtg_fast.training.data import read_rows

BUDGETS = "training.csv"
LOGS = "training"
COLUMNS = (
    "model",
    "objective",
    "pairs",
    "fork_layer",
    "lora_rank",
    "epochs",
    "steps",
    "learning_rate",
    "seed",
    "seconds",
    "first_loss",
    "last_loss",
    "held_out_accuracy",
    "data_sha256",
)
# What TRL calls the share of held-out pairs whose chosen answer has the higher reward.
_ACCURACY = ("eval_accuracy", "eval_rewards/accuracies")
Row = dict[str, str]


def keep(models: Path, names: Iterable[str], results: Path) -> None:
    """Writes `training.csv` and the models' logs into the results; rows of models that are not here stay.

    Args:
        models: folder of the models.
        names: of the models.
        results: folder to write to.
    """
    path = results / BUDGETS
    rows: dict[str, dict[str, Any]] = {row["model"]: {**row} for row in read(path)}
    for name in names:
        log, recipe = models / name / "training_log.jsonl", models / name / "rgtg_fast.json"
        facts = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
        # A run that was interrupted has not written its steps yet.
        if "steps" in facts:
            rows[name] = budget(name, facts, list(read_rows(log)))
            (results / LOGS).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, results / LOGS / f"{name}.jsonl")
    if rows:
        path.unlink(missing_ok=True)
        append(path, rows.values(), COLUMNS)


def budget(name: str, facts: dict[str, Any], log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of `training.csv`.

    Args:
        name: of the model.
        facts: its `rgtg_fast.json`.
        log: the rows of its `training_log.jsonl`.
    """
    recipe = facts["recipe"]
    losses = [line["loss"] for line in log if "loss" in line]
    known = {key: value for line in log for key, value in line.items()}
    return {
        "model": name,
        "pairs": facts["data"]["train"]["kept"],
        "steps": facts["steps"],
        "seconds": round(sum(line.get("train_runtime", 0) for line in log)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "held_out_accuracy": next((known[key] for key in _ACCURACY if key in known), None),
        "data_sha256": facts["data_sha256"],
        **{key: recipe[key] for key in COLUMNS if key in recipe},
    }
