"""The base language model of a decoder: its runner, tokenizer, end-of-sequence ids and vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.models.runner import ModelRunner


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    A prompt has one row in the model's batch for each of its contexts: the prompt itself first, then those that a
    reward adds (contrastive prompts: 2). The methods of a run count prompts and hide these rows.

    Attributes:
        runner: the model and its prefix cache.
        tokenizer: None for a model given without one; prompts are token ids then.
        vocabulary: number of tokens that may be chosen (V); a reward model with fewer embeddings lowers it.
        reward_device: where a reward's own models are loaded, None for the base model's device.
    """

    runner: ModelRunner
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    reward_device: torch.device | None = None

    @property
    def other_device(self) -> torch.device | None:
        """The device of a reward's own models where it is not the base model's."""
        return None if self.reward_device == self.runner.device else self.reward_device

    @property
    def shares_forward(self) -> bool:
        """Whether an adapter may run in this model's forward."""
        return True

    def pair(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """The model with its weights, and its tokenizer."""
        return self.runner.model, self.tokenizer

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer: the generation config's, else the tokenizer's."""
        config: Any = self.runner.model.generation_config
        ids = None if config is None else config.eos_token_id
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset(map(int, ids if isinstance(ids, list) else [ids]))

    # ---- a run ------------------------------------------------------------------------------------------------------

    def reserve(self, prompts: int, length: int, reward_contexts: int, shared_forward: bool) -> None:
        """Begins a run.

        Args:
            prompts: decoded at once.
            length: tokens that a row may reach.
            reward_contexts: further rows for each prompt.
            shared_forward: whether steps execute candidates that an adapter on this model scores.
        """
        rows = 1 + reward_contexts
        self.runner.reserve(prompts * rows, length, rows, shared_forward)

    def admit(self, slot: int, contexts: Sequence[Sequence[int]]) -> None:
        """Prefills a prompt's token ids in each of its contexts.

        The last token is left to the next step, which costs one token a row then, for new rows as for running ones. A
        shared forward has no such step: it reads the logits after the last token.
        """
        first = slot * self.runner.prompt_contexts
        for row, ids in enumerate(contexts, first):
            self.runner.begin(row, ids if self.runner.shared_forward else ids[:-1])

    def move(self, source: int, target: int) -> None:
        """Moves the prompt in slot `source` to slot `target`."""
        rows = self.runner.prompt_contexts
        for context in range(rows):
            self.runner.move(source * rows + context, target * rows + context)

    def next_logits(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits for the token after each prompt's newest: [B, V], and in the reward's contexts [B, C, V].

        A shared forward has executed the newest tokens already, as candidates of the step before.

        Args:
            tokens: [B] int64, the newest tokens; -1 where a row has ended.
        """
        newest = self._per_row(tokens)
        if not self.runner.shared_forward:
            self.runner.step(newest.clamp_min(0).unsqueeze(-1))
            # The only token of the step is accepted: 0. A row that has ended accepts none: -1.
            self.runner.commit(newest.clamp_max(0))
        logits = self.runner.next_logits(len(newest))[:, : self.vocabulary]
        by_prompt = logits.unflatten(0, (len(tokens), self.runner.prompt_contexts))
        return by_prompt[:, 0], by_prompt[:, 1:]

    def run_candidates(self, candidates: torch.Tensor) -> None:
        """Executes candidates [B, K] in a shared forward; elsewhere the reward model does so itself."""
        if self.runner.shared_forward:
            self.runner.step(self._per_row(candidates))

    def commit(self, accepted: torch.Tensor) -> None:
        """Appends candidate `accepted[b]` [B] to each prompt's rows in a shared forward; else the next step does."""
        if self.runner.shared_forward:
            self.runner.commit(self._per_row(accepted))

    def _per_row(self, of_prompt: torch.Tensor) -> torch.Tensor:
        """Values of prompts [B, ...], repeated for each row of the model's batch."""
        rows = self.runner.prompt_contexts
        return of_prompt if rows == 1 else of_prompt.repeat_interleave(rows, 0)

    # ---- text -------------------------------------------------------------------------------------------------------

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of answer tokens; without a tokenizer, the ids.

        Args:
            special: whether special tokens are part of the text.
        """
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        if special:
            # Some tokenizers would put spaces around special tokens, which no model has written.
            return str(self.tokenizer.decode(list(tokens), spaces_between_special_tokens=False))
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token, special tokens included."""
        return str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))
