"""Prompts and answers as users pass them (texts, chats, token ids), checked and tokenized for a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError, one_line, shown

PromptLike = str | Sequence[int] | Sequence[dict[str, Any]]

_PASS = "pass a string, a list of chat messages, a list of token ids, or a list of these"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    A text is tokenized as it is, chat messages after the chat template with the generation prompt. An answer follows,
    so that the end-of-text token that some tokenizers append is left out.

    Attributes:
        given: a text, chat messages or token ids.
        index: index of the prompt in the call, for messages.
    """

    given: PromptLike
    index: int = 0

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The chat messages, where the prompt is a chat."""
        if not isinstance(self.given, str) and len(self.given) and isinstance(self.given[0], dict):
            return list(self.given)  # pyright: ignore[reportReturnType]
        return None

    def ids(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        template: str | None = None,
        ending: str = "",
    ) -> list[int]:
        """Token ids for a model.

        Args:
            tokenizer: the model's tokenizer, None where prompts are ids.
            template: a Jinja chat template in place of the tokenizer's own.
            ending: text that follows a rendered chat.

        Raises:
            RGTGError: no tokenizer or chat template for this prompt, or a template that refuses it.
        """
        messages, what = self.messages, f"prompt {self.index}"
        if messages is None and not isinstance(self.given, str):
            return [int(token) for token in self.given]  # pyright: ignore[reportArgumentType]
        if tokenizer is None:
            raise RGTGError(f"{what} is text and the model came without a tokenizer: pass token ids")
        if messages is None:
            return text_ids(tokenizer, cast("str", self.given), what, special=True)
        if tokenizer.chat_template is None and template is None:
            raise RGTGError(
                f"{what} is a chat and the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "pass a plain string"
            )
        text = rendered(tokenizer, messages, what, template, answer_follows=True)
        return text_ids(tokenizer, text + ending, what)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, what: str, *, special: bool = False) -> list[int]:
    """The token ids of a text that another text may follow.

    Args:
        tokenizer: the model's tokenizer.
        text: the text.
        what: names the text in a message.
        special: whether to add the special tokens that the tokenizer puts before a text. Those that it puts behind are
            left out, and so is its beginning-of-text token where the text begins with one.

    Raises:
        RGTGError: a lone surrogate in the text.
    """
    check_text(text, what)
    if not special:
        return list(cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]))
    encoded = cast("dict[str, list[int]]", tokenizer(text, return_special_tokens_mask=True))
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    bos, end = tokenizer.bos_token_id, len(ids)
    # A text without tokens keeps its beginning-of-text token.
    while end and added[end - 1] and (ids[end - 1] != bos or bos == tokenizer.eos_token_id):
        end -= 1
    twice = ids[:2] == [bos, bos] and added[0] and not added[1]
    return ids[1 if twice else 0 : end]


def check_text(text: str, what: str) -> None:
    """Refuses a text with a lone surrogate, which tokenizers cannot encode.

    Args:
        text: the text.
        what: names the text in a message.

    Raises:
        RGTGError: with the character and its position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RGTGError(
            f"{what} holds half of a surrogate pair, {text[error.start]!a}, at character {error.start}: "
            "put the whole character there or take it out"
        ) from error


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    what: str,
    template: str | None = None,
    *,
    answer_follows: bool,
) -> str:
    """A chat rendered by the chat template.

    Args:
        tokenizer: the model's tokenizer.
        messages: the chat.
        what: names the chat in a message.
        template: a Jinja chat template in place of the tokenizer's own.
        answer_follows: whether to add the generation prompt.

    Raises:
        RGTGError: a message without role or text, or a template that refuses the chat.
    """
    for at, message in enumerate(messages):
        _check_message(message, f"message {at} of {what}")
    title = f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=answer_follows,
            tokenize=False,
            chat_template=template,
        )
    except Exception as error:  # a template is a program, which may raise anything
        raise RGTGError(
            f"{what} is a chat that {title} does not take ({one_line(error, None)}): pass one that it takes, or a "
            "plain string (--no-chat)"
        ) from error
    for message in messages:
        for part in _parts(message) if message["role"] != "tool" else []:
            raw = str(dict(part)), json.dumps(dict(part), ensure_ascii=False)
            if part["text"].strip() not in text or any(given in text for given in raw):
                raise RGTGError(
                    f"{what} has content in parts and {title} reads strings: pass each content as one string"
                )
    return str(text)


def as_prompts(
    prompts: PromptLike | Sequence[PromptLike], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Prompt]:
    """A list of the prompts given.

    Args:
        prompts: one prompt or many. Tensors and arrays of ids count as lists of ids, a table's column as a list of
            prompts.
        tokenizer: the base model's, whose padding token tells padded rows.

    Raises:
        RGTGError: no prompt, an empty one, or something that is not a prompt.
    """
    whole = _plain(prompts)
    if _is_one(whole):
        many: list[object] = [whole]
    elif isinstance(whole, Iterator) or _is_list(whole):
        many = [_plain(prompt) for prompt in whole]
    else:
        raise RGTGError(f"the prompt is {_explain(prompts)}")
    if not many:
        raise RGTGError("there is no prompt: pass a string, chat messages, token ids or a list of these")
    for index, prompt in enumerate(many):
        if isinstance(prompt, Sequence) and not len(prompt):
            raise RGTGError(f"prompt {index} is empty: pass at least one token")
        if not _is_one(prompt):
            raise RGTGError(f"prompt {index} is {_explain(prompt)}")
    if all(_are_ids(prompt) for prompt in many):
        _check_unpadded(cast("list[list[int]]", many), tokenizer)
    return [Prompt(_plain_types(prompt), index) for index, prompt in enumerate(many)]


