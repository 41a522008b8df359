"""Preference pairs: read from files and data sets, cleaned with every drop counted, split by prompt, tokenized."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.training.config import check_answers_ended
from rgtg_fast.training.data.chats import Messages, UnusableError, hh_messages, is_plain_text
from rgtg_fast.training.data.layouts import (
    LAYOUTS,
    Row,
    begins_with_prompt,
    has_ended,
    layout_of,
    unread_columns,
    without_end,
)
from rgtg_fast.training.data.report import DataReport
from rgtg_fast.training.data.rows import read_rows

Layout: TypeAlias = Literal["auto", "plain", "dialogue", "tldr"]


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the answer that was preferred and the one that was not.

    Attributes:
        prompt: a text or chat messages, as `RewardGuidedDecoder.generate` takes it.
        chosen, rejected: the answers' texts.
        index: row of the source, from 0.
        ended: whether the chosen and the rejected answer ended by themselves (True) or were cut off (False); None where
            the data do not say, which counts as ended.
    """

    prompt: str | Messages
    chosen: str
    rejected: str
    index: int
    ended: tuple[bool | None, bool | None] = (None, None)

    @property
    def opening(self) -> str:
        """By what a split takes two prompts for the same: the first user message, or the whole text."""
        messages = hh_messages(self.prompt) if isinstance(self.prompt, str) else self.prompt
        if messages is None:
            return str(self.prompt).strip()
        users = [message for message in messages if message["role"] == "user"]
        return (users or messages)[0]["content"].strip()


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; answers that ended are followed by the end-of-sequence token.

    Attributes:
        prompt_ids: the ids that the reward model gets for this prompt in decoding.
        chosen_ids, rejected_ids: ids of the answers; the last one is EOS where the answer ended.
        index: row of the source, from 0.
        ended: whether the chosen and the rejected answer ended.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    index: int
    ended: tuple[bool, bool] = (True, True)

    @property
    def text_lengths(self) -> tuple[int, int]:
        """Numbers of tokens of the answers, without EOS."""
        return len(self.chosen_ids) - self.ended[0], len(self.rejected_ids) - self.ended[1]

    def read_whole(self, chosen: list[float], rejected: list[float]) -> tuple[list[float], list[float]]:
        """The rewards of the prefixes of both answers, each followed by the reward of the whole answer.

        Args:
            chosen, rejected: rewards at every token. The reward of a whole answer is read at its EOS, or, where it was
                cut, at its last token, whose reward is then repeated.
        """
        both = [
            rewards if end else [*rewards, rewards[-1]]
            for rewards, end in zip((chosen, rejected), self.ended, strict=True)
        ]
        return both[0], both[1]


