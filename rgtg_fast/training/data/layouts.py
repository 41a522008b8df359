"""Reads one row of preference data as a prompt and two answers, by the names of its columns."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rgtg_fast.training.data.chats import (
    ASSISTANT,
    HUMAN,
    LOOKS_LIKE_CHAT,
    Messages,
    Text,
    UnusableError,
    hh_messages,
    last_field,
    listed,
    missing,
    parsed,
    text_or_messages,
)

# Names of each kind of column, in order of precedence. Capitals, spaces and hyphens make no difference.
COLUMNS = {
    "prompt": ("prompt", "question", "query", "instruction"),
    "chosen": ("chosen", "chosen_response", "response_chosen", "chosen_answer"),
    "rejected": ("rejected", "rejected_response", "response_rejected", "rejected_answer"),
    "system": ("system", "system_prompt", "system_message", "system_instruction", "system_instructions"),
    "messages": ("messages", "conversations", "conversation"),
    "input": ("input",),
    "finish_reason": ("finish_reason",),
    "chosen_finish_reason": ("chosen_finish_reason", "finish_reason_chosen"),
    "rejected_finish_reason": ("rejected_finish_reason", "finish_reason_rejected"),
    "chosen_score": ("score_chosen", "chosen_score", "chosen_rating", "rating_chosen"),
    "rejected_score": ("score_rejected", "rejected_score", "rejected_rating", "rating_rejected"),
    "chosen_reward": ("chosen_reward",),
    "rejected_reward": ("rejected_reward",),
    "info": ("info",),
    "summaries": ("summaries",),
    "choice": ("choice",),
}
# Values of `finish_reason` in this package, OpenAI's, Anthropic's and Google's APIs, and compatible servers.
ENDED = ("eos", "stop", "eos_token", "end_turn", "stop_sequence")
CUT = ("length", "max_tokens", "max_length", "max_new_tokens")
# Texts of end tokens that answers in data may end with, of any tokenizer.
END_TEXTS = (
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)


@dataclass(frozen=True)
class Reading:
    """The contents of one row.

    Attributes:
        prompt: a text or chat messages.
        chosen, rejected: the answers' texts.
        finish_reasons: finish reasons of the chosen and of the rejected answer, None where the data have none.
        notes: counters of the report to increment if the pair is kept.
    """

    prompt: Text
    chosen: str
    rejected: str
    finish_reasons: tuple[Any, Any]
    notes: tuple[str, ...] = ()


class Row:
    """A row whose columns are found by kind, under any of their names (`COLUMNS`)."""

    def __init__(self, row: Mapping[Any, Any]):
        self.row, self.names = row, known_columns(tuple(map(str, row)))

    def __getitem__(self, kind: str) -> Any:
        """The value of a column, None where the row has no such column or no value in it."""
        name = self.names.get(kind)
        value = None if name is None else self.row.get(name)
        return None if missing(value) else value

    def text(self, kind: str) -> Text:
        """A column with a text or a chat.

        Raises:
            UnusableError: it has neither.
        """
        if self[kind] is None:
            fields = ", ".join(map(repr, self.row)) or "none"
            raise UnusableError("malformed", f"no {kind!r} (fields: {fields})")
        return text_or_messages(self[kind], self.names[kind])


@functools.lru_cache(maxsize=64)
def known_columns(names: tuple[str, ...]) -> dict[str, str]:
    """The name of each kind of column, among the names of a row."""
    plain = {_plain(name): name for name in reversed(names)} | {name: name for name in names}
    found = {}
    for kind, aliases in COLUMNS.items():
        name = next((plain[alias] for alias in aliases if alias in plain), None)
        if name is not None:
            found[kind] = name
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.lstrip("\ufeff").strip().lower())


def layout_of(row: Mapping[Any, Any]) -> str | None:
    """The layout with this row's fields, None if there is none."""
    kinds = set(known_columns(tuple(map(str, row))))
    if {"info", "summaries", "choice"} <= kinds:
        return "tldr"
    if {"chosen", "rejected"} <= kinds:
        return "plain" if kinds & {"prompt", "messages"} else "dialogue"
    return None


