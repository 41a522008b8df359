"""What a policy is trained on: preference pairs with their texts, or prompts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.training.chats import UnusableError
from rgtg_fast.training.data import (
    DataReport,
    Messages,
    PreferencePair,
    TokenizedPair,
    load_pairs,
    split_by_prompt,
    tokenize_pairs,
)
from rgtg_fast.training.layouts import row_prompt
from rgtg_fast.training.sources import read_rows


class DataSettings(Protocol):
    """What of a `PolicyTrainConfig` the data depend on."""

    @property
    def limit(self) -> int | None: ...
    @property
    def held_out(self) -> float: ...
    @property
    def answers_ended(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def min_answer_tokens(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class PolicyData:
    """Tokenised data, their texts, and the counts.

    Attributes:
        train, evaluation: tokenised pairs; for prompts alone, pairs without answers.
        sources: the texts of both, by a pair's index, of each part.
        report: counts by stage. lines: the same in words.
    """

    train: list[TokenizedPair]
    evaluation: list[TokenizedPair]
    sources: tuple[dict[int, PreferencePair], dict[int, PreferencePair]]
    report: dict[str, Any]
    lines: list[str]


def load_preferences(
    data: Any, eval_data: Any, recipe: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> PolicyData:
    """Preference pairs to train and to evaluate on, as in `train_policy`."""
    chat = tokenizer.chat_template is not None
    pairs, loaded = load_pairs(data, chat=chat, answers_ended=recipe.answers_ended)
    pairs = pairs[: recipe.limit]
    held: list[PreferencePair] = []
    eval_loaded: DataReport | None = None
    if eval_data is not None:
        held, eval_loaded = load_pairs(eval_data, chat=chat, answers_ended=recipe.answers_ended)
    elif recipe.held_out > 0:
        pairs, held = split_by_prompt(pairs, recipe.held_out, recipe.seed)

    def tokens(part: list[PreferencePair]) -> tuple[list[TokenizedPair], DataReport]:
        return tokenize_pairs(
            part, tokenizer, recipe.max_length, min_answer_tokens=recipe.min_answer_tokens, chat=chat
        )

    train, fitted = tokens(pairs)
    evaluation, eval_fitted = tokens(held) if held else ([], DataReport())
    report: dict[str, Any] = {"loaded": loaded.as_dict(), "train": fitted.as_dict()}
    lines = [f"data: {line}" for line in (*loaded.lines(), *fitted.lines()[1:], fitted.end_line())]
    if held:
        report["eval"] = (eval_fitted if eval_loaded is None else eval_loaded + eval_fitted).as_dict()
        lines.append(f"evaluation: {eval_fitted.lines()[0]}")
    sources = ({pair.index: pair for pair in pairs}, {pair.index: pair for pair in held})
    return PolicyData(train, evaluation, sources, report, lines)


def load_prompts(data: Any, recipe: DataSettings, tokenizer: PreTrainedTokenizerBase) -> PolicyData:
    """Prompts alone, each once, of rows that have a `prompt`.

    Raises:
        RGTGError: none is left.
    """
    chat = tokenizer.chat_template is not None
    train: list[TokenizedPair] = []
    sources: dict[int, PreferencePair] = {}
    counts = {"read": 0, "malformed": 0, "duplicates": 0, "too_long": 0}
    seen: set[tuple[int, ...]] = set()
    for index, row in enumerate(read_rows(data)):
        if recipe.limit is not None and len(train) == recipe.limit:
            break
        counts["read"] += 1
        prompt = _prompt_of(row, chat)
        if prompt is None:
            counts["malformed"] += 1
            continue
        ids = Prompt(prompt, index).ids(tokenizer)
        if tuple(ids) in seen:
            counts["duplicates"] += 1
        elif len(ids) + recipe.max_new_tokens > recipe.max_length:
            counts["too_long"] += 1
        else:
            seen.add(tuple(ids))
            train.append(TokenizedPair(ids, [], [], index))
            sources[index] = PreferencePair(prompt, "", "", index)
    if not train:
        raise RGTGError(
            f"no prompts are left of the {counts['read']} rows ({counts['malformed']} without a 'prompt', "
            f"{counts['too_long']} over max_length={recipe.max_length} with {recipe.max_new_tokens} new tokens)"
        )
    dropped = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "read")
    lines = [f"data: {len(train)} of {counts['read']} prompts kept" + (f" ({dropped})" if dropped else "")]
    return PolicyData(train, [], (sources, {}), {"train": {**counts, "kept": len(train)}}, lines)


def _prompt_of(row: Any, chat: bool) -> str | Messages | None:
    """A row's prompt, None where there is none that the model can take."""
    try:
        prompt = row_prompt(row, chat) if isinstance(row, Mapping) else None
    except UnusableError:
        return None
    if isinstance(prompt, str):
        text = prompt.strip()
        return [{"role": "user", "content": prompt}] if text and chat else prompt if text else None
    return prompt if chat and prompt else None
