"""PartialRewardTrainer: transformers' Trainer on packed rows of preference pairs."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.activation_cache import ActivationCache, LowerLayers
from rgtg_fast.training.checkpoints import CompleteCheckpoints
from rgtg_fast.training.data import (
    TokenizedPair,
)
from rgtg_fast.training.folder import Progress, no_progress
from rgtg_fast.training.head_fit import PAIRS, differences, fit
from rgtg_fast.training.labels import Targets
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import (
    HEAD,
    Reader,
    check_fork_layer,
    decoder_layers,
    drop_zero_adapters,
    let_autocast_cast,
    read_scores,
    read_states,
    trained_parameters,
    use_packed_forward,
)
from rgtg_fast.training.packing import RowBatches, Rows, answer_positions, collate, cost, pack, pretrained
from rgtg_fast.training.vocabulary import (
    VOCABULARY_HEAD,
    states_before,
    token_logprobs,
    token_scores,
    token_scores_and_best,
)

# Rewards of the prefixes of a pair's chosen and rejected answer.
PrefixRewards = list[tuple[list[float], list[float]]]
Metrics = Callable[[PrefixRewards], dict[str, Any]]

# How rewards are computed from the hidden states by objectives without a score head.
_READERS: dict[str, Reader] = {"farma": token_scores, "genarm": token_logprobs}


class PartialRewardTrainer(CompleteCheckpoints):
    """transformers' Trainer for reward models on packed preference pairs.

    A batch consists of rows, each packed with pairs up to the token budget; `per_device_train_batch_size` counts rows.
    The loss is divided by the number of terms of the global batch, over accumulation steps and processes, so that the
    gradient depends only on which pairs an optimizer step sees and not on how they are distributed. Checkpoints are
    written atomically (see `CompleteCheckpoints`).

    Args:
        model: a classifier with one label, or for farma and genarm a causal language model (`load_causal`); either may
            be wrapped by PEFT (`add_adapters`).
        args: transformers' TrainingArguments.
        train_pairs: tokenized pairs (`tokenize_pairs`).
        eval_pairs: tokenized pairs to evaluate on.
        processing_class: the tokenizer, saved with the model.
        objective: what is learned, by default the partial-sequence Bradley-Terry loss. An epoch is one pass over the
            data: with farma, odd passes compare whole answers and even passes train the constraint.
        token_budget: most tokens of a row.
        fork_layer: layers below it are frozen; with `trunk_cache` they run once over the data and are then detached.
        trunk_cache: folder for the activations below the fork; None runs these layers in every step.
        head_learning_rate: learning rate of the trained head; None for that of the other parameters.
        targets: rewards of the chosen and the rejected answer, by a pair's index (cd_fudge, rad); None for 1 and 0.
        eval_targets: the same for the evaluation pairs.
        metrics: computes further metrics from the evaluation pairs' rewards (see `TokenizedPair.read_whole`).
        pad_id: id of the tokens after a row's last pair.
        progress: receives a line every few seconds while the activations are computed.

    Raises:
        RGTGError: no pairs, a pair over the budget, a fork layer that the model does not have or that is above
            trained layers.
    """

    # The loss is divided by the whole accumulated batch's terms.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_pairs: Sequence[TokenizedPair],
        eval_pairs: Sequence[TokenizedPair] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        objective: Objective | None = None,
        token_budget: int = 2048,
        fork_layer: int = 0,
        trunk_cache: str | os.PathLike[str] | None = None,
        head_learning_rate: float | None = None,
        targets: Targets | None = None,
        eval_targets: Targets | None = None,
        metrics: Metrics | None = None,
        pad_id: int = 0,
        progress: Progress = no_progress,
        **kwargs: Any,
    ):
        if not train_pairs:
            raise RGTGError("there are no pairs to train on: pass at least one")
        objective = objective or Objective()
        for pairs in filter(None, (train_pairs, eval_pairs)):
            objective.check_ends(pairs)
        check_fork_layer(model, fork_layer)
        _check_frozen(model, fork_layer)
        self.objective, self.head_learning_rate = objective, head_learning_rate
        self.targets, self.eval_targets = targets, eval_targets
        self.train_pairs, self.eval_pairs = list(train_pairs), list(eval_pairs or [])
        self.pad_id, self.fork_layer, self._metrics = pad_id, fork_layer, metrics
        self.rows = pack(self.train_pairs, token_budget, objective.eos_padding)
        self.eval_rows = pack(self.eval_pairs, token_budget, objective.eos_padding)
        self._counts = torch.zeros(3)
        self._logged_at = 0.0
        use_packed_forward(model)
        if args.bf16:
            let_autocast_cast(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=Rows(self.rows),
            eval_dataset=Rows(self.eval_rows) if self.eval_rows else None,
            data_collator=self._collate,
            processing_class=processing_class,
            **kwargs,
        )
        # compute_loss already returns this part's share of the whole batch's mean.
        self.model_accepts_loss_kwargs = True
        self._trunks: dict[int, ActivationCache] = {}
        self.lower: LowerLayers | None = None
        if fork_layer > 0 and trunk_cache is not None:
            self._read_trunk_from(trunk_cache, model, token_budget, progress)

    def _read_trunk_from(
        self, folder: str | os.PathLike[str], model: nn.Module, budget: int, progress: Progress
    ) -> None:
        """Computes what the layers below the fork give, unless it is in the folder, and detaches these layers."""
        for pairs in filter(None, (self.train_pairs, self.eval_pairs)):
            cache = ActivationCache(
                folder,
                model,
                pairs,
                self.fork_layer,
                budget,
                self.objective.eos_padding,
                autocast=self.args.bf16 and pretrained(model).dtype == torch.float32,
            )
            with self.args.main_process_first(desc="the trunk's activations"):
                cache.fill(model, progress)
            self._trunks[id(pairs)] = cache
        self.lower = LowerLayers(model, self.fork_layer)
        self.lower.detach()

    @property
    def packing_efficiency(self) -> float:
        """Share of the rows' tokens that are not padding, all rows as long as the longest."""
        longest = max(
            sum(cost(self.train_pairs[i], self.objective.eos_padding) for i in r) for r in self.rows
        )
        total = sum(cost(pair, self.objective.eos_padding) for pair in self.train_pairs)
        return total / (longest * len(self.rows))

    # ---- Batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of rows; the order depends on the seed and the epoch alone."""
        return DataLoader(
            Rows(self.rows),
            batch_sampler=self._batches(),
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def _batches(self) -> RowBatches:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RowBatches(
            len(self.rows),
            self._train_batch_size,
            seed,
            self._pass,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def _pass(self, steps: int | None = None) -> int:
        """The pass over the data, from 0, that the next optimizer step belongs to.

        It follows from the number of steps, since a resumed run starts in the middle of a pass.

        Args:
            steps: optimizer steps taken so far; None for the current number.
        """
        batches = math.ceil(len(self.rows) / (self._train_batch_size * self.accelerator.num_processes))
        taken = self.state.global_step if steps is None else steps
        return taken // math.ceil(batches / self.args.gradient_accumulation_steps)

    def _constrains(self) -> bool:
        """Whether the next optimizer step trains farma's constraint."""
        return self._pass() % self.objective.passes == 1

    def _collate(self, items: Sequence[tuple[list[int], bool]]) -> dict[str, Any]:
        return self._batch(self.train_pairs, items)

    def _batch(self, pairs: list[TokenizedPair], items: Sequence[tuple[list[int], bool]]) -> dict[str, Any]:
        rows = [row for row, counts in items if counts]
        batch = collate(pairs, rows or [items[0][0]], self.pad_id, eos_padding=self.objective.eos_padding)
        trunk = self._trunks.get(id(pairs))
        return {
            "input_ids": batch.input_ids,
            "batch": batch,
            "states": None if trunk is None else trunk.states(batch),
            "counts": bool(rows),
        }

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The batches of one optimizer step on this process, and the number of terms of the step on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        totals, constraint = torch.zeros(3), self._constrains()
        for inputs in batches:
            if inputs["counts"]:
                offsets = answer_positions(inputs["batch"])[2]
                totals += torch.tensor(
                    [
                        self.objective.terms(offsets, constraint),
                        len(inputs["batch"].pairs),
                        float(offsets[-1]),
                    ]
                )
        totals = self.accelerator.reduce(totals.to(device), "sum")
        assert isinstance(totals, torch.Tensor)
        self._counts += torch.tensor([1.0, *totals[1:].tolist()])
        return batches, totals[0]

    # ---- Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's loss of a batch, divided by the number of terms of the whole optimizer step.

        Raises:
            RGTGError: the loss is not finite; the message names the batch's pairs.
        """
        constraint = self._constrains()
        outputs = self._forward(model, inputs, token_scores_and_best if constraint else None)
        rewards, best = outputs.logits if constraint else (outputs.logits, None)
        batch = inputs["batch"]
        offsets = answer_positions(batch)[2].to(outputs.logits.device)
        normalizer = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        targets = _targets(self.targets, [self.train_pairs[i] for i in batch.pairs], offsets.device)
        loss = self.objective.loss(rewards, offsets, normalizer, targets, best)
        self.batch_rows = [self.train_pairs[i].index for i in batch.pairs]
        if not torch.isfinite(loss):
            raise self.not_finite("the loss", loss.item())
        # Gradients are averaged over processes, and this loss is a part of their sum.
        loss = loss * (self.accelerator.num_processes if inputs["counts"] else 0)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any], read: Reader | None = None) -> Any:
        device, states = self.args.device, inputs["states"]
        return model(
            batch=inputs["batch"].to(device),
            trunk_states=None if states is None else states.to(device),
            read=read or _READERS.get(self.objective.name, read_scores),
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimated operations of forward and backward over a batch: 6 for each parameter and token."""
        return 6 * inputs["input_ids"].numel() * self._parameters()

    def _parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) if self.model is not None else 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer, in which the trained head may have a learning rate of its own."""
        if self.optimizer is not None or self.head_learning_rate is None:
            return super().create_optimizer(*args, **kwargs)
        model: Any = next(iter(args), kwargs.get("model")) or self.model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in trained_parameters(model):
            groups.setdefault((_in_head(name), name in decayed), []).append(parameter)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                    "lr": self.head_learning_rate if head else self.args.learning_rate,
                }
                for (head, decay), parameters in groups.items()
            ],
            **settings,
        )
        assert self.optimizer is not None
        return self.optimizer

    # ---- Logs and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with pairs and prefixes per second since the last time."""
        steps, pairs, prefixes = self._counts.tolist()
        now = time.monotonic()
        if "loss" in logs and steps and self._logged_at:
            seconds = now - self._logged_at
            logs["pairs_per_second"] = round(pairs / seconds, 3)
            logs["prefixes_per_second"] = round(prefixes / seconds, 1)
            if self.objective.passes > 1:
                logs["pass"] = self._pass(self.state.global_step - 1) + 1
        if "loss" in logs or not self._logged_at:
            self._counts.zero_()
            self._logged_at = now
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; see transformers' Trainer."""
        self._logged_at = time.monotonic()
        self._counts.zero_()
        return super().train(*args, **kwargs)

    def fit_head(self, strength: float) -> None:
        """Fits the head to the objective on the model as it is, before training (see `head_fit`).

        With a vocabulary head, it fits the row of the end-of-sequence token, by which farma compares whole answers.

        Args:
            strength: weight of the penalty on the standardized weights.

        Raises:
            RGTGError: a strength that is not above 0, or an objective that is not a Bradley-Terry loss.
        """
        self.objective.check_head_fit(strength)
        self.objective.check_ends(self.train_pairs, head_fit=True)
        model = self.model
        assert model is not None
        model.to(self.args.device)  # pyright: ignore[reportArgumentType]
        read = states_before if self.objective.by_token else read_states
        generator = torch.Generator().manual_seed(self.args.seed)
        found, weights, count = [], [], 0
        training = model.training
        model.eval()
        # The Trainer switches a model to half precision only when training starts, which is later.
        half = torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        # Every process fits the same head on the same rows, so nothing has to be communicated.
        with torch.no_grad(), half:
            for number in torch.randperm(len(self.rows), generator=generator).tolist():
                if count >= PAIRS:
                    break
                inputs = self._batch(self.train_pairs, [(self.rows[number], True)])
                states = self._forward(model, inputs, read).logits.to("cpu", torch.float32)
                offsets = answer_positions(inputs["batch"])[2]
                features, shares = differences(states, offsets, self.objective)
                found.append(features)
                weights.append(shares)
                count += len(self.rows[number])
        model.train(training)
        weight = fit(torch.cat(found), torch.cat(weights), strength)
        end = self.train_pairs[0].chosen_ids[-1] if self.objective.by_token else 0
        for name, parameter in trained_parameters(model):
            if _in_head(name) and parameter.ndim == 2:
                parameter.data[end] = weight.to(parameter)

    def score(self, pairs: Sequence[TokenizedPair] | None = None) -> PrefixRewards:
        """Rewards of every prefix of both answers of each pair; the processes share the work.

        Args:
            pairs: `train_pairs` or `eval_pairs` of this trainer, by default the latter.
        """
        chosen = self.eval_pairs if pairs is None or pairs is self.eval_pairs else self.train_pairs
        rows = self.eval_rows if chosen is self.eval_pairs else self.rows
        share = RowBatches(
            len(rows), 1, 0, lambda: 0, self.accelerator.process_index, self.accelerator.num_processes
        )
        model = self.model_wrapped if self.is_in_train else self.model
        assert model is not None
        training = model.training
        model.eval()
        scores: dict[int, tuple[list[float], list[float]]] = {}
        with torch.no_grad(), self.compute_loss_context_manager():
            for keys in share:
                inputs = self._batch(chosen, [(rows[row], counts) for row, counts in keys])
                batch = inputs["batch"]
                rewards = self._forward(model, inputs).logits.float().tolist()
                ends = answer_positions(batch)[2].tolist()
                if self.objective.additive:
                    rewards = [
                        total
                        for first, end in itertools.pairwise(ends)
                        for total in itertools.accumulate(rewards[first:end])
                    ]
                for n, i in enumerate(batch.pairs):
                    first, second = ends[2 * n], ends[2 * n + 1]
                    scores[i] = (
                        rewards[first : first + len(chosen[i].chosen_ids)],
                        rewards[second : second + len(chosen[i].rejected_ids)],
                    )
        model.train(training)
        if self.accelerator.num_processes > 1:
            parts: list[dict[int, Any]] = [{} for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather_object(parts, scores)
            for part in parts:
                scores |= part
        return [scores[i] for i in range(len(chosen))]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and whole-answer accuracy on the evaluation pairs, and the further `metrics`."""
        if not self.eval_pairs:
            raise RGTGError("there are no pairs to evaluate on: pass eval_pairs")
        began = time.monotonic()
        scores = self.score()
        flat = torch.tensor([r for pair in scores for answer in pair for r in answer])
        lengths = torch.tensor([len(answer) for pair in scores for answer in pair])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        # The scores do not include the rewards of padding, which is what `eos` would compare.
        repeat = self.objective.eos_padding
        objective = replace(self.objective, mode="repeat_last") if repeat else self.objective
        if objective.additive:
            # The scores are sums over the tokens already.
            objective, flat = Objective("full_bt"), objective.beta_r * flat
        targets = _targets(self.eval_targets, self.eval_pairs, offsets.device)
        right = sum((w[-1] > l[-1]) + 0.5 * (w[-1] == l[-1]) for w, l in scores)  # noqa: E741
        result: dict[str, Any] = {
            "loss": objective.loss(flat, offsets, targets=targets).item(),
            "accuracy": right / len(scores),
        }
        if self._metrics is not None:
            whole = [pair.read_whole(*both) for pair, both in zip(self.eval_pairs, scores, strict=True)]
            result |= self._metrics(whole)
        result["runtime"] = round(time.monotonic() - began, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # Evaluation does not count as training time.
        self._logged_at += time.monotonic() - began
        return metrics

    # ---- Saving

    def write_model(self, folder: Path) -> None:
        """Writes the whole model, the layers below the fork included, and the tokenizer."""
        with nullcontext() if self.lower is None else self.lower.whole():
            super().write_model(folder)
        assert self.model is not None
        if self.args.should_save and self.fork_layer == len(decoder_layers(self.model)[1]):
            drop_zero_adapters(folder)


def _in_head(name: str) -> bool:
    """Whether a parameter belongs to the trained head."""
    return not {HEAD, VOCABULARY_HEAD}.isdisjoint(name.split("."))


def _targets(
    targets: Targets | None, pairs: Sequence[TokenizedPair], device: torch.device
) -> torch.Tensor | None:
    if targets is None:
        return None
    return torch.tensor([targets[pair.index] for pair in pairs], device=device).flatten()


def _check_frozen(model: nn.Module, fork_layer: int) -> None:
    if fork_layer == 0:
        return
    for number, layer in enumerate(decoder_layers(model)[1][:fork_layer]):
        trained = next((name for name, p in layer.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise RGTGError(
                f"fork_layer={fork_layer} freezes layer {number} and its {trained} is to be trained: freeze it, or "
                f"use fork_layer={number}"
            )
