"""Rewards of answers as training targets: from columns of the data or by a reward model, which TRL can call too."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.bundled import resolve
from rgtg_fast.errors import RGTGError
from rgtg_fast.files import reason, write_text
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.loading import (
    adapter_model,
    adapter_tokenizer,
    context_length,
    load_sequence_classifier,
)
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.training.data import PreferencePair, Row, TokenizedPair, load_pairs, tokenize_pairs
from rgtg_fast.training.folder import Progress, no_progress
from rgtg_fast.training.packing import collate, cost, pack, packed_rewards, use_packed_attention

# By a pair's index, the rewards of its chosen and its rejected answer.
Targets = dict[int, tuple[float, float]]
# What TRL's RLOOTrainer takes, called with keyword arguments.
RewardFunction: TypeAlias = "Callable[..., list[float | None]]"

LABELS_FILE = "judge_rewards.jsonl"
# Columns of the data with the answers' rewards.
REWARD_COLUMNS = ("chosen_reward", "rejected_reward")


def targets_in(rows: Sequence[Any], pairs: Sequence[PreferencePair]) -> Targets | None:
    """The rewards that the data give the answers; None where the data have no `REWARD_COLUMNS`.

    Args:
        rows: rows of the data.
        pairs: preference pairs made from these rows.

    Raises:
        RGTGError: a row whose rewards are not two finite numbers.
    """
    if set(REWARD_COLUMNS).isdisjoint(Row(rows[pairs[0].index]).names):
        return None
    targets: Targets = {}
    for pair in pairs:
        values = [Row(rows[pair.index])[name] for name in REWARD_COLUMNS]
        try:
            chosen, rejected = map(float, values)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            chosen = rejected = math.nan
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            raise RGTGError(
                f"row {pair.index} of the data has the rewards {values}: give every row a number in "
                f"{' and '.join(REWARD_COLUMNS)}, or none of them"
            )
        targets[pair.index] = (chosen, rejected)
    return targets


def load_reward_model(source: str, base: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> tuple[Any, Any]:
    """A reward model with one label and its tokenizer.

    Args:
        source: folder or hub id of a classifier with one label, folder of a LoRA adapter with its score head, or
            `bundled:NAME`.
        base: the model that is trained, before it has adapters, and its tokenizer: an adapter of it takes its weights.

    Raises:
        RGTGError: no such reward model.
    """
    folder = resolve(source)
    if not is_adapter(folder):
        return load_sequence_classifier(folder, base[0], None)
    adapter = Adapter.load(folder)
    adapter.reward_head()
    model, tokenizer = adapter_model(adapter, base, None)
    return model, adapter_tokenizer(folder) or tokenizer


class LabelJudge:
    """A causal reward model that rates the answers of pairs, in its own prompt format.

    Args:
        source, base: as in `load_reward_model`.
        device: where the judge runs.

    Raises:
        RGTGError: no such reward model.
    """

    def __init__(
        self,
        source: str,
        base: tuple[PreTrainedModel, PreTrainedTokenizerBase],
        device: torch.device | str = "cpu",
    ):
        self.source = source
        model, tokenizer = load_reward_model(source, base)
        if tokenizer is None or "score" not in dict(model.named_children()):
            raise RGTGError(
                f"{source} ({type(model).__name__}) has no `score` head over a causal trunk: name a causal reward "
                "model as the judge"
            )
        self.model, self.tokenizer = model.to(device), tokenizer
        use_packed_attention(model)

    def label(
        self,
        rows: Sequence[Any],
        wanted: set[int],
        file: Path,
        budget: int,
        progress: Progress = no_progress,
        answers_ended: str = "auto",
    ) -> Targets:
        """The rewards of whole answers, read at an answer's EOS, or at its last token where it was cut.

        Args:
            rows: preference data as `load_pairs` takes them.
            wanted: indices of the rows to label.
            file: the file to which every packed row's rewards are appended; those in it are not computed again.
            budget: most tokens of a packed row (more where a pair is longer).
            answers_ended: as in `load_pairs`.
            progress: receives a line after every packed row.

        Raises:
            RGTGError: a pair over the judge's context, or a reward that is not finite.
        """
        known = _read(file)
        chat = self.tokenizer.chat_template is not None
        if not wanted <= set(known):
            pairs = load_pairs(rows, chat=chat, answers_ended=answers_ended)[0]
            pairs = [pair for pair in pairs if pair.index in wanted]
            limit = context_length(self.model)
            tokenized, _ = tokenize_pairs(pairs, self.tokenizer, limit, truncate_prompt=True, chat=chat)
            missing, done = sum(pair.index not in known for pair in tokenized), 0
            for labels in self._rewards(tokenized, known, budget):
                _append(file, labels)
                known |= labels
                done += len(labels)
                progress(f"{self.source} has rated the answers of {done} of {missing} pairs")
        unread = sorted(wanted - set(known))
        if unread:
            raise RGTGError(
                f"{self.source} cannot read the answers of row {unread[0]} (context {context_length(self.model)}): "
                "use a smaller max_length, or another judge"
            )
        return {index: known[index] for index in wanted}

    @torch.no_grad()
    def _rewards(self, pairs: Sequence[TokenizedPair], known: Targets, budget: int) -> Iterator[Targets]:
        """Yields, for each packed row, the rewards of its pairs that are not known.

        The rows are packed as if no reward were known: a reward's last digits depend on the other pairs of its row.
        """
        self.model.eval()
        for row in pack(pairs, max([budget, *map(cost, pairs)])):
            if all(pairs[i].index in known for i in row):
                continue
            batch = collate(pairs, [row], 0).to(self.model.device)
            rewards, offsets = packed_rewards(self.model, batch)
            last = rewards[offsets[1:] - 1].tolist()
            labels = {pairs[i].index: (last[2 * n], last[2 * n + 1]) for n, i in enumerate(batch.pairs)}
            bad = next((i for i, values in labels.items() if not all(map(math.isfinite, values))), None)
            if bad is not None:
                raise RGTGError(
                    f"{self.source} gives an answer of row {bad} a reward that is not finite: check the judge"
                )
            yield {index: values for index, values in labels.items() if index not in known}


def _append(file: Path, labels: Targets) -> None:
    rows = [
        {"index": index, "chosen": chosen, "rejected": rejected}
        for index, (chosen, rejected) in labels.items()
    ]
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise RGTGError(
            f"cannot write {file} ({reason(error)}): free some space and continue with --resume, the rows "
            "in it are safe"
        ) from error


def _read(file: Path) -> Targets:
    """The rewards in a file; an incomplete last line, from a killed run or a full disk, is removed."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(file, whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["index"]: (row["chosen"], row["rejected"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"{file} contains no rewards of a judge ({reason(error)}): remove it") from error


