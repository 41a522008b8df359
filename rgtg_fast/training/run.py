"""One training run, whichever trainer it uses: shared arguments, what is recorded, and the order of the steps."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.loading import resolve_device
from rgtg_fast.training.config import CommonConfig
from rgtg_fast.training.data import TrainingData, hash_pairs
from rgtg_fast.training.folder import (
    LOG_FILE,
    RECIPE_FILE,
    Progress,
    TrainingLog,
    begin,
    no_progress,
    write_json,
)
from rgtg_fast.training.model import merge, trained_parameters


@dataclass(frozen=True)
class RunResult:
    """The result of a training run.

    Attributes:
        output: the saved folder.
        steps: optimizer steps.
        trained: number of trained parameters.
        seconds: duration of the training itself.
        data: counts of the data.
        metrics: metrics of the evaluation after training, without the prefix `eval_`; without an evaluation the last
            logged `reward` and `kl`, if there are any.
    """

    output: Path
    steps: int
    trained: int
    seconds: float
    data: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One training run, whichever trainer it uses: `prepare`, `begin`, `announce` and `train`, in this order.

    Attributes:
        config: what is learned and how.
        folder: folder of the output.
        args: arguments of the trainer.
        resume: continue from the last complete checkpoint in the folder.
        merged: folder for a whole model with the adapters merged, None for none.
        progress: receives lines about the progress; silent in all processes but the main one.
        facts: what `rgtg_fast.json` records.
        trained: number of trained parameters.
    """

    config: CommonConfig
    folder: Path
    args: TrainingArguments
    resume: bool
    merged: Path | None
    progress: Progress
    facts: dict[str, Any] = field(default_factory=dict)
    trained: int = 0

    @classmethod
    def prepare(
        cls,
        config: CommonConfig,
        output: str | os.PathLike[str],
        arguments: Callable[..., TrainingArguments],
        more: dict[str, Any],
        *,
        resume: bool,
        merged: str | os.PathLike[str] | None,
        save_steps: int,
        logging_steps: int,
        report_to: str | Sequence[str],
        device: str | None,
        progress: Progress,
    ) -> Run:
        """Checks the arguments that all trainers share, makes the trainer's own and seeds the generators.

        Args:
            arguments: the class of the trainer's arguments.
            more: further arguments of that class.
            resume, merged, save_steps, logging_steps, report_to, device, progress: as in `train_reward_model`.

        Raises:
            RGTGError: an argument that cannot be used.
        """
        check_steps(save_steps=save_steps, eval_steps=more.get("eval_steps"), logging_steps=logging_steps)
        check_reports(report_to)
        args = arguments(
            **_common_arguments(config, device),
            output_dir=str(output),
            save_steps=save_steps,
            logging_steps=logging_steps,
            report_to=report_to,
            **more,
        )
        if merged is not None and (config.full or Path(merged).exists()):
            raise RGTGError(
                "a full model has no adapters to merge: leave out the merged folder"
                if config.full
                else f"{merged} exists: name another folder for the merged model"
            )
        set_seed(config.seed)
        # With several processes, the main one prints and prepares the folder.
        progress = progress if args.process_index == 0 else no_progress
        return cls(config, Path(output), args, resume, merged if merged is None else Path(merged), progress)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes, of several that train together."""
        return self.args.process_index == 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's frozen weights; weights that are trained whole stay float32."""
        return torch.bfloat16 if self.config.bf16 and not self.config.full else torch.float32

    @functools.cached_property
    def log(self) -> TrainingLog:
        """The log, a callback of the trainer."""
        return TrainingLog(self.folder / LOG_FILE, self.progress)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to continue from, None to start from the beginning."""
        return get_last_checkpoint(str(self.folder)) if self.resume else None

    def begin(
        self,
        base_model: str | os.PathLike[str],
        base_fingerprint: str,
        data: TrainingData,
        settings: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Prepares the output folder and records in it what the run is about.

        Args:
            base_model, base_fingerprint: the model that is trained.
            data: what it is trained and evaluated on.
            settings: further settings that must be the same when the run is resumed.
            more: further facts to record; `versions` are added to those of torch and transformers.

        Raises:
            RGTGError: the folder is another run's, or cannot be written.
        """
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.facts = {
            "recipe": {**self.config.saved(), **(settings or {})},
            "base_model": str(base_model),
            "base_fingerprint": base_fingerprint,
            "data_sha256": hash_pairs(data.train),
            "eval_data_sha256": hash_pairs(data.evaluation) if data.evaluation else None,
            "data": data.report,
            **more,
            "versions": versions | more.get("versions", {}),
        }
        with self.args.main_process_first(desc="the output folder"):
            if self.main:
                begin(self.folder, self.facts, self.resume)

    def announce(self, trainer: Any, data: str) -> None:
        """Reports what is about to be trained.

        Args:
            trainer: a Trainer; its console output is replaced by `progress`.
            data: what it is trained on, in words.
        """
        for console in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(console)
        start = f"from {self.checkpoint}" if self.checkpoint else "from the start"
        self.trained = sum(parameter.numel() for _, parameter in trained_parameters(trainer.model))
        self.progress(f"training {self.trained:,} parameters on {data}, {start}")

    def train(self, trainer: Any, evaluate: bool) -> RunResult:
        """Trains, evaluates, and saves the model and the facts.

        Args:
            evaluate: whether the trainer has data to evaluate on.

        Raises:
            RGTGError: a loss or a weight that is not finite, or a folder that cannot be written.
        """
        trainer.train(resume_from_checkpoint=self.checkpoint)
        metrics = trainer.evaluate() if evaluate else _last_logged(trainer.state.log_history)
        trainer.save_to(self.folder)
        result = RunResult(
            self.folder,
            trainer.state.global_step,
            self.trained,
            self.log.seconds,
            self.facts["data"],
            {name.removeprefix("eval_"): value for name, value in metrics.items()},
        )
        if self.main:
            write_json(
                self.folder / RECIPE_FILE, self.facts | {"steps": result.steps, "metrics": result.metrics}
            )
            if self.merged is not None:
                merge(self.folder, self.merged)
        return result


def _last_logged(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The last logged reward and KL divergence, which only policy gradients have."""
    return {name: row[name] for row in history for name in ("reward", "kl") if name in row}


def _common_arguments(config: CommonConfig, device: str | None) -> dict[str, Any]:
    """The arguments of `TrainingArguments` that are the same for every trainer."""
    return {
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "bf16": config.bf16,
        "use_cpu": resolve_device(device).type == "cpu",
        "seed": config.seed,
        "save_strategy": "steps",
        "save_total_limit": 2,
        # A loss that is not finite ends the run; the message names the pairs.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **checkpointing(config.gradient_checkpointing),
    }


def check_steps(**steps: int | None) -> None:
    """Checks that numbers of steps are at least 1; None is allowed.

    Raises:
        RGTGError: naming the first.
    """
    for name, value in steps.items():
        if value is not None and value < 1:
            raise RGTGError(f"{name}={value} is below 1: use at least 1")


def check_reports(report_to: str | Sequence[str]) -> None:
    """Checks that transformers knows and finds the integrations to report to.

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


def checkpointing(on: bool) -> dict[str, Any]:
    """The arguments of `TrainingArguments` that turn gradient checkpointing on or off."""
    known = {f.name for f in fields(TrainingArguments)}
    # transformers renamed it in 5.2x; the old name warns there.
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False}}
