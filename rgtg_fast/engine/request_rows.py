"""Rows of requests that come and go, in the slots of a reward's caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg_fast.models.context_rows import ContextRows
from rgtg_fast.models.device import to_device
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.rewards.base import Prefix, Reward, as_score


@dataclass(eq=False)
class Request:
    """A request that is present.

    Attributes:
        prefix: its prompt and the answer decided so far.
        encoded: the prompt's ids in the reward's contexts.
        slot: where the models hold its prefix, None where they do not yet.
        longest: tokens of the prompt in the context where it has most.
    """

    prefix: Prefix
    encoded: list[list[int]]
    slot: int | None = None
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        self.longest = max(map(len, [self.prefix.prompt_ids, *self.encoded]))

    @property
    def key(self) -> tuple[Any, ...]:
        """What two requests have in common whose prefixes may be exchanged."""
        return self.prefix.prompt_ids, self.encoded, self.prefix.weights


@dataclass(eq=False)
class _Row:
    """What the models hold in a slot.

    Attributes:
        request: the prompt's; of the request that has the slot, or had it last.
        owner: the request that has the slot, None where it is free.
        held: answer tokens in the prefix.
        freed: number of the request's end that freed the slot: the oldest content is replaced first.
    """

    request: Request
    owner: Request | None
    held: list[int] = field(default_factory=list)
    freed: int = 0

    def is_prefix(self, answer: list[int]) -> bool:
        """Whether an answer begins with the tokens held."""
        return answer[: len(self.held)] == self.held

    @property
    def next_token(self) -> int | None:
        """The token that follows those held, where the answer of the slot's request continues them."""
        if self.owner is None or len(self.owner.prefix.answer) <= len(self.held):
            return None
        answer = self.owner.prefix.answer
        return answer[len(self.held)] if self.is_prefix(answer) else None


@dataclass
class _Step:
    """The last step, whose decisions are not known yet.

    Attributes:
        slots: slots of its rows.
        candidates: for each row the tokens that were scored; None: all of the vocabulary were.
    """

    slots: list[int]
    candidates: list[list[int]] | None