def as_answers(
    answers: str | Sequence[str | Sequence[int]], tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """The token ids of the answers given.

    Args:
        answers: one answer or many, each a text or token ids.
        tokenizer: the base model's, None where answers are ids.

    Raises:
        RGTGError: an empty answer, or something that is not an answer.
    """
    whole, found = _plain(answers), []
    if isinstance(whole, Iterator) or (_is_list(whole) and not _are_ids(whole)):
        many = [_plain(answer) for answer in whole]
    else:
        many = [whole]
    for index, answer in enumerate(many):
        if isinstance(answer, str):
            if tokenizer is None:
                raise RGTGError("an answer is text and the model came without a tokenizer: pass token ids")
            found.append(text_ids(tokenizer, answer, f"answer {index}"))
        elif _are_ids(answer):
            found.append(list(answer))
        else:
            raise RGTGError(f"answer {index} is {shown(answer)}: pass a string or a list of token ids")
        if not found[-1]:
            raise RGTGError(f"answer {index} is empty: pass at least one token")
    return found


def check_known(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Refuses token ids outside a model's vocabulary.

    Args:
        ids: token ids.
        vocabulary: V, the size of the vocabulary.
        what: names the text in a message.

    Raises:
        RGTGError: with the first such id.
    """
    outside = next((token for token in ids if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise RGTGError(
            f"{what} has token id {outside}, outside the vocabulary (V={vocabulary}): use the model's own tokenizer"
        )


def _plain(value: object) -> object:
    """Converts tensors, arrays and columns to lists, the value itself or its items."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        return value
    if hasattr(value, "tolist"):
        return cast("Any", value).tolist()
    if _is_list(value) and any(hasattr(item, "tolist") for item in value):
        return [_plain(item) for item in value]
    return value


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_one(prompt: object) -> bool:
    return isinstance(prompt, str) or (_are_ids(prompt) and len(prompt) > 0) or _is_chat(prompt)


def _are_ids(value: object) -> TypeGuard[Sequence[int]]:
    """Whether it is a list of token ids, or empty."""
    return _is_list(value) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _is_chat(prompt: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether it is a list of mappings, at least one of them a chat message."""
    return (
        _is_list(prompt)
        and all(isinstance(item, Mapping) for item in prompt)
        and any("role" in cast("Any", item) for item in prompt)
    )


def _check_message(message: Mapping[str, Any], what: str) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RGTGError(f'{what} has no role: a message is {{"role": ..., "content": ...}}')
    if isinstance(content, str) or role == "tool" or (content is None and message.get("tool_calls")):
        return
    if not _parts(message) or not all(isinstance(part.get("text"), str) for part in _parts(message)):
        raise RGTGError(f"{what} has content={shown(content)}: pass a string as content")


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a message's content; empty where the content is not a list of parts."""
    content = message.get("content")
    parts: list[Any] = list(content) if _is_list(content) else []
    return parts if all(isinstance(part, Mapping) for part in parts) else []


def _check_unpadded(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuses padded rows of equal length: without the attention mask, text and padding cannot be told apart."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if tokenizer is None or pad is None or len(rows) == 1 or len(set(map(len, rows))) > 1:
        return
    # Where the padding token is also that for the beginning or end of a text, it may be so in all rows.
    borders = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for side in (0, -1):
        padded = [row[side] == pad for row in rows]
        if any(padded) and not (borders and all(padded)):
            raise RGTGError(
                f"prompt {padded.index(True)} is padded with token {pad}: pass lists of ids without padding, or texts"
            )


def _plain_types(prompt: object) -> PromptLike:
    """The prompt as a string, a list or tuple of ids, or a list of dicts."""
    if _is_chat(prompt):
        return [dict(message) for message in prompt]
    return cast("PromptLike", prompt if isinstance(prompt, str | list | tuple) else list(cast("Any", prompt)))


def _explain(value: object) -> str:
    """What was given in place of a prompt, and what to do."""
    if isinstance(value, Mapping):
        if "role" in value:
            return "one chat message and a chat is a list of messages: pass [message]"
        if "input_ids" in value:
            return "a tokenizer's mapping: pass its input_ids without padding, or the text or the chat itself"
        keys = ", ".join(map(str, value)) or "none"
        keys = keys if len(keys) <= 60 else keys[:57] + "..."
        return f"a mapping with the keys {keys}: pass what holds the prompt, as in [row['prompt'] for row in rows]"
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes: pass a string, as in prompt.decode()"
    if _is_list(value):
        kinds = dict.fromkeys(type(item).__name__ for item in value)
        return f"a list of {' and '.join(list(kinds)[:3])}: {_PASS}"
    if hasattr(value, "columns") or hasattr(value, "column_names"):
        return f"a table ({type(value).__name__}): pass the column that holds the prompts, as in list(rows['prompt'])"
    return f"{shown(value)}: {_PASS}"
