"""Where a reward's model is executed: a model of its own with its own cache, or the base model's forward.

A reward scores candidates (`candidate_states`, `commit`) or every next token (`next_states`, `accept`), by the same
methods in both places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.heads import Head
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.layers import FinalNorm
from rgtg_fast.models.prompts import Prompt, check_known
from rgtg_fast.models.runner import Counter, ModelRunner
from rgtg_fast.models.templates import prompt_ending
from rgtg_fast.rewards.base import Prefix


class RewardRuntime(ABC):
    """Executes the model of a reward.

    Attributes:
        runner: the model that is executed.
        head: the reward's head on its states.
        tokenizer: the reward model's own, None where it came without one.
        name: the model's path or hub id, or the adapter's folder.
        trunk: in words: whose weights compute the states.
        counter: forwards and tokens of the current run.
        prompt_contexts: prefixes per prompt in a cache of its own.
        shared: whether the base model's forward executes it.
        final_norm: the norm that `candidate_states(normed=False)` leaves out, None where it cannot.
        slots: slots of the rows of a step; None: the first ones.
    """

    prompt_contexts: int
    shared: bool
    slots: Slots | None = None

    def __init__(
        self,
        runner: ModelRunner,
        head: Head,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        trunk: str,
    ):
        self.runner, self.tokenizer = runner, tokenizer
        self.head: Any = head
        self.name, self.trunk = name, trunk
        self.counter = Counter()

    @property
    @abstractmethod
    def final_norm(self) -> FinalNorm | None: ...

    @abstractmethod
    def models(self) -> list[ModelRunner]:
        """Models of its own."""

    @abstractmethod
    def encode(self, prompt: Prompt) -> list[list[int]]:
        """The prompt's token ids in each prefix of its own."""

    @abstractmethod
    def reserve(self, slots: int, length: int, counter: Counter, undo: int = 0) -> None:
        """Begins a run of `slots` rows of `length` tokens, which `counter` counts; `undo` as in `Reward.reserve`."""

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""

    @abstractmethod
    def states(self, prefix: Prefix, answer: Sequence[int]) -> tuple[torch.Tensor, int]:
        """States [T, E] of a prompt and its answer by an uncached forward, and the number of prompt tokens."""

    # ---- candidates: the state after each ---------------------------------------------------------------------------

    @abstractmethod
    def admit(self, slot: int, encoded: list[list[int]]) -> None:
        """A row enters a slot; all its prompt tokens are prefilled."""

    @abstractmethod
    def candidate_states(self, candidates: torch.Tensor, normed: bool = True) -> torch.Tensor:
        """States [B, K, E] after candidates [B, K] of slots 0..B-1.

        Args:
            candidates: int64 token ids.
            normed: whether the final norm is part of the forward.
        """

    @abstractmethod
    def commit(self, choice: torch.Tensor) -> None:
        """Candidate `choice[b]` [B] is row b's next token; -1: none is."""

    # ---- next tokens: the state after the newest --------------------------------------------------------------------

    @abstractmethod
    def admit_for_next(self, slot: int, encoded: list[list[int]]) -> None:
        """A row enters a slot; its last prompt token is left to the next step, which costs one token a row."""

    @abstractmethod
    def next_states(self, rows: int) -> torch.Tensor:
        """States [B, E] after the newest token of each of slots 0..rows-1."""

    @abstractmethod
    def count_candidates(self, candidates: torch.Tensor) -> None:
        """Candidates [B, K] were scored by states of `next_states`."""

    @abstractmethod
    def accept(self, tokens: torch.Tensor) -> None:
        """Tokens [B] have been decided; -1: the row has ended, or its token is not known yet."""

    @abstractmethod
    def step_state(self) -> list[torch.Tensor]:
        """Tensors that `next_states` and `accept` read and change."""


