"""TRL's trainers on tokenized pairs and prompts: DPO, SimPO and T-REG on DPOTrainer, and RLOO.

This module needs TRL; `train_policy` checks that it is installed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer, RLOOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.answer_scores import AnswerFile
from rgtg_fast.training.checkpoints import CompleteCheckpoints
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.t_reg import adaptive_weight, regularizer

FORMS = ("dpo", "simpo")
_REWARDS = ("chosen_token_rewards", "rejected_token_rewards")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def preference_dataset(
    pairs: Sequence[TokenizedPair],
    reference: AnswerFile | None = None,
    rewards: AnswerFile | None = None,
    first: int = 0,
) -> Dataset:
    """Tokenized pairs as `TRegTrainer` takes them.

    Args:
        pairs: tokenized pairs.
        reference: the reference's log-probabilities of the answers' tokens.
        rewards: the answers' token rewards.
        first: number of the first pair in these files.
    """
    columns: dict[str, list[Any]] = {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
        "row": [pair.index for pair in pairs],
    }
    for file, names, value in ((reference, _REFERENCE, np.sum), (rewards, _REWARDS, np.ndarray.tolist)):
        if file is not None:
            both = [file[first + i] for i in range(len(pairs))]
            columns |= {name: [value(side[k]) for side in both] for k, name in enumerate(names)}
    return Dataset.from_dict(columns)


@dataclass
class TRegCollator(DataCollatorForPreference):
    """TRL's collator, which also makes token rewards [2B, S] and the pairs' row numbers."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if _REWARDS[0] in examples[0]:
            rewards = torch.zeros(batch["input_ids"].shape)
            for k, name in enumerate(_REWARDS):
                for i, example in enumerate(examples, k * len(examples)):
                    start = len(example["prompt_ids"])
                    values = torch.tensor(example[name])
                    rewards[i, start : start + len(values)] = values
            batch["token_rewards"] = rewards
        batch["rows"] = torch.tensor([example["row"] for example in examples])
        return batch


class _Recorder:
    """Calls a model and keeps the output of the first call."""

    def __init__(self, model: Any):
        self.model = model
        self.first: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        self.first = out if self.first is None else self.first
        return out