def unread_columns(row: Mapping[Any, Any], layout: str) -> list[str]:
    """The names of the columns that have a value and are not used."""
    names = known_columns(tuple(map(str, row)))
    read = {"tldr": ("info", "summaries", "choice", "system")}.get(layout, ("chosen", "rejected", "system"))
    if layout == "plain":
        read = (*read, "prompt" if "prompt" in names else "messages")
    used = {names[kind] for kind in names if kind in read or kind.endswith(("reason", "score", "reward"))}
    rest = {str(name): value for name, value in row.items() if str(name) not in used}
    empty = [
        name
        for name, value in rest.items()
        if missing(value) or (hasattr(value, "__len__") and not len(value))
    ]
    # pandas writes the row numbers as a first column without a name.
    return [name for name in rest if name not in empty and name.strip() and not name.startswith("Unnamed:")]


# ---- Layouts


def read_plain(row: Row, chat: bool, prefixed: bool = False) -> Reading:
    """Reads a row with a prompt and answers, each alone or after the dialogue that it answers."""
    given: Text | None = None
    if "prompt" not in row.names and "messages" in row.names:
        given = _without_answer(row.text("messages"), row)
    elif row["prompt"] is not None:
        given = row.text("prompt")
        if row.names["prompt"].lower() == "instruction" and row["input"]:
            raise UnusableError(
                "malformed", "an 'input' next to the instruction: join them into one 'prompt'"
            )
    return _read(given, row, chat, prefixed, whole=False)


def read_dialogue(row: Row, chat: bool, prefixed: bool = False) -> Reading:
    """Reads a row with two whole dialogues."""
    return _read(None, row, chat, False, whole=True)


def read_tldr(row: Row, chat: bool, prefixed: bool = False) -> Reading:
    """Reads a row with a post and two summaries of it."""
    info, summaries, choice = (row[name] for name in ("info", "summaries", "choice"))
    for name, value in (("info", info), ("summaries", summaries), ("choice", choice)):
        if value is None:
            raise UnusableError(
                "malformed", f"no {name!r} (fields: {', '.join(map(repr, row.row)) or 'none'})"
            )
    info, summaries = (parsed(value) if isinstance(value, str) else value for value in (info, summaries))
    if not isinstance(info, Mapping):
        raise UnusableError("malformed", "'info' is not an object")
    if str(choice) not in ("0", "1"):
        raise UnusableError("malformed", f"choice={choice!r} is neither 0 nor 1")
    texts: Any = None
    if isinstance(summaries, Mapping):
        # `datasets` may turn a list of objects into an object of lists.
        texts = summaries.get("text")
    elif isinstance(summaries := listed(summaries), list):
        texts = [s.get("text") if isinstance(s, Mapping) else None for s in summaries]
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise UnusableError("malformed", "'summaries' are not two objects with a 'text'")
    if info.get("post"):
        heading = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
    else:
        heading = [("TITLE: ", "title"), ("ARTICLE: ", "article")]
    parts = [label + str(info[name]).strip() for label, name in heading if info.get(name)]
    if not info.get("post") and not info.get("article"):
        raise UnusableError("malformed", "'info' has neither 'post' nor 'article'")
    best = int(choice)
    prompt = with_system("\n".join([*parts, "TL;DR:"]), _system(row), chat)
    return _reading(prompt, _spaced(texts[best]), _spaced(texts[1 - best]), row)


# The reader of each layout: (row, chat, prefixed) -> contents of the row.
LAYOUTS: dict[str, Callable[[Row, bool, bool], Reading]] = {
    "plain": read_plain,
    "dialogue": read_dialogue,
    "tldr": read_tldr,
}


def _read(given: Text | None, row: Row, chat: bool, prefixed: bool, whole: bool) -> Reading:
    """Reads a prompt and two answers or dialogues.

    Args:
        given: the row's prompt, None where only the dialogues contain it.
        row: the row.
        chat: turns of HH-RLHF become chat messages.
        prefixed: answers that are texts begin with the prompt.
        whole: texts are dialogues.
    """
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UnusableError("malformed", "one answer is a text and the other chat messages")
    (before, answer), (other, worse) = (_parted(value, whole) for value in (chosen, rejected))
    if before != other:
        raise UnusableError("different_prompts")
    notes: tuple[str, ...] = ()
    if before:
        prompt = _agreed(given, before, chat)
    elif whole:
        raise UnusableError("malformed", "the dialogue has no message before the answer")
    else:
        prompt = row.text("prompt") if given is None else given
        if prefixed and isinstance(given, str):
            answer, worse = (_behind(given, text) for text in (answer, worse))
            notes = ("prompts_removed",)
    if isinstance(prompt, str):
        turns = hh_messages(prompt)
        if turns is not None and chat:
            prompt = turns
        elif turns is not None or (isinstance(before, str) and before):
            # HH-RLHF's turns as text: one space separates an answer from the colon.
            answer, worse = _spaced(answer), _spaced(worse)
    if not isinstance(chosen, str) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _reading(with_system(prompt, _system(row), chat), answer, worse, row, notes)