class OwnModel(RewardRuntime):
    """A model of its own, with a prefix cache and a prompt format of its own.

    Args:
        runner: the model.
        lm: the base model.
        tokenizer: the reward model's own, None where it came without one.
        chat_template: a Jinja chat template in place of the tokenizer's own.
        trunk: in words: whose weights compute the states.
        whole_chats: whether it was trained on whole chats of its template, so that its prompts end as those do.
    """

    prompt_contexts, shared = 1, False

    def __init__(
        self,
        runner: ModelRunner,
        lm: LanguageModel,
        tokenizer: PreTrainedTokenizerBase | None,
        chat_template: str | None,
        trunk: str,
        whole_chats: bool = False,
    ):
        super().__init__(runner, runner.head, tokenizer, runner.name, trunk)
        self._lm, self._chat_template = lm, chat_template
        self._ending = self._prompt_ending(whole_chats)
        # [slots], each row's newest token, not yet in the cache; -1 where there is no row.
        self._newest = torch.zeros(0, dtype=torch.int64, device=runner.device)

    @property
    def final_norm(self) -> FinalNorm | None:
        return self.runner.layers.final_norm

    def models(self) -> list[ModelRunner]:
        return [self.runner]

    def _prompt_ending(self, whole_chats: bool) -> str:
        """What follows a rendered prompt in whole chats, before the answer, as `prompt_ending`.

        With the base model's template nothing is changed: there the base model writes itself what precedes an answer.
        A template that the user wrote is used as it is.
        """
        tokenizer, base = self.tokenizer or self._lm.tokenizer, self._lm.tokenizer
        template = self._chat_template or (None if tokenizer is None else tokenizer.chat_template)
        if tokenizer is None or template is None or (base is not None and template == base.chat_template):
            return ""
        as_written = self._chat_template is not None
        return prompt_ending(tokenizer, self._chat_template, self.name, whole_chats and not as_written)

    def encode(self, prompt: Prompt) -> list[list[int]]:
        own, base = self.tokenizer, self._lm.tokenizer
        # A chat reads as it does under the base model where the reward model has no template.
        if prompt.messages is not None and (own is None or not (self._chat_template or own.chat_template)):
            own = base
        ids = prompt.ids(own or base, self._chat_template, self._ending)
        check_known(ids, self.runner.embeddings, f"prompt {prompt.index} for the reward model")
        return [ids]

    def reserve(self, slots: int, length: int, counter: Counter, undo: int = 0) -> None:
        self.counter, self.slots = counter, None
        self.runner.reserve(slots, length, counter=counter, undo=undo)
        if len(self._newest) < slots:
            self._newest = self._newest.new_zeros(slots)
        self._newest.fill_(-1)

    def move(self, source: int, target: int) -> None:
        self.runner.move(source, target)
        self._newest[target] = self._newest[source]

    def states(self, prefix: Prefix, answer: Sequence[int]) -> tuple[torch.Tensor, int]:
        (ids,) = self.encode(prefix.prompt)
        return self.runner.hidden_uncached([*ids, *answer]), len(ids)

    def admit(self, slot: int, encoded: list[list[int]]) -> None:
        self.runner.begin(slot, encoded[0])

    def candidate_states(self, candidates: torch.Tensor, normed: bool = True) -> torch.Tensor:
        return self.runner.step(candidates, normed, self.slots)

    def commit(self, choice: torch.Tensor) -> None:
        self.runner.commit(choice)

    def admit_for_next(self, slot: int, encoded: list[list[int]]) -> None:
        (ids,) = encoded
        self.runner.begin(slot, ids[:-1])
        self._newest[slot].fill_(ids[-1])

    def next_states(self, rows: int) -> torch.Tensor:
        newest = self._newest[:rows] if self.slots is None else self._newest[self.slots.index]
        return self.runner.step(newest.clamp_min(0).unsqueeze(-1), slots=self.slots).squeeze(1)

    def count_candidates(self, candidates: torch.Tensor) -> None:
        """They cost nothing: `next_states` has counted its forward."""

    def accept(self, tokens: torch.Tensor) -> None:
        # Where a token follows, the one that was stepped is part of the prefix: it was the only one of the step, 0.
        self.commit(tokens.clamp_max(0))
        if self.slots is None:
            self._newest[: len(tokens)] = tokens
        else:
            index = self.slots.index
            self._newest[index] = torch.where(tokens < 0, self._newest[index], tokens)

    def step_state(self) -> list[torch.Tensor]:
        return [self._newest]


