"""Scores of every answer token of preference pairs, computed once by a language model and stored in a file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.models.loading import context_length
from rgtg_fast.training.data import TokenizedPair, hash_pairs
from rgtg_fast.training.folder import Progress, no_progress
from rgtg_fast.training.packing import answer_positions, collate, cost, pack, packed_hidden, pretrained
from rgtg_fast.training.vocabulary import token_logprobs, vocabulary_head

# Seconds between lines about the progress.
_PROGRESS_INTERVAL = 10.0
# Values of the head that identify it in a file's name.
_HEAD_VALUES = 64


def check_context(model: Any, items: Sequence[TokenizedPair]) -> None:
    """Checks that the prompt and the longer answer of every item fit the model's context.

    Raises:
        RGTGError: naming the first row that does not fit.
    """
    limit = context_length(pretrained(model))
    for item in items:
        length = len(item.prompt_ids) + max(len(item.chosen_ids), len(item.rejected_ids))
        if length > limit:
            raise RGTGError(
                f"row {item.index} takes {length} tokens in its contrastive template and the model holds {limit}: use "
                "a smaller max_length, or shorter templates"
            )


@torch.no_grad()
def answer_logprobs(
    model: Any,
    items: Sequence[TokenizedPair],
    budget: int = 2048,
    autocast: bool = False,
    rows: Sequence[Sequence[int]] | None = None,
) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """log π(y_t | x, y_<t) of every token of both answers, one packed row at a time.

    Args:
        model: a causal language model, prepared by `use_packed_attention`.
        items: pairs to score.
        budget: most tokens of a row (more where an item is longer).
        autocast: compute in bfloat16.
        rows: indices into `items`, one sequence per row; None packs them to the budget.

    Yields:
        For each item of a row, its index and the log-probabilities of the chosen and of the rejected answer, each [n]
        in at least float32 on the CPU.
    """
    inner = pretrained(model)
    training = inner.training
    inner.eval()
    for row in packed_rows(items, budget) if rows is None else rows:
        batch = collate(items, [row], pad_id=0).to(inner.device)
        with torch.autocast(inner.device.type, torch.bfloat16, enabled=autocast):
            logprobs = token_logprobs(inner, packed_hidden(inner, batch), batch)
        ends = answer_positions(batch)[2].diff().tolist()
        parts = logprobs.cpu().split(ends)
        yield [(i, parts[2 * n], parts[2 * n + 1]) for n, i in enumerate(batch.pairs)]
    inner.train(training)


def packed_rows(items: Sequence[TokenizedPair], budget: int) -> list[list[int]]:
    """The items packed to the budget, or to the longest item where that is longer."""
    return pack(items, max(budget, *(cost(item) for item in items)))


class AnswerFile:
    """One float32 score for every token of both answers of every pair, in a file; NaN where it is not computed yet.

    Answers are numbered chosen_0, rejected_0, chosen_1, … A row is written as soon as it is computed; an interrupted
    computation continues with what is missing.

    Args:
        path: path of the file.
        pairs: the pairs whose answers are scored.
    """

    def __init__(self, path: Path, pairs: Sequence[TokenizedPair]):
        self.path = path
        lengths = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        self._ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self._values: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike[str],
        kind: str,
        model: Any,
        pairs: Sequence[TokenizedPair],
        items: Sequence[TokenizedPair],
        autocast: bool,
    ) -> AnswerFile:
        """The file whose name is a hash of the scored tokens (`items`), the model with its head and the precision.

        Args:
            folder: folder of the file.
            kind: kind of the scores, the beginning of the name.
            model: the model that computes the scores.
            pairs: the pairs whose answers are scored.
            items: what runs through the model.
            autocast: compute in bfloat16.
        """
        inner = pretrained(model)
        head = vocabulary_head(inner)[1].weight
        some = head.detach()[:: max(1, len(head) // _HEAD_VALUES), 0].float().cpu().numpy()
        key = {
            "kind": kind,
            "items": hash_pairs(items),
            "model": fingerprint(inner),
            "head": hashlib.sha256(some.tobytes()).hexdigest(),
            "dtype": str(inner.dtype),
            "autocast": autocast,
        }
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return cls(Path(folder) / f"{kind}-{name}.f32", pairs)

    def tokens(self, answer: int) -> int:
        """Number of tokens of an answer."""
        return self._ends[answer + 1] - self._ends[answer]

    def __getitem__(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """The scores [n] of a pair's chosen and of its rejected answer."""
        return self._of(2 * pair), self._of(2 * pair + 1)

    def _of(self, answer: int) -> np.ndarray:
        assert self._values is not None
        return self._values[self._ends[answer] : self._ends[answer + 1]]

    def fill(
        self,
        model: Any,
        items: Sequence[TokenizedPair],
        values: Callable[[int, torch.Tensor, torch.Tensor], dict[int, torch.Tensor]],
        answers: Callable[[int], Sequence[int]],
        budget: int,
        autocast: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        """Computes what is missing.

        Args:
            model: a causal language model, prepared by `use_packed_attention`.
            items: what runs through the model.
            values: (an item's number, log-probabilities of its two sides) -> scores [n] by an answer's number.
            answers: the numbers of the answers that an item scores.
            budget: most tokens of a packed row.
            autocast: compute in bfloat16.
            progress: receives a line every 10 seconds.

        Raises:
            RGTGError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Only one run computes the scores; others that need them wait.
            with filelock.FileLock(self.path.with_suffix(".lock")):
                self._open()
                rows = [
                    row
                    for row in packed_rows(items, budget)
                    if any(np.isnan(self._of(answer)).any() for i in row for answer in answers(i))
                ]
                total, done = sum(cost(items[i]) for row in rows for i in row), 0
                began = reported = time.monotonic()
                for row in answer_logprobs(model, items, budget, autocast, rows):
                    for i, chosen, rejected in row:
                        for answer, numbers in values(i, chosen, rejected).items():
                            self._of(answer)[:] = numbers.numpy()
                    self._flush()
                    done += sum(cost(items[i]) for i, _, _ in row)
                    if time.monotonic() - reported > _PROGRESS_INTERVAL:
                        reported = time.monotonic()
                        progress(
                            f"{self.path.name.rpartition('-')[0]}: {done / total:.0%} of {total:,} tokens, "
                            f"{done / (reported - began):,.0f} tokens/s"
                        )
        except OSError as error:
            raise RGTGError(
                f"cannot keep numbers in {self.path.parent} ({error.strerror or error}): free "
                f"{4 * self._ends[-1] / 2**20:.0f} MiB there, or name another folder"
            ) from error

    def _open(self) -> None:
        size = self._ends[-1]
        if not self.path.exists():
            partial = self.path.with_suffix(".partial")
            np.full(size, np.nan, np.float32).tofile(partial)
            partial.replace(self.path)
        self._values = np.memmap(self.path, np.float32, "r+", shape=(size,))

    def _flush(self) -> None:
        if isinstance(self._values, np.memmap):
            self._values.flush()


def fill_reference(
    folder: str | os.PathLike[str],
    model: Any,
    pairs: Sequence[TokenizedPair],
    budget: int = 2048,
    autocast: bool = False,
    progress: Progress = no_progress,
) -> AnswerFile:
    """log π_ref(y_t | x, y_<t) of every answer token of preference pairs, computed once and stored in a file.

    Args:
        folder: folder of the file.
        model: the reference, a causal language model, prepared by `use_packed_attention`.
        pairs: the pairs whose answers are scored.
        budget: most tokens of a packed row.
        autocast: compute in bfloat16.
        progress: receives a line every 10 seconds.

    Raises:
        RGTGError: the folder cannot be written.
    """
    file = AnswerFile.of(folder, "reference", model, pairs, pairs, autocast)

    def values(number: int, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[int, torch.Tensor]:
        return {2 * number: chosen, 2 * number + 1: rejected}

    file.fill(model, pairs, values, lambda number: [2 * number, 2 * number + 1], budget, autocast, progress)
    return file