class TRegTrainer(CompleteCheckpoints, DPOTrainer):
    """TRL's DPOTrainer with token-level reward regularization, in the form of DPO or of SimPO.

    L = L_DPO + α w ( L_REG(x, y^w) + L_REG(x, y^l) ), L_REG(x, y) = − Σ_t β r̂(y_t) log π_θ(y_t | x, y_<t),
    w = σ( r_θ(x, y^l) − r_θ(x, y^w) ) without gradient (arXiv 2412.02685). The SimPO form (2405.14734) has SimPO's loss
    instead of L_DPO, with r_θ = (β/|y|) log π_θ, no reference and the margin γ, which is also in w, and β/|y| in L_REG.
    With α = 0, or data without token rewards, the loss is DPO's or SimPO's.

    The data are tokenized (`preference_dataset`), with the columns `prompt_ids`, `chosen_ids`, `rejected_ids` and `row`
    (of the source); for the DPO form `ref_chosen_logps` and `ref_rejected_logps`; for α > 0 `chosen_token_rewards` and
    `rejected_token_rewards`.

    Args:
        model, train_dataset, eval_dataset, kwargs: as in `trl.DPOTrainer`.
        args: as in `trl.DPOTrainer`, with the loss type `sigmoid`.
        alpha: α.
        form: "dpo" or "simpo".
        margin: SimPO's γ.

    Raises:
        RGTGError: α or γ is negative or not finite, the loss type is another one, or a column is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        alpha: float = 0.25,
        form: str = "dpo",
        margin: float = 1.0,
        **kwargs: Any,
    ):
        if form not in FORMS:
            raise RGTGError(f"form={form!r} is unknown: use one of {', '.join(FORMS)}")
        for name, value in (("alpha", alpha), ("margin", margin)):
            if not 0 <= value < float("inf"):
                raise RGTGError(f"{name}={value} is not a number from 0 up: use for example 0.25")
        if args.loss_type != ["sigmoid"]:
            raise RGTGError(f"loss_type={args.loss_type} is not ['sigmoid']: T-REG regularizes DPO and SimPO")
        self.alpha, self.form, self.margin = alpha, form, margin
        for data in filter(None, (train_dataset, eval_dataset)):
            wanted = (*(_REFERENCE if form == "dpo" else ()), *(_REWARDS if alpha > 0 else ()))
            missing = next((name for name in wanted if name not in data.column_names), None)
            if missing is not None:
                raise RGTGError(f"the data have no column {missing}: see preference_dataset")
        args = copy.copy(args)
        # Without this, TRL keeps a reference model to compute these log-probabilities itself.
        args.precompute_ref_log_probs = True
        args.remove_unused_columns = False
        if form == "simpo":
            args.loss_type = ["sigmoid_norm"]
        self._pairs, self._logged_at = 0, time.monotonic()
        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType]
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        # Only now, since TRL has given the tokenizer a padding token.
        self.data_collator = TRegCollator(pad_token_id=int(self._tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: rgtg_fast.json records how the policy was made."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        rewards = inputs.pop("token_rewards", None)
        self.batch_rows = inputs.pop("rows").tolist()
        mask = inputs["completion_mask"]
        lengths = mask.sum(1).clamp(min=1)
        pairs = len(mask) // 2
        if self.form == "simpo":
            # TRL's length-normalized loss, −log σ of the difference of β (log π − ref)/|y|, equals SimPO's with the
            # "reference" |y| γ/β for the chosen answer and 0 for the rejected one.
            inputs[_REFERENCE[0]] = lengths[:pairs] * (self.margin / self.beta)
            inputs[_REFERENCE[1]] = torch.zeros_like(inputs[_REFERENCE[0]])
        recorder = _Recorder(model)
        result = super()._compute_loss(recorder, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        logprobs = recorder.first.log_probs[:, -(mask.shape[1] - 1) :]
        scale = (
            self.beta / lengths
            if self.form == "simpo"
            else torch.full_like(lengths, self.beta, dtype=torch.float)
        )
        with torch.no_grad():
            sums = logprobs.sum(1)
            if self.form == "dpo":
                sums = sums - torch.cat([inputs[name] for name in _REFERENCE])
            chosen, rejected = (scale * sums).chunk(2)
        if rewards is not None and self.alpha > 0:
            margin = self.margin if self.form == "simpo" else 0.0
            weight = adaptive_weight(chosen, rejected, margin)
            first, second = regularizer(logprobs, rewards[:, 1:], scale.to(logprobs)).chunk(2)
            penalty = (weight * (first + second)).mean()
            loss = loss + self.alpha * penalty
            self._record("t_reg/regularisation", penalty.detach())
            self._record("t_reg/weight", weight.mean())
        if self.form == "simpo":
            for name, value in (
                ("chosen", chosen.mean()),
                ("rejected", rejected.mean()),
                ("margins", (chosen - rejected).mean()),
                ("accuracies", (chosen > rejected).float().mean()),
            ):
                self._record(f"rewards/{name}", value, replace=True)
        if not torch.isfinite(loss):
            raise self.not_finite("the loss", float(loss.detach()))
        if self._mode == "train":
            self._pairs += pairs * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @property
    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def _record(self, name: str, value: torch.Tensor, replace: bool = False) -> None:
        """Adds a value to the metrics that TRL averages for the log, or replaces TRL's own value."""
        found = self._metrics[self._mode][name]
        if replace:
            found.pop()
        gathered: Any = self.accelerator.gather(value)
        found.append(gathered.mean().item())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; see transformers' Trainer."""
        self._pairs, self._logged_at = 0, time.monotonic()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with pairs per second since the last log and the accuracy on held-out pairs."""
        now = time.monotonic()
        if "loss" in logs and self._pairs:
            logs["pairs_per_second"] = round(self._pairs / (now - self._logged_at), 3)
            self._pairs, self._logged_at = 0, now
        accuracies = self._metrics["eval"]["rewards/accuracies"]
        if "eval_loss" in logs and accuracies:
            logs["eval_accuracy"] = sum(accuracies) / len(accuracies)
            self._logged_at = now
        super().log(logs, start_time)


class PolicyGradientTrainer(CompleteCheckpoints, RLOOTrainer):
    """TRL's RLOOTrainer with complete checkpoints."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: rgtg_fast.json records how the policy was made."""
