"""A reward model with another tokenizer, or a bidirectional encoder: scores texts, without a cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, load_sequence_classifier
from rgtg_fast.models.prompts import Prompt, rendered
from rgtg_fast.rewards.base import Prefix, PrefixReward, as_rewards
from rgtg_fast.rewards.classifier import Classifier
from rgtg_fast.rewards.function import check_function

_FIELDS = re.compile(r"(\{prompt\}|\{answer\})")
TextFunction = Callable[[list[str], list[str]], Sequence[float]]


class TextReward(PrefixReward):
    """Rewards of re-tokenized texts: the slow path, one batched forward over B·K whole texts a step, no cache.

    Text is not re-tokenized as a prefix of itself, so nothing can be kept between steps. Use `SequenceReward` for
    any causal reward model over the base model's tokenizer.

    Args:
        model: path or hub id of a sequence classifier (DeBERTa-like encoders too), a (model, tokenizer) pair, or a
            function f(prompts, answers) -> rewards over lists of B·K strings.
        template: how prompt and answer become one text, with `{prompt}` and `{answer}`; without it a chat goes through
            the reward model's own chat template where it has one, and everything else becomes the text pair
            (prompt, answer) of its tokenizer.
        batch_size: texts per forward.
        max_length: tokens per text, by default as many as the reward model has positions. Longer texts lose their
            beginning (of a pair, the longer text does), which a warning says once.
        label: name or index of the label whose score is the reward, where the classifier has several.
        trust_remote_code: whether code that comes with this model may run.

    A causal model is read at a text's last token, whatever padding its tokenizer and configuration name; an encoder
    pools as it does alone.

    Raises:
        RGTGError: at binding: several labels and none chosen, no tokenizer, or a `max_length` beyond the model's
            positions.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelAndTokenizer | TextFunction,
        template: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        label: str | int | None = None,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        self.trust_remote_code = trust_remote_code
        if template is not None and not ("{prompt}" in template and "{answer}" in template):
            raise RGTGError(f"template={template!r} lacks {{prompt}} or {{answer}}: name both")
        if batch_size < 1:
            raise RGTGError(f"batch_size={batch_size} is below 1: use for example 32")
        if not isinstance(model, (str, os.PathLike, tuple, list)):
            check_function(model)
            if label is not None:
                raise RGTGError(
                    f"label={label!r} and the reward is a function, which has no labels: leave it out"
                )
        self.source, self.template, self.label = model, template, label
        self.batch_size, self.max_length = batch_size, max_length
        self._function: TextFunction | None = None
        self._model: PreTrainedModel | None = None
        self._classifier: Classifier | None = None
        self._lm: LanguageModel | None = None

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        self._lm = lm
        self._forget_rows()
        if callable(self.source):
            self._function = self.source
            return
        source: Any = self.source
        model, tokenizer = load_sequence_classifier(
            source, lm.runner, dtype, self.label, self.trust_remote_code, lm.reward_device
        )
        if tokenizer is None:
            raise RGTGError("TextReward needs the reward model's tokenizer: pass (model, tokenizer)")
        self._model = model
        self._classifier = Classifier(model, tokenizer, self.name, self.max_length, self.label)
        self.max_length = self._classifier.max_length

    @property
    def name(self) -> str:
        if self._model is None:
            return f"TextReward({getattr(self.source, '__name__', self.source)})"
        return f"TextReward({self._model.config._name_or_path or type(self._model).__name__})"

    def encode(self, prompt: Prompt) -> list[list[int]]:
        # A chat that cannot be read is refused before anything is decoded.
        if prompt.messages is not None:
            tokenizer = None if self._classifier is None else self._classifier.tokenizer
            if tokenizer is not None and self._by_chat_template(tokenizer, prompt):
                self._texts(tokenizer, [Prefix(prompt, [])], ["a"])
            else:
                self._prompt_text(Prefix(prompt, []))
        return []

    def loaded(self) -> list[object]:
        # Models that differ in their heads alone may share a trunk.
        return [] if self._model is None else [self._model, self._model.base_model]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The reward model's; None for a function, and before it is bound."""
        return None if self._classifier is None else self._classifier.tokenizer

    @property
    def head(self) -> nn.Module | None:
        """The `score` head of a causal reward model; None for an encoder, a function, and before it is bound."""
        return None if self._classifier is None else self._classifier._head

    def read_ids(self, prefix: Prefix, answer: str) -> list[int]:
        """The token ids that the reward model reads for a prompt and an answer; none for a function."""
        if self._classifier is None:
            return []
        texts, pairs = self._texts(self._classifier.tokenizer, [prefix], [answer])
        special = pairs is not None or self.template is not None
        return self._classifier.encode(texts, pairs, special)[0]["input_ids"]

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        assert self._lm is not None
        rows, answers = [], []
        for prefix, tokens in zip(self._prefixes(len(candidates)), candidates.tolist(), strict=True):
            rows += [prefix] * len(tokens)
            answers += [self._lm.text([*prefix.answer, token]) for token in tokens]
        return self._rewards(rows, answers).view(candidates.shape)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        assert self._lm is not None
        answers = [self._lm.text(answer[: i + 1]) for i in range(len(answer))]
        return self._rewards([prefix] * len(answers), answers).tolist()

    def _rewards(self, rows: list[Prefix], answers: list[str]) -> torch.Tensor:
        assert self._lm is not None
        device = self._lm.runner.device
        if self._function is not None:
            self.counter.calls += 1
            values = self._function([self._prompt_text(row) for row in rows], list(answers))
            return as_rewards(values, (len(answers),), device, self.name, f"{len(answers)} texts")
        # Chats and plain texts are formatted differently and never share a forward: a row's reward must not depend on
        # what else is in the batch.
        rewards = torch.empty(len(rows), dtype=torch.float32, device=device)
        chats = [i for i, row in enumerate(rows) if row.prompt.messages is not None]
        texts = [i for i, row in enumerate(rows) if row.prompt.messages is None]
        for kind in (chats, texts):
            for start in range(0, len(kind), self.batch_size):
                part = kind[start : start + self.batch_size]
                values = self._forward([rows[i] for i in part], [answers[i] for i in part])
                rewards[part] = values.to(device)
        return rewards

    def _forward(self, rows: list[Prefix], answers: list[str]) -> torch.Tensor:
        assert self._classifier is not None
        texts, pairs = self._texts(self._classifier.tokenizer, rows, answers)
        special = pairs is not None or self.template is not None
        return self._classifier.rewards(self._classifier.encode(texts, pairs, special), self.counter)

    def _texts(
        self, tokenizer: PreTrainedTokenizerBase, rows: list[Prefix], answers: list[str]
    ) -> tuple[list[str], list[str] | None]:
        """Texts, and second texts where they go to the tokenizer as pairs."""
        if self._by_chat_template(tokenizer, rows[0].prompt):
            texts = []
            for row, answer in zip(rows, answers, strict=True):
                chat = [*(row.prompt.messages or []), {"role": "assistant", "content": answer}]
                what = f"prompt {row.prompt.index} with an answer"
                texts.append(rendered(tokenizer, chat, what, answer_follows=False))
            return texts, None
        prompts = [self._prompt_text(row) for row in rows]
        if self.template is None:
            return prompts, answers
        # In one pass: a prompt may itself hold the text "{answer}".
        parts = _FIELDS.split(self.template)
        fields = [{"{prompt}": p, "{answer}": a} for p, a in zip(prompts, answers, strict=True)]
        return ["".join(values.get(part, part) for part in parts) for values in fields], None

    def _by_chat_template(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> bool:
        return self.template is None and tokenizer.chat_template is not None and prompt.messages is not None

    def _prompt_text(self, prefix: Prefix) -> str:
        """The prompt as text: itself, a chat's turns in lines, or ids decoded."""
        assert self._lm is not None
        messages = prefix.prompt.messages
        if messages is not None:
            return "\n\n".join(self._turn(message, prefix.prompt.index) for message in messages)
        if isinstance(prefix.prompt.given, str):
            return prefix.prompt.given
        return self._lm.text(prefix.prompt_ids)

    def _turn(self, message: dict[str, Any], index: int) -> str:
        content = message.get("content")
        if not isinstance(content, str):
            raise RGTGError(
                f"prompt {index} has a message with content={str(content)[:40]} and {self.name} reads strings: "
                "pass each content as one string"
            )
        return f"{message['role']}: {content}"
