"""A reward model with another tokenizer, or a bidirectional encoder: scores texts, without a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, load_sequence_classifier
from rgtg_fast.rewards.base import Prefix, Reward, as_rewards
from rgtg_fast.rewards.function import check_function

TextFunction = Callable[[list[str], list[str]], Sequence[float]]


class TextReward(Reward):
    """Rewards of re-tokenised texts: the slow path, one batched forward over B·k whole texts a step, no cache.

    Text is not re-tokenised as a prefix of itself, so nothing can be kept between steps. Use `SequenceReward` for
    any causal reward model over the base model's tokenizer.

    Args:
        model: path or hub id of a sequence classifier with one label (DeBERTa-like encoders too), a
            (model, tokenizer) pair, or a function f(prompts, answers) -> rewards over lists of B·k strings.
        template: how prompt and answer become one text, with `{prompt}` and `{answer}`; without it a chat goes through
            the reward model's own chat template where it has one, and everything else becomes the text pair
            (prompt, answer) of its tokenizer.
        batch_size: texts per forward. max_length: tokens per text, longer ones lose their beginning; by default the
            reward model's context.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelAndTokenizer | TextFunction,
        template: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ):
        super().__init__()
        if template is not None and not ("{prompt}" in template and "{answer}" in template):
            raise RGTGError(f"template={template!r} lacks {{prompt}} or {{answer}}: name both")
        if batch_size < 1:
            raise RGTGError(f"batch_size={batch_size} is below 1: use for example 32")
        if not isinstance(model, (str, os.PathLike, tuple, list)):
            check_function(model)
        self.source, self.template = model, template
        self.batch_size, self.max_length = batch_size, max_length
        self._function: TextFunction | None = None
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lm: LanguageModel | None = None
        self._rows: dict[int, Prefix] = {}

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        self._lm, self._rows = lm, {}
        if callable(self.source):
            self._function = self.source
            return
        source: Any = self.source
        model, tokenizer = load_sequence_classifier(source, lm.backbone.model, dtype)
        if tokenizer is None:
            raise RGTGError("TextReward needs the reward model's tokenizer: pass (model, tokenizer)")
        self._model, self._tokenizer = model, tokenizer
        tokenizer.truncation_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if self.max_length is None:
            self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def name(self) -> str:
        if self._model is None:
            return f"TextReward({getattr(self.source, '__name__', self.source)})"
        return f"TextReward({self._model.config._name_or_path or type(self._model).__name__})"

    def loaded(self) -> list[object]:
        return [thing for thing in (self._model, self._tokenizer) if thing is not None]

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        self._rows[slot] = prefix

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows.pop(source)

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        assert self._lm is not None
        rows, answers = [], []
        for slot, tokens in enumerate(candidates.tolist()):
            prefix = self._rows[slot]
            rows += [prefix] * len(tokens)
            answers += [self._lm.text([*prefix.answer, token]) for token in tokens]
        return self._rewards(rows, answers).view(candidates.shape)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        assert self._lm is not None
        answers = [self._lm.text(answer[: i + 1]) for i in range(len(answer))]
        return self._rewards([prefix] * len(answers), answers).tolist()

    def _rewards(self, rows: list[Prefix], answers: list[str]) -> torch.Tensor:
        assert self._lm is not None
        device = self._lm.backbone.device
        if self._function is not None:
            self.counter.calls += 1
            values = self._function([self._prompt_text(row) for row in rows], list(answers))
            return as_rewards(values, (len(answers),), device, self.name, f"{len(answers)} texts")
        # Chats and plain texts are formatted differently and never share a forward: a row's reward must not depend on
        # what else is in the batch.
        rewards = torch.empty(len(rows), device=device)
        chats = [i for i, row in enumerate(rows) if row.prompt.messages is not None]
        texts = [i for i, row in enumerate(rows) if row.prompt.messages is None]
        for kind in (chats, texts):
            for start in range(0, len(kind), self.batch_size):
                part = kind[start : start + self.batch_size]
                rewards[part] = self._forward([rows[i] for i in part], [answers[i] for i in part])
        return rewards

    def _forward(self, rows: list[Prefix], answers: list[str]) -> torch.Tensor:
        assert self._model is not None
        assert self._tokenizer is not None
        texts, pairs = self._texts(rows, answers)
        batch = self._tokenizer(
            texts,
            pairs,
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=pairs is not None or self.template is not None,
            return_tensors="pt",
        ).to(self._model.device)
        self.counter.calls += 1
        self.counter.tokens += int(batch["attention_mask"].sum())
        return self._model(**batch).logits.squeeze(-1).float()

    def _texts(self, rows: list[Prefix], answers: list[str]) -> tuple[list[str], list[str] | None]:
        """Texts, and second texts where they go to the tokenizer as pairs."""
        assert self._tokenizer is not None
        if (
            self.template is None
            and self._tokenizer.chat_template is not None
            and rows[0].prompt.messages is not None
        ):
            chats = [
                [*(row.prompt.messages or []), {"role": "assistant", "content": answer}]
                for row, answer in zip(rows, answers, strict=True)
            ]
            return [str(self._tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats], None
        prompts = [self._prompt_text(row) for row in rows]
        if self.template is None:
            return prompts, answers
        template = self.template
        return [
            template.replace("{prompt}", prompt).replace("{answer}", answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ], None

    def _prompt_text(self, prefix: Prefix) -> str:
        """The prompt as text: itself, a chat's turns in lines, or ids decoded."""
        assert self._lm is not None
        messages = prefix.prompt.messages
        if messages is not None:
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        if isinstance(prefix.prompt.given, str):
            return prefix.prompt.given
        return self._lm.text(prefix.prompt_ids)