def spread(targets: Targets) -> tuple[float, float]:
    """Mean and standard deviation of the rewards."""
    values = [value for pair in targets.values() for value in pair]
    return statistics.fmean(values), statistics.pstdev(values)


def as_probabilities(targets: Targets, mean: float) -> Targets:
    """σ(r − mean): the Bradley-Terry probability that an answer is better than one with the mean reward."""

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, value - mean))))

    return {index: (sigmoid(chosen), sigmoid(rejected)) for index, (chosen, rejected) in targets.items()}


def reward_function(
    source: str | os.PathLike[str],
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int = 8,
) -> RewardFunction:
    """r(x, y) of sampled answers under a reward model, as TRL's trainers call it.

    Args:
        source: as in `load_reward_model`.
        network, tokenizer: of the policy; the reward model must have the same vocabulary.
        batch: answers of a forward.

    Raises:
        RGTGError: no such reward model, or one with another vocabulary.
    """
    model, own = load_reward_model(str(source), (network, tokenizer))
    own = own or tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise RGTGError(
            f"{source} has another vocabulary than the policy: use a reward model over the same tokenizer"
        )
    head: Any = dict(model.named_children()).get("score")
    if head is None:
        raise RGTGError(f"{source} has no `score` head over a causal trunk: use a causal reward model")
    template = own if own.chat_template is not None else tokenizer

    @torch.no_grad()
    def reward(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        texts = [[*Prompt(p).ids(template), *ids] for p, ids in zip(prompts, completion_ids, strict=True)]
        model.to(network.device)
        rewards: list[float | None] = []
        for start in range(0, len(texts), batch):
            part = [torch.tensor(ids) for ids in texts[start : start + batch]]
            padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(network.device)
            lengths = torch.tensor([len(ids) for ids in part], device=network.device)
            # A causal model does not attend to the padding after an answer.
            mask = torch.arange(padded.shape[1], device=network.device) < lengths[:, None]
            hidden = model.base_model(padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(part)), lengths - 1]
            rewards += head(last.to(next(head.parameters()).dtype))[:, 0].float().tolist()
        return rewards

    return reward
