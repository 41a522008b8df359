"""Chats in all forms that data contain: HH-RLHF's turns, lists of messages, and texts of these."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, str]]
Text: TypeAlias = str | Messages

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
# Speakers' names in data -> roles of chat templates.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Longest text to parse as a chat, in characters; a longer chat fits no model's context.
_LONGEST = 1 << 21
LOOKS_LIKE_CHAT = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:""")
_LOOKS_LIKE_MESSAGE = re.compile(r"""\s*\{\s*(['"])(role|content|from|value)\1\s*:""")


class UnusableError(Exception):
    """A row that gives no pair.

    Attributes:
        reason: the counter of the report to increment.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail)
        self.reason = reason


def hh_messages(text: str) -> Messages | None:
    """HH-RLHF's turns as chat messages; None where the text is not a dialogue that starts with "Human:".

    An empty last assistant turn, with which a prompt ends, is left out. Successive turns of one speaker become one
    message.
    """
    before, *turns = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns or turns[0] != "Human":
        return None
    messages: Messages = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        role = _ROLES.get(speaker.lower(), speaker.lower())
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": role, "content": content})
    messages = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def text_or_messages(value: Any, name: str) -> Text:
    """A text, or chat messages from a message or a list of messages, as objects or as text in JSON or Python syntax.

    Messages have role and content, or from and value; contents may be lists of texts.

    Args:
        value: value of the column.
        name: name of the column, for messages.

    Raises:
        UnusableError: it is neither a text nor chat messages.
    """
    if isinstance(value, str):
        return _chat_in(value, name)
    messages = _as_messages(value)
    if messages is None:
        raise UnusableError(
            "malformed", f"{name!r} is neither a text nor a list of messages with role and content"
        )
    return messages


def _chat_in(text: str, name: str) -> Text:
    """The chat messages that a text encodes, or the text."""
    many = LOOKS_LIKE_CHAT.match(text) is not None
    if not many and _LOOKS_LIKE_MESSAGE.match(text) is None:
        return text
    value = parsed(text)
    messages = None if value is None else _as_messages(value)
    if many and value is None:
        raise UnusableError("malformed", f"{name!r} looks like chat messages and cannot be read as such")
    return text if messages is None else messages


def _as_messages(value: Any) -> Messages | None:
    value = listed(value)
    if isinstance(value, Mapping):
        columns = [listed(column) for column in value.values()]
        if columns and all(isinstance(column, list) for column in columns):
            # `datasets` may turn a list of objects into an object of lists.
            if len({len(column) for column in columns}) > 1:
                return None
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list):
        return None
    messages = [_as_message(message) for message in value]
    return None if None in messages else messages  # pyright: ignore[reportReturnType]


def _as_message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, Mapping):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    parts = listed(content)
    if (
        isinstance(parts, list)
        and parts
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts)
    ):
        content = "".join(str(part.get("text", "")) for part in parts)
    if not (isinstance(role, str) and isinstance(content, str)):
        return None
    role = role.strip().lower()
    return {"role": _ROLES.get(role, role), "content": content}


def listed(value: Any) -> Any:
    """A tuple or an array as a list; other values unchanged."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def last_field(value: Any, name: str) -> Any:
    """A field of the last message of a chat, None if there is none."""
    if isinstance(value, str) and LOOKS_LIKE_CHAT.match(value) is not None:
        value = parsed(value)
    value = listed(value)
    last = value[-1] if isinstance(value, list) and value else value
    found = last.get(name) if isinstance(last, Mapping) else None
    return found if isinstance(found, str) else None


def parsed(text: str) -> Any:
    """The value that a text encodes in JSON or as a Python literal, None where it is neither. Nothing is executed.

    numpy prints lists of dictionaries without commas between them; these are read too.
    """
    if len(text) > _LONGEST:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    for literal in (text.strip(), with_commas(text.strip())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                return ast.literal_eval(literal)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


_STRING = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_BETWEEN = re.compile(rf"({_STRING})|\}}(\s+)\{{", re.DOTALL)


def with_commas(text: str) -> str:
    """A text with commas added between dictionaries that are separated by white space only, outside strings."""
    return _BETWEEN.sub(lambda found: found[1] or "}," + found[2] + "{", text)


def is_plain_text(texts: Sequence[str]) -> bool:
    """Whether all texts are valid Unicode; half of a surrogate pair is not."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def missing(value: Any) -> bool:
    """Whether a value is None, NaN, or one of pandas' equivalents."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float) and value != value)
    )