def row_prompt(row: Mapping[Any, Any], chat: bool) -> Text | None:
    """The prompt of a row without answers, after its system message; None where the row has no prompt.

    Args:
        row: row of the data.
        chat: HH-RLHF's turns become chat messages, and so does a text after a system message.

    Raises:
        UnusableError: it is neither a text nor a chat.
    """
    value = row.get("prompt")
    if missing(value):
        return None
    prompt = text_or_messages(value, "prompt")
    if isinstance(prompt, str) and chat:
        prompt = hh_messages(prompt) or prompt
    return with_system(prompt, _system(Row(row)), chat)


def _reading(prompt: Text, chosen: str, rejected: str, row: Row, notes: tuple[str, ...] = ()) -> Reading:
    both = row["finish_reason"]
    own = [row[f"{side}_finish_reason"] for side in ("chosen", "rejected")]
    last = [last_field(row[side], "finish_reason") for side in ("chosen", "rejected")]
    stated = [next((r for r in (a, b, both) if r is not None), None) for a, b in zip(own, last, strict=True)]
    scores = [_number(row[f"{side}_score"]) for side in ("chosen", "rejected")]
    if scores[0] is not None and scores[1] is not None and scores[0] < scores[1]:
        notes = (*notes, "lower_score")
    return Reading(prompt, chosen, rejected, (stated[0], stated[1]), notes)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


# ---- Where answers end


def has_ended(finish_reason: Any) -> bool | None:
    """Whether an answer ended, by its `finish_reason`; None if there is none.

    Raises:
        UnusableError: the value is in neither `ENDED` nor `CUT`.
    """
    reason = "" if missing(finish_reason) else str(finish_reason).strip().lower()
    if not reason:
        return None
    if reason in ENDED or reason in CUT:
        return reason in ENDED
    raise UnusableError(
        "malformed",
        f"finish_reason={finish_reason!r} is not one of {', '.join(ENDED)} (ended) or {', '.join(CUT)} (cut)",
    )


def without_end(answer: str) -> tuple[str, bool]:
    """An answer without its trailing end-token texts, and whether it had any."""
    rest, found = answer.rstrip(), False
    while mark := next((mark for mark in END_TEXTS if rest.endswith(mark)), None):
        # </s> also closes struck-out text (<s>).
        if mark == "</s>" and rest.count("<s>") >= rest.count("</s>"):
            break
        rest, found = rest.removesuffix(mark).rstrip(), True
    return (rest, True) if found else (answer, False)


# ---- Dialogues


def _parted(value: Text, whole: bool) -> tuple[Text, str]:
    """Splits a value into what precedes the answer ("" or [] where nothing does) and the answer.

    Args:
        value: an answer or a dialogue.
        whole: texts are dialogues.
    """
    if not isinstance(value, str):
        return _split_last(value)
    turns = hh_messages(value)
    if not whole and (turns is None or all(turn["role"] == "user" for turn in turns)):
        return "", value
    before, mark, answer = value.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise UnusableError("malformed", "the dialogue does not end with an assistant's turn")
    return before + mark, answer.strip()


def _split_last(messages: Messages) -> tuple[Messages, str]:
    if not messages:
        raise UnusableError("empty")
    if messages[-1]["role"] != "assistant":
        raise UnusableError("malformed", f"the last message is by {messages[-1]['role']!r}, not 'assistant'")
    return messages[:-1], messages[-1]["content"]


