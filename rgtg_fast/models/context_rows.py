"""Rows of a base model in the contexts that a reward adds to each prompt, apart from the prompt's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel


class ContextRows:
    """The base model's rows in a reward's contexts, C of them for each slot."""

    def __init__(self, lm: LanguageModel, contexts: int):
        self._lm, self._runner, self._count = lm, lm.runner, contexts
        # [slots · C], each row's newest token, not yet in the cache.
        self._newest = torch.zeros(0, dtype=torch.int64, device=lm.runner.device)
        self._rows = Slots([], self._newest)

    def reserve(self, slots: int, length: int) -> None:
        """Empty slots for prompts and answers of `length` tokens."""
        self._runner.reserve(slots * self._count, length)
        self._newest = self._newest.new_zeros(slots * self._count)

    def admit(self, slot: int, contexts: Sequence[Sequence[int]]) -> None:
        """Prefills a prompt in each context; its last token is left to the next step."""
        for row, ids in enumerate(contexts, slot * self._count):
            self._runner.begin(row, ids[:-1])
            self._newest[row] = ids[-1]

    def move(self, source: int, target: int) -> None:
        """Copies the rows of one slot to another."""
        for context in range(self._count):
            self._runner.move(source * self._count + context, target * self._count + context)
            self._newest[target * self._count + context] = self._newest[source * self._count + context]

    def logits(self, slots: Slots) -> torch.Tensor:
        """Logits [B, C, V] for the next token in each context."""
        host = [slot * self._count + context for slot in slots.host for context in range(self._count)]
        self._rows = Slots.of(host, self._runner.device)
        newest = self._newest[self._rows.index]
        states = self._runner.step(newest.unsqueeze(-1), slots=self._rows).squeeze(1)
        return self._runner.logits(states)[:, : self._lm.vocabulary].unflatten(0, (-1, self._count))

    def accept(self, tokens: torch.Tensor) -> None:
        """Tokens [B] follow in the slots of the last step; -1: none does."""
        tokens = tokens.repeat_interleave(self._count)
        self._runner.commit(tokens.clamp_max(0))
        index = self._rows.index
        self._newest[index] = torch.where(tokens < 0, self._newest[index], tokens)
