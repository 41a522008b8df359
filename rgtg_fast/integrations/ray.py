"""Answers to the prompts of a Ray data set: `ds.map_batches(RewardGuidedPredictor, fn_constructor_kwargs={...})`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rgtg_fast.config import Guidance
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.engine.outputs import GeneratedRow
from rgtg_fast.errors import RewardNaNError, RGTGError, one_line, shown

# What is added to a batch.
COLUMNS = ("answer", "tokens", "reward", "finish_reason", "error")


class RewardGuidedPredictor:
    """A decoder in an actor of `map_batches`, for batches as dictionaries of columns (`batch_format="numpy"`).

    It adds the columns `answer` (text), `tokens` (ids), `reward` (NaN where there is none), `finish_reason` and
    `error`. A row that cannot be answered has the reason in `error`, no answer and no tokens; where there is no error,
    `error` is an empty string. An answer depends on its own row alone, not on batches, blocks or the number of actors.

    Args:
        lm: as in `RewardGuidedDecoder.from_pretrained`; each actor loads it.
        reward: likewise.
        prompt: name of the column of prompts: texts, chats or token ids.
        guidance: of every row.
        max_new_tokens: tokens of an answer, end-of-sequence included.
        stop: strings that end an answer.
        seed: of every row; equal prompts then get equal answers.
        seed_column: name of a column of seeds, in place of `seed`.
        loading: further arguments of `from_pretrained`, such as `dtype`, `max_batch` and `max_length`.

    Raises:
        RGTGError: an argument or model that cannot work.
    """

    def __init__(
        self,
        lm: Any,
        reward: Any = None,
        *,
        prompt: str = "prompt",
        guidance: Guidance = Guidance(),
        max_new_tokens: int = 128,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        seed_column: str | None = None,
        **loading: Any,
    ):
        self.decoder = RewardGuidedDecoder.from_pretrained(lm, reward=reward, **loading)
        self.prompt, self.seed, self.seed_column = prompt, seed, seed_column
        self._settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "guidance": guidance,
            "stop": stop,
        }
        # Settings that no row could be answered with are refused here, not once for every row.
        self._begin([[0]], [seed])

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the columns of answers.

        Raises:
            RGTGError: the batch is no mapping, lacks a column that was named, or has one that would be added.
        """
        self._check(batch)
        prompts = [_plain(prompt) for prompt in batch[self.prompt]]
        seeds = [self.seed] * len(prompts) if self.seed_column is None else list(batch[self.seed_column])
        errors = [self._why_not(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        rows = self._answer(prompts, seeds, errors)
        tokens = np.empty(len(rows), dtype=object)
        for index, row in enumerate(rows):
            tokens[index] = np.array([] if row is None else row.tokens, dtype=np.int64)
        added = {
            "answer": np.array([None if row is None else row.text for row in rows], dtype=object),
            "tokens": tokens,
            "reward": np.array(
                [np.nan if row is None or row.reward is None else row.reward for row in rows],
                dtype=np.float64,
            ),
            "finish_reason": np.array(
                [None if row is None else row.finish_reason for row in rows], dtype=object
            ),
            "error": np.array(errors, dtype=object),
        }
        return {**batch, **added}

    def _check(self, batch: Mapping[str, Any]) -> None:
        if not isinstance(batch, Mapping):
            raise RGTGError(f"a batch is {shown(batch)}: leave batch_format at 'numpy', a mapping of columns")
        for name in filter(None, (self.prompt, self.seed_column)):
            if name not in batch:
                raise RGTGError(f"there is no column {name!r} (columns: {', '.join(batch)}): name another")
        for name in COLUMNS:
            if name in batch:
                raise RGTGError(f"the data has a column {name!r} and answers add one: rename or drop it")

    def _begin(self, prompts: list[Any], seeds: list[Any]) -> Any:
        return self.decoder.iterate(prompts, seed=seeds, **self._settings)

    def _why_not(self, prompt: Any, seed: Any) -> str:
        """Why a row cannot be answered; empty where it can."""
        try:
            # A call checks its arguments at once and decodes only when its rows are asked for.
            self._begin([prompt], [seed])
        except RGTGError as error:
            return _of_row(error, 0)
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            # What a tokenizer or a template cannot handle must not cost the other rows.
            return f"the prompt cannot be used ({type(error).__name__}: {one_line(error)})"
        return ""

    def _answer(self, prompts: list[Any], seeds: list[Any], errors: list[str]) -> list[GeneratedRow | None]:
        """Answers the rows without an error; a row whose reward is NaN gets one, and the others go on."""
        rows: list[GeneratedRow | None] = [None] * len(prompts)
        while waiting := [at for at, row in enumerate(rows) if row is None and not errors[at]]:
            try:
                for index, row in self._begin([prompts[at] for at in waiting], [seeds[at] for at in waiting]):
                    rows[waiting[index]] = row
            except RewardNaNError as error:
                errors[waiting[error.row]] = _of_row(error, error.row)
        return rows


def _of_row(error: RGTGError, index: int) -> str:
    return (
        str(error).replace(f"prompt {index} ", "the prompt ", 1).replace(f"prompt {index},", "the prompt,", 1)
    )


def _plain(prompt: Any) -> Any:
    """A prompt as Python objects: Ray's are arrays, and its chat messages have every key that any message has."""
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(given, list) and given and all(isinstance(each, Mapping) for each in given):
        return [{name: value for name, value in each.items() if value is not None} for each in given]
    return given