def _without_answer(messages: Text, row: Row) -> Text:
    """A column of messages as a prompt; its last message may repeat the chosen answer, which is removed."""
    if isinstance(messages, str) or not messages or messages[-1]["role"] != "assistant":
        return messages
    chosen = row.text("chosen")
    answer = chosen if isinstance(chosen, str) else _split_last(chosen)[1]
    if messages[-1]["content"].strip() != answer.strip():
        raise UnusableError("different_prompts")
    return messages[:-1]


def _agreed(given: Text | None, before: Text, chat: bool) -> Text:
    """The prompt of a row that has it in a column of its own and before its answers.

    The column may have all of the dialogue before the answers, or its beginning or end; a system message may be in one
    of the two only.

    Args:
        given: the column's value, None where there is no such column.
        before: what precedes the answers.
        chat: turns of HH-RLHF become chat messages.

    Raises:
        UnusableError: the two prompts differ.
    """
    whole = hh_messages(before) if isinstance(before, str) else before
    if whole is None:
        if chat:
            raise UnusableError("malformed", "the dialogue does not begin with 'Human:'")
        if given is not None and given != before:
            raise UnusableError("different_prompts")
        return before
    if not given or (isinstance(given, str) and not given.strip()):
        return before if isinstance(before, str) and not chat else whole
    mine = (hh_messages(given) or [{"role": "user", "content": given}]) if isinstance(given, str) else given
    own, rest = _system_apart(mine)
    theirs, turns = _system_apart(whole)
    if own and theirs and own != theirs:
        raise UnusableError("different_prompts")
    if turns and turns[0]["role"] == "assistant":
        # The answers have several turns, of which the last one is compared.
        if not rest or rest[-1]["role"] != "user":
            raise UnusableError("different_prompts")
        whole = [*rest, *turns]
    elif _bare(rest) not in (_bare(turns)[: len(rest)], _bare(turns)[-len(rest) :]) or not rest:
        raise UnusableError("different_prompts")
    if isinstance(before, str) and not chat and not own:
        return before
    return with_system(whole, own, chat)


def _system_apart(messages: Messages) -> tuple[str | None, Messages]:
    """The system message that a chat begins with, None where there is none, and the other messages."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"].strip(), messages[1:]
    return None, messages


def _bare(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def with_system(prompt: Text, system: str | None, chat: bool) -> Text:
    """A prompt after a system message, which becomes a chat's first message or the beginning of a text.

    Raises:
        UnusableError: the prompt has another system message.
    """
    if not system:
        return prompt
    if isinstance(prompt, str):
        if chat:
            return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return system + ("" if prompt.startswith("\n\n") else "\n\n") + prompt
    own, _ = _system_apart(prompt)
    if own is None:
        return [{"role": "system", "content": system}, *prompt]
    if own != system.strip():
        raise UnusableError("different_prompts")
    return prompt


def _system(row: Row) -> str | None:
    """The text of the column with the system message."""
    value = row["system"]
    if value is None:
        return None
    found = text_or_messages(value, row.names["system"])
    if isinstance(found, str):
        return found if found.strip() else None
    if len(found) > 1 or (found and found[0]["role"] != "system"):
        raise UnusableError("malformed", f"{row.names['system']!r} is not a single system message")
    return found[0]["content"] if found else None


def begins_with_prompt(row: Row) -> bool | None:
    """Whether both answers are texts that begin with the prompt; None where not all three are plain texts."""
    values = [row[name] for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(value, str) and value.strip() for value in values):
        return None
    prompt, chosen, rejected = values
    if any(hh_messages(text) or LOOKS_LIKE_CHAT.match(text) for text in (chosen, rejected)):
        return None
    try:
        return all(_behind(prompt, text).strip() != "" for text in (chosen, rejected))
    except UnusableError:
        return False


def _behind(prompt: str, text: str) -> str:
    """The rest of a text that begins with the prompt.

    Raises:
        UnusableError: the text does not begin with the prompt, or continues its last word.
    """
    if text.startswith(prompt):
        rest = text[len(prompt) :]
    elif text.strip().startswith(prompt.strip()):
        rest = text.strip()[len(prompt.strip()) :]
    else:
        raise UnusableError("different_prompts")
    if rest[:1].isalnum() and prompt[-1:].isalnum():
        raise UnusableError("different_prompts")
    return rest


def _spaced(answer: str) -> str:
    return " " + answer.strip() if answer.strip() else answer
