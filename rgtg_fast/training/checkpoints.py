"""Checkpoints that are written atomically, for every trainer of the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from rgtg_fast.errors import RGTGError
from rgtg_fast.files import publish, reason
from rgtg_fast.training.folder import last_checkpoint
from rgtg_fast.training.model import trained_parameters

# Folder for what is being written. It does not match checkpoint-N and is never resumed from.
_PARTIAL = ".partial"
# Rows that an error message names.
_NAMED_ROWS = 8


class CompleteCheckpoints(Trainer):
    """A base class of trainers: checkpoints are written to a temporary folder and renamed when they are complete.

    Weights that are not finite are never saved, and a full disk ends the run with a one-line error.

    Attributes:
        batch_rows: rows of the data in the last batch, for error messages.
    """

    batch_rows: list[int] = []  # noqa: RUF012
    _partial: Path | None = None

    def not_finite(self, what: str, value: float) -> RGTGError:
        """The error for a loss or weight that is not finite; it names the batch's rows and the last good checkpoint."""
        rows = self.batch_rows
        more = f" and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        return RGTGError(
            f"{what} became {value} at step {self.state.global_step + 1} with the pairs in rows "
            f"{', '.join(map(str, rows[:_NAMED_ROWS]))}{more} of the data; {kept}: use a smaller learning rate, or "
            "look at these pairs"
        )

    def save_to(self, folder: str | os.PathLike[str]) -> None:
        """Writes the trained model (adapters, or all weights) and the tokenizer; the files are written atomically.

        Raises:
            RGTGError: the folder cannot be written.
        """
        target = Path(folder)
        partial = target / _PARTIAL
        self._check_weights()
        try:
            self.write_model(partial)
            if self.args.should_save:
                for file in sorted(partial.iterdir(), key=lambda file: file.name.endswith("config.json")):
                    _sync(file)
                    file.replace(target / file.name)
                partial.rmdir()
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RGTGError(_cannot_save(target, "the model", error)) from error
        self.accelerator.wait_for_everyone()

    def write_model(self, folder: Path) -> None:
        """Writes the final files of the model and the tokenizer to a folder."""
        self.save_model(str(folder), _internal_call=True)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial = run / _PARTIAL
        self._check_weights()
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._partial = partial
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_global_step:
                    self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
                    self.state.save_to_json(str(partial / name / "trainer_state.json"))
                publish(partial / name, run / name)
                shutil.rmtree(partial, ignore_errors=True)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RGTGError(_cannot_save(run, name, error)) from error
        finally:
            self._partial = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        """Refuses weights that are not finite, which even a finite loss may cause: they must not be saved."""
        assert self.model is not None
        for name, parameter in trained_parameters(self.model):
            if not torch.isfinite(parameter).all():
                raise self.not_finite(f"the weight {name}", float("nan"))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_save(run: Path, what: str, error: BaseException) -> str:
    kept = last_checkpoint(run)
    return (
        f"cannot save {what} in {run} ({reason(error)}); {kept}: free some space and continue with --resume"
    )
