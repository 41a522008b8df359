"""The prompts of a study, as the decoder takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.study.settings import Study
from rgtg_fast.models.prompts import PromptLike
from rgtg_fast.training.data import UnusableError, hh_messages, read_rows, row_prompt


@dataclass(frozen=True)
class StudyPrompt:
    """One prompt of a study.

    Attributes:
        index: row of the file.
        given: the prompt as the decoder takes it.
        text: the prompt as text for a reader.
        key: identifies the prompt: two rows with the same key are duplicates.
    """

    index: int
    given: PromptLike
    text: str
    key: str


def load_prompts(study: Study, tokenizer: PreTrainedTokenizerBase) -> tuple[list[StudyPrompt], list[str]]:
    """The prompts of a study as the decoder takes them, and warnings about them in one line each.

    Duplicates and empty prompts are left out. Prompts in HH-RLHF's turns become chat messages.

    Raises:
        RGTGError: no such file, a row without a prompt, or no prompt left.
    """
    rows: Any = (
        ({"prompt": text} for text in study.prompts)
        if isinstance(study.prompts, tuple)
        else read_rows(study.prompts)
    )
    chat = study.chat and tokenizer.chat_template is not None
    found: dict[str, StudyPrompt] = {}
    empty = duplicates = 0
    for index, row in enumerate(rows):
        prompt = as_prompt(
            given_prompt(row, chat, f"row {index} of {_source(study)} is not a prompt"), index, chat
        )
        if not prompt.text.strip():
            empty += 1
        elif prompt.key in found:
            duplicates += 1
        else:
            found[prompt.key] = prompt
        if len(found) == study.limit:
            break
    if not found:
        raise RGTGError(f"{_source(study)} has no prompts: name a file with a field 'prompt'")
    warnings = []
    if duplicates:
        warnings.append(f"{duplicates} duplicate prompts were left out")
    if empty:
        warnings.append(f"{empty} empty prompts were left out")
    return list(found.values()), warnings


def _source(study: Study) -> str:
    return study.prompts if isinstance(study.prompts, str) else "prompts"


def given_prompt(row: Any, chat: bool, where: str) -> Any:
    """A row's prompt as the file has it, after the message of its column `system`.

    Args:
        row: row of the file.
        chat: whether texts become chat messages.
        where: begins an error message.

    Raises:
        RGTGError: the row has no prompt.
    """
    try:
        value = row_prompt(row, chat) if isinstance(row, Mapping) else None
    except UnusableError as error:
        raise RGTGError(f"{where}: {error or 'it has two system messages'}") from error
    if value is None:
        raise RGTGError(f"{where}: {row if isinstance(row, str) else 'it has no field ' + repr('prompt')}")
    return value


def as_prompt(value: Any, index: int, chat: bool) -> StudyPrompt:
    """One prompt from a text, HH-RLHF's turns or chat messages; with `chat`, a text is one user message.

    Raises:
        RGTGError: none of these.
    """
    messages = (
        value if isinstance(value, list) else hh_messages(value) if isinstance(value, str) and chat else None
    )
    if messages is None and chat:
        messages = [{"role": "user", "content": str(value)}]
    if messages is None:
        return StudyPrompt(index, str(value), str(value), str(value))
    try:
        text = "\n\n".join(str(message["content"]) for message in messages)
    except (TypeError, KeyError) as error:
        raise RGTGError(
            f"prompt {index} is neither a text nor chat messages with role and content"
        ) from error
    return StudyPrompt(index, messages, text, json.dumps(messages, ensure_ascii=False, sort_keys=True))


def prompt_seed(seed: int, key: str) -> int:
    """The decoder's seed for one prompt: the same for every method, different for every prompt.

    Methods are compared under the same noise. Prompts, over which the intervals are resampled, have independent noise.

    Args:
        seed: seed of the study.
        key: key of the prompt.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
