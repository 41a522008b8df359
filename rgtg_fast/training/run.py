"""The folder of a training run: what it was made with, its log, and that one run never mixes with another."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rgtg_fast.errors import RGTGError
from rgtg_fast.files import only_writer, reason, write_text

Progress = Callable[[str], None]
_P = ParamSpec("_P")
_R = TypeVar("_R")

RECIPE_FILE, LOG_FILE, LOCK_FILE = "rgtg_fast.json", "training_log.jsonl", ".lock"
# More passes than any training makes; beyond it the number of steps overflows.
MAX_EPOCHS = 1_000_000


def no_progress(message: str) -> None:
    """A `Say` that says nothing."""


def last_checkpoint(folder: Path) -> str:
    """What is safe of a run, in words."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def check_output(folder: Path, resume: bool) -> None:
    """Refuses an output folder that another run has used.

    Raises:
        RGTGError: it is a file, not empty where nothing is to be resumed, or cannot be looked at.
    """
    try:
        # Tokenizers write to no other names.
        str(folder).encode()
        if os.path.lexists(folder) and not folder.is_dir():
            raise RGTGError(f"{folder} is a file: name a folder for the output")
        if not resume and folder.is_dir() and any(file.name != LOCK_FILE for file in folder.iterdir()):
            raise RGTGError(
                f"{folder} is not empty: go on with the run in it (resume), or name another folder"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(
            f"cannot use {folder} for the output ({reason(error)}): name another folder"
        ) from error


@contextlib.contextmanager
def training_folder(folder: Path, resume: bool, main: bool, progress: Progress) -> Iterator[None]:
    """Holds the output folder for one run; what a killed one left of its lock holds nobody up.

    Args:
        main: whether this is the process that writes, of several that train together.

    Raises:
        RGTGError: another run has used the folder, or is using it now, or it cannot be written.
    """
    if not main:
        yield
        return
    check_output(folder, resume)
    made = not folder.exists()
    try:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(only_writer(folder, LOCK_FILE, "name another folder"))
            except (OSError, ValueError) as error:
                if isinstance(error, RGTGError):
                    raise
                raise RGTGError(f"cannot write to {folder}: {reason(error)}, name another folder") from error
            # Another run may have begun between the look and the lock.
            check_output(folder, resume)
            yield
    except KeyboardInterrupt:
        progress(f"interrupted: {last_checkpoint(folder)}: go on with resume")
        raise
    finally:
        # A run that was refused leaves no folder: the corrected one would find it used.
        if made:
            with contextlib.suppress(OSError, ValueError):
                if {file.name for file in folder.iterdir()} == {RECIPE_FILE}:
                    (folder / RECIPE_FILE).unlink()
                folder.rmdir()


def one_run(train: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a trainer with the arguments `output`, `resume` and `say` hold its output folder (`training_folder`)."""
    signature = inspect.signature(train)

    @functools.wraps(train)
    def held(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        # As torchrun and accelerate number the processes of one training.
        main = os.environ.get("RANK", "0") == "0"
        with training_folder(Path(values["output"]), values["resume"], main, values["say"]):
            return train(*args, **kwargs)

    return held


def check_steps(**steps: int | None) -> None:
    """Refuses numbers of steps below 1; None is no number.

    Raises:
        RGTGError: naming the first.
    """
    for name, value in steps.items():
        if value is not None and value < 1:
            raise RGTGError(f"{name}={value} is below 1: use at least 1")


def check_recipe(recipe: Any, counts: dict[str, int], above: Sequence[str], least: Sequence[str]) -> None:
    """Refuses settings of a recipe that are out of range.

    Args:
        counts: whole numbers and the least value of each. above: numbers above 0. least: numbers from 0 up. Where a
            setting is None it is left out.

    Raises:
        RGTGError: naming the first.
    """
    for name, smallest in counts.items():
        value = getattr(recipe, name)
        if value is not None and not smallest <= value < 2**63:
            raise RGTGError(f"{name}={value} is not in {smallest} to 2^63 - 1: use at least {smallest}")
    for names, allowed, word in (
        (above, lambda value: 0 < value < math.inf, "above 0"),
        (least, lambda value: 0 <= value < math.inf, "a number from 0 up"),
    ):
        for name in names:
            value = getattr(recipe, name)
            if value is not None and not allowed(value):
                default = getattr(type(recipe), name)
                way = "leave it out" if default is None else f"use for example {default}"
                raise RGTGError(f"{name}={value} is not {word}: {way}")
    if not 0 <= recipe.seed < 2**32:
        raise RGTGError(
            f"seed={recipe.seed} is not in 0 to 2^32 - 1, which numpy's generator takes: use another"
        )
    if recipe.epochs > MAX_EPOCHS:
        raise RGTGError(f"epochs={recipe.epochs} would never end: use at most {MAX_EPOCHS}")
    for name in ("held_out", "warmup"):
        if not 0 <= getattr(recipe, name) < 1:
            raise RGTGError(
                f"{name}={getattr(recipe, name)} is not in [0, 1), a share: use for example "
                f"{getattr(type(recipe), name)}"
            )


def check_reports(report_to: str | Sequence[str]) -> None:
    """Refuses reports to what transformers does not know or has not installed.

    Raises:
        RGTGError: naming the first.
    """
    from transformers import integrations

    known = sorted(integrations.INTEGRATION_TO_CALLBACK)
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if name not in known:
            raise RGTGError(f"report_to={name!r} is unknown: use one of {', '.join(known)}")
        available: Callable[[], bool] | None = getattr(integrations, f"is_{name}_available", None)
        if available is not None and not available():
            raise RGTGError(f"report_to={name!r} needs the package of that name: install it, or leave it out")


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RGTGError):
            raise
        why = reason(error) if isinstance(error, OSError) else f"broken {RECIPE_FILE}"
        raise RGTGError(f"cannot use {folder} for the output ({why}): name another folder") from error
    write_json(folder / RECIPE_FILE, facts)


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
    """Writes a value as JSON, complete or not at all.

    Raises:
        RGTGError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


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

    def __init__(self, path: Path, progress: Progress):
        self.path, self.progress, self.seconds = path, progress, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        # A run that was killed, or whose disk was full, may have left half a line.
        text = self.path.read_text(encoding="utf-8", errors="replace")
        kept = [
            line
            for line in text.split("\n")
            if (step := _step(line)) is not None and step <= state.global_step
        ]
        write_text(self.path, "".join(line + "\n" for line in kept))

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
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        except OSError as error:
            raise RGTGError(
                f"cannot write {self.path} ({reason(error)}); {last_checkpoint(self.path.parent)}: free some space and "
                "go on with resume"
            ) from error
        step = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            rates = "".join(
                f", {logs[f'{what}_per_second']:,.1f} {what}/s"
                for what in ("pairs", "prefixes")
                if f"{what}_per_second" in logs
            )
            rates += f", reward {logs['reward']:.3f}" if "reward" in logs else ""
            place = f" (pass {logs['pass']})" if "pass" in logs else ""
            self.progress(
                f"{step}{place}: loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.1e}{rates}"
            )
        elif "eval_loss" in logs:
            self.progress(
                f"{step}: held out: loss {logs['eval_loss']:.4f}, accuracy {logs['eval_accuracy']:.3f}"
            )
        elif "train_runtime" in logs:
            self.seconds = float(logs["train_runtime"])


def _step(line: str) -> int | None:
    """The step of a line of the log, None where it is no whole line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
