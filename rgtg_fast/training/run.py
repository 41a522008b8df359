"""The folder of a training run: what it was made with, its log, and that one run never mixes with another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rgtg_fast.errors import RGTGError

Say = Callable[[str], None]

RECIPE_FILE, LOG_FILE = "rgtg_fast.json", "training_log.jsonl"


def silent(message: str) -> None:
    """A `Say` that says nothing."""


def check_output(folder: Path, resume: bool) -> None:
    """Refuses an output folder that another run has used.

    Raises:
        RGTGError: it is a file, or not empty where nothing is to be resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise RGTGError(f"{folder} is a file: name a folder for the output")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise RGTGError(f"{folder} is not empty: go on with the run in it (resume), or name another folder")


def begin(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """Prepares the output folder and writes down what the run is about.

    Args:
        facts: for `RECIPE_FILE`; its `recipe`, `base_fingerprint` and `data_sha256` must be those of a resumed run.

    Raises:
        RGTGError: another run's folder, or one that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resume and (folder / RECIPE_FILE).is_file():
            before = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
            _check_same_run(folder, before, facts)
        shutil.rmtree(folder / ".partial", ignore_errors=True)
        write_json(folder / RECIPE_FILE, facts)
    except (OSError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "broken " + RECIPE_FILE
        raise RGTGError(f"cannot use {folder} for the output ({reason}): name another folder") from error


def _check_same_run(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in ("base_fingerprint", "data_sha256"):
        if before.get(name) != now[name]:
            what = "model" if name == "base_fingerprint" else "pairs"
            raise RGTGError(f"the run in {folder} began with other {what}: name another folder for this one")
    for name, value in now["recipe"].items():
        # Settings that the version which began the run did not have cannot differ.
        if name in before["recipe"] and before["recipe"][name] != value:
            raise RGTGError(
                f"the run in {folder} began with {name}={before['recipe'][name]} and this one has {value}: "
                "resume with the same settings, or name another folder"
            )


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def checkpointing(on: bool) -> dict[str, Any]:
    """The arguments of `TrainingArguments` that recompute activations in the backward pass, or not."""
    known = {f.name for f in fields(TrainingArguments)}
    # transformers renamed it in 5.2x; the old name warns there.
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False}}


class TrainingLog(TrainerCallback):
    """Writes every log as a line of JSON and tells the progress in words.

    Args:
        path: of the log. A resumed run drops the lines after its checkpoint.
    """

    def __init__(self, path: Path, say: Say):
        self.path, self.say, self.seconds = path, say, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        # A run that was killed may have left half a line.
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        step = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            rates = "".join(
                f", {logs[f'{what}_per_second']:,.1f} {what}/s"
                for what in ("pairs", "prefixes")
                if f"{what}_per_second" in logs
            )
            rates += f", reward {logs['reward']:.3f}" if "reward" in logs else ""
            place = f" (pass {logs['pass']})" if "pass" in logs else ""
            self.say(
                f"{step}{place}: loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.1e}{rates}"
            )
        elif "eval_loss" in logs:
            self.say(f"{step}: held out: loss {logs['eval_loss']:.4f}, accuracy {logs['eval_accuracy']:.3f}")
        elif "train_runtime" in logs:
            self.seconds = float(logs["train_runtime"])