class DistantModel(OwnModel):
    """A model of its own on another device than the base model's.

    A step sends candidates or newest tokens there, and the choices; rewards or scores come back.
    """

    @property
    def final_norm(self) -> FinalNorm | None:
        # The fused draw reads log-probabilities, which are on the base model's device.
        return None

    def candidate_states(self, candidates: torch.Tensor, normed: bool = True) -> torch.Tensor:
        return super().candidate_states(candidates.to(self.runner.device), normed)

    def commit(self, choice: torch.Tensor) -> None:
        super().commit(choice.to(self.runner.device))


def own_model(runner: ModelRunner, lm: LanguageModel, *settings: Any) -> OwnModel:
    """An `OwnModel`, or a `DistantModel` where it is on another device than the base model.

    Args:
        runner: the model.
        lm: the base model.
        settings: further arguments of `OwnModel`.
    """
    return (OwnModel if runner.device == lm.runner.device else DistantModel)(runner, lm, *settings)


class SharedForward(RewardRuntime):
    """An adapter on the base model, executed in the base model's forward; the decoder moves and commits its rows.

    From the adapter's first layer on it has rows of its own, which count as the reward's tokens. A head alone has none.
    """

    prompt_contexts, shared = 0, True

    def __init__(
        self,
        lm: LanguageModel,
        adapter: Adapter,
        head: nn.Linear,
        tokenizer: PreTrainedTokenizerBase | None,
        trunk: str,
    ):
        super().__init__(lm.runner, head, tokenizer, adapter.name, trunk)
        self._attached = lm.runner.attach(adapter)
        self._own_rows = self._attached.branch > 0

    @property
    def final_norm(self) -> FinalNorm | None:
        return None

    def models(self) -> list[ModelRunner]:
        return []

    def encode(self, prompt: Prompt) -> list[list[int]]:
        return []

    def reserve(self, slots: int, length: int, counter: Counter, undo: int = 0) -> None:
        self.counter = counter

    def move(self, source: int, target: int) -> None:
        """The decoder moves the base model's rows."""

    def states(self, prefix: Prefix, answer: Sequence[int]) -> tuple[torch.Tensor, int]:
        hidden = self._attached.hidden_uncached([*prefix.prompt_ids, *answer])
        return hidden, len(prefix.prompt_ids)

    def admit(self, slot: int, encoded: list[list[int]]) -> None:
        if self._own_rows:
            self.counter.prompt_tokens += self._attached.encoded(slot)

    def candidate_states(self, candidates: torch.Tensor, normed: bool = True) -> torch.Tensor:
        if self._own_rows:
            self.counter.tokens += candidates.numel()
        return self._attached.candidates()

    def commit(self, choice: torch.Tensor) -> None:
        """The decoder commits the base model's rows."""

    admit_for_next = admit

    def next_states(self, rows: int) -> torch.Tensor:
        # A forward with shared_forward executes another reward's candidates: see `count_candidates`.
        if self._own_rows and not self.runner.shared_forward:
            self.counter.tokens += rows
        return self._attached.newest()

    def count_candidates(self, candidates: torch.Tensor) -> None:
        if self._own_rows and self.runner.shared_forward:
            self.counter.tokens += candidates.numel()

    def accept(self, tokens: torch.Tensor) -> None:
        """The newest tokens are the base model's."""

    def step_state(self) -> list[torch.Tensor]:
        return []