def load_pairs(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    layout: Layout = "auto",
    *,
    split: str = "train",
    chat: bool = True,
    answers_ended: str = "auto",
) -> tuple[list[PreferencePair], DataReport]:
    """Reads preference pairs and counts the rows that give none.

    Layouts:

    - `plain`: `prompt`, `chosen`, `rejected`; each a text or a list of chat messages. Answers may be whole dialogues,
      or texts that begin with the prompt. A prompt in HH-RLHF's turns ("\\n\\nHuman: …\\n\\nAssistant:") becomes chat
      messages.
    - `dialogue`: `chosen`, `rejected`, whole dialogues that share all but the last answer, in HH-RLHF's turns or as
      chat messages.
    - `tldr`: comparisons of summaries: `info`, `summaries`, `choice`.

    Chats may be texts in JSON or Python syntax. A column with a system message is put before the prompt. The texts of
    end tokens at the end of answers are removed.

    Args:
        source: a .jsonl, .json, .csv (each also .gz), .parquet or .arrow file; a folder or hub id for `datasets`; a
            loaded data set, a table of pandas, pyarrow or polars, or any iterable of rows.
        layout: one of the above, or "auto" to detect it by the first row's fields.
        split: split of a data set with several.
        chat: turns of HH-RLHF become chat messages; False keeps them as text, for models without a chat template.
        answers_ended: "auto": by `finish_reason` (of both answers, or `chosen_finish_reason` and
            `rejected_finish_reason`, or of the answer's message): eos, stop, end_turn and the like for an answer that
            ended, length or max_tokens for one that was cut; "yes" or "no": all ended, or all were cut.

    Returns:
        The pairs in the order of the source, and the report.

    Raises:
        RGTGError: the source cannot be read, no row fits, or no pair is left.
    """
    if layout not in ("auto", *LAYOUTS):
        raise RGTGError(f"layout={layout!r} is unknown: use one of auto, {', '.join(LAYOUTS)}")
    check_answers_ended(answers_ended)
    name = str(source) if isinstance(source, (str, os.PathLike)) else "the data"
    report = DataReport()
    pairs: list[PreferencePair] = []
    seen: set[str] = set()
    # Only many rows together show whether the data's answers repeat their prompt.
    rows = list(read_rows(source, split))
    first = next((row for row in rows if isinstance(row, Mapping)), {})
    known = layout
    if known == "auto" and first:
        known = _layout_of(first, name)
    report.unread = tuple(unread_columns(first, known))
    repeated = _repeated_prompts(rows if known == "plain" else [None] * len(rows))
    prefixed = repeated.count(True) > repeated.count(False)
    for index, row in enumerate(rows):
        report.read += 1
        try:
            pair, notes = _read_pair(row, index, known, chat, prefixed, answers_ended)
            if repeated[index] and not prefixed:
                notes.append("prompts_repeated")
            key = hashlib.sha256(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode()).hexdigest()
            if key in seen:
                raise UnusableError("duplicates")
        except UnusableError as reason:
            report.drop(reason, index)
            continue
        seen.add(key)
        pairs.append(pair)
        for note in notes:
            report.count(note)
    report.kept = len(pairs)
    _check_some_left(report, name)
    return pairs, report


def _layout_of(row: Mapping[Any, Any], name: str) -> Layout:
    found = layout_of(row)
    if found is None:
        raise RGTGError(
            f"the rows of {name} have the fields {', '.join(map(repr, row)) or 'none'}: preference pairs have prompt, "
            "chosen and rejected, or chosen and rejected dialogues, or info, summaries and choice"
        )
    return cast(Layout, found)


def _repeated_prompts(rows: Sequence[Any]) -> list[bool | None]:
    """Whether both answers of each row begin with its prompt; None where that is undecided."""
    return [begins_with_prompt(Row(row)) if isinstance(row, Mapping) else None for row in rows]


def _read_pair(
    row: Any, index: int, layout: str, chat: bool, prefixed: bool, answers_ended: str
) -> tuple[PreferencePair, list[str]]:
    """A row as a pair, the texts of end tokens removed from its answers, and the counters of the report to increment.

    Raises:
        UnusableError: the row gives no pair.
    """
    if isinstance(row, str):
        raise UnusableError("malformed", row)
    if not isinstance(row, Mapping):
        raise UnusableError("malformed", f"a row is an object with fields, not {type(row).__name__}")
    reading = LAYOUTS[layout](Row(row), chat, prefixed)
    answers, ended, notes = [], [], list(reading.notes)
    for text, reason in zip((reading.chosen, reading.rejected), reading.finish_reasons, strict=True):
        answer, marked = without_end(text)
        answers.append(answer)
        notes += ["end_texts"] * marked
        stated = has_ended(reason) if answers_ended == "auto" else answers_ended == "yes"
        # The text of an end token outweighs the column.
        ended.append(True if marked and answers_ended == "auto" else stated)
    pair = PreferencePair(reading.prompt, answers[0], answers[1], index, (ended[0], ended[1]))
    _check(pair)
    return pair, notes


