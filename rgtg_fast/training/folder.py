"""The folder of a training run: it belongs to one run at a time, and records the settings and the log."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rgtg_fast.errors import RGTGError
from rgtg_fast.files import only_writer, reason, write_text
from rgtg_fast.processes import Place

Progress = Callable[[str], None]
_P = ParamSpec("_P")
_R = TypeVar("_R")

RECIPE_FILE, LOG_FILE, LOCK_FILE = "rgtg_fast.json", "training_log.jsonl", ".lock"


def no_progress(message: str) -> None:
    """Ignores a message about the progress."""


def last_checkpoint(folder: Path) -> str:
    """The last complete checkpoint, in words for a message."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def check_output(folder: Path, resume: bool) -> None:
    """Checks that no other run has used the output folder.

    Raises:
        RGTGError: it is a file, cannot be read, or is not empty and the run is not resumed.
    """
    try:
        # Tokenizers cannot write to names that are not UTF-8.
        str(folder).encode()
        if os.path.lexists(folder) and not folder.is_dir():
            raise RGTGError(f"{folder} is a file: name a folder for the output")
        if not resume and folder.is_dir() and any(file.name != LOCK_FILE for file in folder.iterdir()):
            raise RGTGError(
                f"{folder} is not empty: continue its run with --resume (resume=True), or name another folder"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(
            f"cannot use {folder} for the output ({reason(error)}): name another folder"
        ) from error


@contextlib.contextmanager
def training_folder(folder: Path, resume: bool, main: bool, progress: Progress) -> Iterator[None]:
    """Locks the output folder for one run; the lock of a killed run does not block others.

    Args:
        folder: folder of the output.
        resume: whether the folder's own run continues.
        main: whether this is the process that writes, of several that train together.
        progress: receives a line when the run is interrupted.

    Raises:
        RGTGError: another run has used the folder, is using it now, or it cannot be written.
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
            # Another run may have started between the check and the lock.
            check_output(folder, resume)
            yield
    except KeyboardInterrupt:
        progress(f"interrupted: {last_checkpoint(folder)}: continue with --resume")
        raise
    finally:
        # A refused run removes its folder, so that the corrected command finds it unused.
        if made:
            with contextlib.suppress(OSError, ValueError):
                if {file.name for file in folder.iterdir()} == {RECIPE_FILE}:
                    (folder / RECIPE_FILE).unlink()
                folder.rmdir()


def one_run(train: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a training function: it locks its output folder (see `training_folder`) while it runs.

    Args:
        train: has the parameters `output`, `resume` and `progress`.
    """
    signature = inspect.signature(train)

    @functools.wraps(train)
    def held(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        main = Place.from_environment().main
        with training_folder(Path(values["output"]), values["resume"], main, values["progress"]):
            return train(*args, **kwargs)

    return held


def begin(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """Prepares the output folder and records in it what the run is about.

    Args:
        facts: for `RECIPE_FILE`; a resumed run must have the same `recipe`, `base_fingerprint` and `data_sha256`.

    Raises:
        RGTGError: the folder is another run's, or cannot be written.
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
        # Settings that did not exist in the version that began the run are not compared.
        if name in before["recipe"] and before["recipe"][name] != value:
            raise RGTGError(
                f"the run in {folder} began with {name}={before['recipe'][name]} and this one has {value}: "
                "resume with the same settings, or name another folder"
            )


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; the file is complete or unchanged.

    Raises:
        RGTGError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


class TrainingLog(TrainerCallback):
    """Writes every log entry as a line of JSON and reports the progress in words.

    Args:
        path: path of the log; a resumed run removes the lines after its checkpoint.
        progress: receives the lines about the progress.
    """

    def __init__(self, path: Path, progress: Progress):
        self.path, self.progress, self.seconds = path, progress, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        # A run that was killed, or whose disk was full, may have left an incomplete line.
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
                "continue with --resume"
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
    """The step of a line of the log, None where the line is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