class RequestRows:
    """The rows of a reward's own models, and of the base model in the reward's contexts.

    A step brings the rows of its requests to their answers first: candidates of the last step that were chosen are
    committed, other tokens run once more. It changes nothing else until the answers have grown.

    Args:
        lm: the base model.
        reward: bound to it.
        slots: requests whose prefixes are held.
        length: tokens of a prompt and its answer.
    """

    def __init__(self, lm: LanguageModel, reward: Reward, slots: int, length: int):
        self._lm, self._reward, self._slots, self._length = lm, reward, slots, length
        self._contexts = ContextRows(lm, reward.prompt_contexts) if reward.prompt_contexts else None
        self._rows: list[_Row | None] = [None] * slots
        self._step: _Step | None = None
        self._ended = 0

    def models(self) -> list[ModelRunner]:
        """The models that run steps."""
        return [*self._reward.models(), *([] if self._contexts is None else [self._lm.runner])]

    def row_bytes(self) -> int:
        """Bytes of a row in all caches."""
        contexts = 0 if self._contexts is None else self._lm.runner.cache.row_bytes(self._length)
        return self._reward.prompt_contexts * contexts + self._reward.row_bytes(self._length)

    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return self._reward.cache_bytes() + (0 if self._contexts is None else self._lm.runner.cache.nbytes())

    # ---- steps ------------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request], candidates: torch.Tensor) -> torch.Tensor:
        """Rewards [B, K] of candidates [B, K] of B different requests, from one forward."""
        with self._forgetting():
            slots = self._follow(requests)
            self._begin_step(slots)
            rewards = as_score(self._reward.score(candidates), self._reward)
        self._step = _Step(slots, candidates.tolist())
        return rewards

    def guidance(self, requests: Sequence[Request]) -> torch.Tensor:
        """Rewards [B, V] of the whole vocabulary."""
        with self._forgetting():
            slots = self._follow(requests)
            self._begin_step(slots)
            rewards = as_score(self._reward.guidance(), self._reward)
        self._step = _Step(slots, None)
        return rewards

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Where the models' forward fails, what they hold is not known: prompts are prefilled again."""
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Empties the caches, which are allocated at the first call."""
        self._reward.reserve(self._slots, self._length)
        if self._contexts is not None:
            self._contexts.reserve(self._slots, self._length)
        for row in self._rows:
            if row is not None and row.owner is not None:
                row.owner.slot = None
        self._rows, self._step = [None] * self._slots, None

    def _begin_step(self, slots: list[int]) -> None:
        device = self._lm.runner.device
        placed = Slots.of(slots, device)
        if self._contexts is None:
            logits = torch.empty(len(slots), 0, self._lm.vocabulary, device=device)
        else:
            logits = self._contexts.logits(placed)
        self._reward.use_slots(placed)
        self._reward.begin_step(logits)

    def _follow(self, requests: Sequence[Request]) -> list[int]:
        """Brings the models to the answers of these requests; returns their slots."""
        self._settle()
        self._place(requests)
        slots = [request.slot for request in requests if request.slot is not None]
        while behind := [slot for slot in slots if self._row(slot).next_token is not None]:
            self._begin_step(behind)
            self._accept([self._row(slot).next_token for slot in behind], behind)
        return slots

    def _accept(self, tokens: Sequence[Any], slots: list[int]) -> None:
        """Appends tokens that the reward has not scored to the prefixes of the step that has begun."""
        decided = to_device(list(tokens), torch.int64, self._lm.runner.device)
        self._reward.follow(decided)
        if self._contexts is not None:
            self._contexts.accept(decided)
        for slot, token in zip(slots, tokens, strict=True):
            self._row(slot).held.append(token)

    def _settle(self) -> None:
        """Commits the candidates of the last step that have become answer tokens."""
        step, self._step = self._step, None
        if step is None:
            return
        choice, tokens = [], []
        for index, slot in enumerate(step.slots):
            row = self._row(slot)
            token = row.next_token
            candidates = None if step.candidates is None else step.candidates[index]
            if token is None or (candidates is not None and token not in candidates):
                token = -1
            tokens.append(token)
            choice.append(token if token < 0 or candidates is None else candidates.index(token))
            if token >= 0:
                row.held.append(token)
        if all(token < 0 for token in tokens):
            return
        device = self._lm.runner.device
        self._reward.commit(to_device(choice, torch.int64, device))
        if self._contexts is not None:
            self._contexts.accept(to_device(tokens, torch.int64, device))

    # ---- slots ------------------------------------------------------------------------------------------------------

    def end(self, request: Request) -> None:
        """A request has ended. Its slot keeps its prefix until the slot is needed."""
        self._ended += 1
        row = None if request.slot is None else self._rows[request.slot]
        if row is not None:
            row.owner, row.freed = None, self._ended

    def _row(self, slot: int) -> _Row:
        row = self._rows[slot]
        assert row is not None
        return row

    def _place(self, requests: Sequence[Request]) -> None:
        """Gives each request a slot that holds its prompt and the beginning of its answer."""
        lost = []
        for request in requests:
            row = None if request.slot is None else self._rows[request.slot]
            if row is None or not row.is_prefix(request.prefix.answer):
                lost.append(request)
                request.slot = None
                if row is not None:
                    row.owner = None
        copies, new = [], []
        for request in lost:
            source = self._longest(request)
            if source is not None and self._row(source).owner is None:
                self._take(source, request)
            elif source is not None and self._row(source).held:
                copies.append((source, request))
            else:
                new.append(request)
        # A source has an owner by now: nothing that is still to be copied is overwritten.
        for source, request in copies:
            self._copy(source, request)
        for request in new:
            self._admit(request)

    def _longest(self, request: Request) -> int | None:
        """The slot that holds most of a request's answer, a free one where there is a choice."""
        found = [
            (len(row.held), row.owner is None, slot)
            for slot, row in enumerate(self._rows)
            if row is not None and row.request.key == request.key and row.is_prefix(request.prefix.answer)
        ]
        return max(found)[2] if found else None

    def _free(self) -> int:
        """A free slot, whose content is the oldest."""
        free = [
            (-1 if row is None else row.freed, slot)
            for slot, row in enumerate(self._rows)
            if row is None or row.owner is None
        ]
        return min(free)[1]

    def _take(self, slot: int, request: Request) -> None:
        self._row(slot).owner, request.slot = request, slot
        self._reward.set_prefix(slot, request.prefix)

    def _copy(self, source: int, request: Request) -> None:
        slot, held = self._free(), list(self._row(source).held)
        self._reward.move(source, slot)
        if self._contexts is not None:
            self._contexts.move(source, slot)
        self._rows[slot] = _Row(request, request, held)
        self._take(slot, request)

    def _admit(self, request: Request) -> None:
        slot = self._free()
        if self._contexts is not None:
            self._contexts.admit(slot, request.encoded[: self._reward.prompt_contexts])
        self._reward.admit(slot, request.prefix, request.encoded)
        self._rows[slot] = _Row(request, request)
        request.slot = slot