def _check_some_left(report: DataReport, name: str) -> None:
    """Checks that pairs are left.

    Raises:
        RGTGError: none are; with the reasons and their counts.
    """
    if report.kept:
        return
    if not report.read:
        raise RGTGError(f"{name} has no rows: name a file with preference pairs")
    reasons = "; ".join(line for line in report.lines()[1:])
    raise RGTGError(f"no pairs are left of the {report.read} in {name}: {reasons}")


def split_by_prompt(
    pairs: Sequence[PreferencePair], held_out: float = 0.1, seed: int = 0
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Splits pairs such that no prompt's opening is in both parts.

    Openings are ordered by a hash of the seed and their text, so the split does not depend on the order of the pairs.

    Args:
        pairs: the pairs to split.
        held_out: share of the pairs to hold out, in [0, 1).
        seed: seed of the order.

    Returns:
        The pairs to train on and those held out, each in their order.

    Raises:
        RGTGError: the share is out of range, or all pairs have the same opening.
    """
    if not 0 <= held_out < 1:
        raise RGTGError(f"held_out={held_out} is not in [0, 1): use for example 0.1")
    if held_out == 0:
        return list(pairs), []
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[pair.opening] = sizes.get(pair.opening, 0) + 1
    if len(sizes) < 2:
        raise RGTGError(
            f"the {len(pairs)} pairs have {len(sizes)} opening prompt and a split by prompt needs 2: "
            "use held_out=0 or add pairs"
        )
    order = sorted(sizes, key=lambda opening: hashlib.sha256(f"{seed}\0{opening}".encode()).digest())
    out: set[str] = set()
    count = 0
    # The last opening is never held out.
    for opening in order[:-1]:
        if out and count + sizes[opening] / 2 > held_out * len(pairs):
            break
        out.add(opening)
        count += sizes[opening]
    return [p for p in pairs if p.opening not in out], [p for p in pairs if p.opening in out]


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    chat_template: str | None = None,
    truncate_prompt: bool = True,
    min_answer_tokens: int = 0,
    *,
    chat: bool = False,
    eos_token_id: int | None = None,
) -> tuple[list[TokenizedPair], DataReport]:
    """Tokenizes pairs: prompts as in decoding, and exactly one EOS after every answer that ended.

    An answer that was cut off has no EOS: its last token is the last one of its text.

    Args:
        pairs: the pairs to tokenize.
        tokenizer: tokenizer of the model.
        max_length: most tokens of the prompt and the longer answer.
        chat_template: Jinja chat template in place of the tokenizer's own.
        truncate_prompt: cut the beginning of a prompt that is too long; False drops the pair.
        min_answer_tokens: pairs with a shorter answer (without EOS) are dropped.
        chat: make a text prompt one user message where there is a chat template, as `rgtg-fast generate` does.
        eos_token_id: the token that ends an answer, by default the tokenizer's.

    Returns:
        The pairs in their order, and the report.

    Raises:
        RGTGError: no EOS token, chat prompts without a chat template, or no pair is left.
    """
    eos = _checked_eos(pairs, tokenizer, max_length, chat_template, eos_token_id)
    template = chat_template or tokenizer.chat_template
    end_text = cast(str, tokenizer.decode([eos])).strip() or "\0"
    report = DataReport(read=len(pairs))
    kept: list[TokenizedPair] = []
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        prompts = [_prompt(pair, chat and template is not None) for pair in chunk]
        texts: list[str] = []
        for pair, prompt in zip(chunk, prompts, strict=True):
            answers = (pair.chosen, pair.rejected)
            # After a chat template the answer starts at its first letter; after a text prompt its spacing is kept.
            texts += [answer.strip() if prompt.messages is not None else answer for answer in answers]
        answer_ids = cast("list[list[int]]", tokenizer(texts, add_special_tokens=False)["input_ids"])
        for i, (pair, prompt) in enumerate(zip(chunk, prompts, strict=True)):
            both = slice(2 * i, 2 * i + 2)
            try:
                contents = [without_eos(ids, eos) for ids in answer_ids[both]]
                _check_ids(contents[0], contents[1], eos, min_answer_tokens)
                ended = (pair.ended[0] is not False, pair.ended[1] is not False)
                chosen, rejected = (
                    [*ids, eos] if end else ids for ids, end in zip(contents, ended, strict=True)
                )
                ids = _prompt_ids(prompt, tokenizer, chat_template)
                available = max_length - max(len(chosen), len(rejected))
                if len(ids) > available and (not truncate_prompt or available < 1):
                    raise UnusableError("too_long")
            except UnusableError as reason:
                report.drop(reason, pair.index)
                continue
            report.truncated += len(ids) > available
            report.end_texts += sum(text.rstrip().endswith(end_text) for text in texts[both])
            report.cut += 2 - sum(ended)
            report.unstated += pair.ended.count(None)
            kept.append(TokenizedPair(ids[-available:], chosen, rejected, pair.index, ended))
    report.kept = len(kept)
    _check_some_left(report, f"the pairs (max_length={max_length}, min_answer_tokens={min_answer_tokens})")
    return kept, report


def _checked_eos(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: str | None,
    eos_token_id: int | None,
) -> int:
    """Checks the arguments of `tokenize_pairs` and returns the token that ends an answer."""
    eos = cast("int | None", tokenizer.eos_token_id) if eos_token_id is None else eos_token_id
    title = tokenizer.name_or_path or type(tokenizer).__name__
    if eos is None:
        raise RGTGError(
            f"the tokenizer of {title} has no EOS token, with which an answer ends: set tokenizer.eos_token"
        )
    if max_length < 2:
        raise RGTGError(f"max_length={max_length} is below 2, one token of prompt and one of answer")
    if (chat_template or tokenizer.chat_template) is None and any(
        not isinstance(pair.prompt, str) for pair in pairs
    ):
        raise RGTGError(
            f"the pairs are chats and the tokenizer of {title} has no chat template: "
            "pass chat_template, or load pairs in HH's turns with chat=False"
        )
    return eos


def hash_pairs(pairs: Sequence[TokenizedPair]) -> str:
    """sha256 over the pairs' token ids, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]).encode())
    return digest.hexdigest()


def without_eos(ids: list[int], eos: int) -> list[int]:
    """An answer's tokens without trailing EOS tokens, which its text or the tokenizer may have added."""
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return ids[:end]


def _prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> list[int]:
    """A prompt's ids.

    Raises:
        UnusableError: the chat template refuses it, for instance for a system message or two turns of one speaker.
    """
    try:
        return prompt.ids(tokenizer, chat_template)
    except (RGTGError, TemplateError) as error:
        raise UnusableError("refused", " ".join(str(error).split())) from error


# Pairs per call of the tokenizer.
_CHUNK = 256


def _prompt(pair: PreferencePair, wrap: bool) -> Prompt:
    if wrap and isinstance(pair.prompt, str):
        return Prompt([{"role": "user", "content": pair.prompt}], pair.index)
    return Prompt(pair.prompt, pair.index)


def _check_ids(chosen: list[int], rejected: list[int], eos: int, least: int) -> None:
    if not chosen or not rejected:
        raise UnusableError("empty")
    if eos in chosen or eos in rejected:
        raise UnusableError("end_inside")
    if chosen == rejected:
        raise UnusableError("identical")
    if min(len(chosen), len(rejected)) < least:
        raise UnusableError("short")


def _check(pair: PreferencePair) -> None:
    contents = [pair.prompt] if isinstance(pair.prompt, str) else [m["content"] for m in pair.prompt]
    if not ("".join(contents).strip() and pair.chosen.strip() and pair.rejected.strip()):
        raise UnusableError("empty")
    if not is_plain_text([*contents, pair.chosen, pair.rejected]):
        raise UnusableError("malformed", "half of a surrogate pair, which is not a character")
    if pair.chosen.strip() == pair.rejected.strip():
        raise UnusableError("identical")
