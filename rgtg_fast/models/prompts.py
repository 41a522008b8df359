"""What a user may give as a prompt, and its token ids for a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError, shown

PromptLike = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, chat messages or token ids, and its index in the call.

    A text goes to the tokenizer as it is, chat messages through the chat template with the generation prompt, ids
    nowhere.
    """

    given: PromptLike
    index: int = 0

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The chat messages, where the prompt is a chat."""
        if not isinstance(self.given, str) and len(self.given) and isinstance(self.given[0], dict):
            return list(self.given)  # pyright: ignore[reportReturnType]
        return None

    def ids(self, tokenizer: PreTrainedTokenizerBase | None, template: str | None = None) -> list[int]:
        """Token ids for a model with this tokenizer.

        Args:
            template: a Jinja chat template in place of the tokenizer's own.
        """
        messages = self.messages
        if messages is None and not isinstance(self.given, str):
            return [int(token) for token in self.given]  # pyright: ignore[reportArgumentType]
        if tokenizer is None:
            raise RGTGError(
                f"prompt {self.index} is text and the model came without a tokenizer: pass token ids"
            )
        if messages is None:
            return tokenizer(self.given)["input_ids"]  # pyright: ignore[reportArgumentType, reportReturnType]
        if tokenizer.chat_template is None and template is None:
            raise RGTGError(
                f"prompt {self.index} is a chat and the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "pass a plain string"
            )
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, chat_template=template
            )
        except jinja2.TemplateError as error:
            raise RGTGError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses prompt {self.index}: {error}"
            ) from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportArgumentType, reportReturnType]


def check_ids(ids: Sequence[int], embeddings: int, index: int, role: str) -> None:
    """Refuses ids that a model has no embedding for: looking them up would end in an error of another kind, or none.

    Args:
        embeddings: rows of the model's embedding. index: of the prompt. role: of the model, for messages.

    Raises:
        RGTGError: naming the first such id.
    """
    outside = next((token for token in ids if not 0 <= token < embeddings), None)
    if outside is not None:
        raise RGTGError(
            f"prompt {index} has token id {outside}, outside the vocabulary (V={embeddings}): "
            f"use the {role}'s tokenizer"
        )


def as_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[Prompt]:
    """One prompt or many as a list.

    Raises:
        RGTGError: nothing given, an empty prompt, or something that is no prompt.
    """
    if not isinstance(prompts, (str, Iterable)):
        raise RGTGError(
            f"the prompt is {shown(prompts)}: pass a string, chat messages, token ids or a list of these"
        )
    many = [prompts] if _is_one(prompts) else list(prompts)  # pyright: ignore[reportArgumentType]
    if not many:
        raise RGTGError("there is no prompt: pass a string, chat messages, token ids or a list of these")
    for index, prompt in enumerate(many):
        if isinstance(prompt, Sequence) and not len(prompt):
            raise RGTGError(f"prompt {index} is empty: pass at least one token")
        if not _is_one(prompt):  # pyright: ignore[reportArgumentType]
            raise RGTGError(
                f"prompt {index} is {type(prompt).__name__}: pass a string, a list of chat messages or of token ids"
            )
    return [Prompt(prompt, index) for index, prompt in enumerate(many)]  # pyright: ignore[reportArgumentType]


def _is_one(prompt: object) -> bool:
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or not len(prompt):
        return False
    return all(isinstance(item, int) for item in prompt) or all(isinstance(item, dict) for item in prompt)
