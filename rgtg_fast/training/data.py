"""Preference pairs: read from files and data sets, cleaned with every drop counted, split by prompt, tokenised."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.prompts import Prompt

Messages: TypeAlias = list[dict[str, str]]
Layout: TypeAlias = Literal["auto", "plain", "dialogue", "tldr"]
LAYOUTS = ("auto", "plain", "dialogue", "tldr")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the answer that was preferred and the one that was not.

    Attributes:
        prompt: a text or chat messages, as `RewardGuidedDecoder.generate` takes it.
        chosen, rejected: the answers' texts.
        index: row of the source, from 0.
    """

    prompt: str | Messages
    chosen: str
    rejected: str
    index: int

    @property
    def opening(self) -> str:
        """What makes two prompts the same one for a split: the first user message, or the whole text."""
        messages = hh_messages(self.prompt) if isinstance(self.prompt, str) else self.prompt
        if messages is None:
            return str(self.prompt).strip()
        users = [message for message in messages if message["role"] == "user"]
        return (users or messages)[0]["content"].strip()


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; both answers end with the end-of-sequence token.

    Attributes:
        prompt_ids: ids that the decoder would give the reward model for this prompt.
        chosen_ids, rejected_ids: ids of the answers, the last one EOS.
        index: row of the source, from 0.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    index: int


@dataclass
class DataReport:
    """How many rows came in, how many pairs were kept and why the others were not.

    `earlier + later` is the report of two stages in a row (loading, then tokenising).

    Attributes:
        read: rows that came in. kept: pairs that went out.
        malformed: rows without the fields of their layout.
        different_prompts: dialogues that differ before the last answer.
        empty: a prompt or an answer without text. identical: both answers the same.
        duplicates: the same prompt and answers as an earlier row.
        short: an answer below the least number of tokens. too_long: over the length limit.
        truncated: pairs that were kept and whose prompt lost its beginning.
        first_malformed: the first such row and what is wrong with it.
    """

    read: int = 0
    kept: int = 0
    malformed: int = 0
    different_prompts: int = 0
    empty: int = 0
    identical: int = 0
    duplicates: int = 0
    short: int = 0
    too_long: int = 0
    truncated: int = 0
    first_malformed: str = field(default="", compare=False)

    @property
    def dropped(self) -> int:
        """Pairs that came in and did not go out, by the reasons counted."""
        return sum(getattr(self, name) for name in _DROPS)

    def __add__(self, later: DataReport) -> DataReport:
        counts = {name: getattr(self, name) + getattr(later, name) for name in (*_DROPS, "truncated")}
        first = self.first_malformed or later.first_malformed
        return DataReport(read=self.read, kept=later.kept, **counts, first_malformed=first)

    def as_dict(self) -> dict[str, Any]:
        """The counts by name."""
        values = asdict(self)
        if not self.first_malformed:
            del values["first_malformed"]
        return values

    def lines(self) -> list[str]:
        """The counts as text, zeros left out."""
        lines = [f"{self.kept} of {self.read} pairs kept"]
        for name in _DROPS:
            count = getattr(self, name)
            if count:
                detail = f" (first: {self.first_malformed})" if name == "malformed" else ""
                lines.append(f"{count} dropped: {_REASONS[name]}{detail}")
        if self.truncated:
            lines.append(f"{self.truncated} kept with the beginning of their prompt cut off")
        return lines


_REASONS = {
    "malformed": "not in the layout",
    "different_prompts": "the dialogues differ before the last answer",
    "empty": "empty prompt or answer",
    "identical": "identical answers",
    "duplicates": "seen before",
    "short": "answer too short",
    "too_long": "too long",
}
_DROPS = tuple(_REASONS)
assert set(_DROPS) <= {f.name for f in fields(DataReport)}


class _UnusableError(Exception):
    """A row that gives no pair.

    Attributes:
        reason: the counter of the report.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail)
        self.reason = reason


def load_pairs(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    layout: Layout = "auto",
    *,
    split: str = "train",
    chat: bool = True,
) -> tuple[list[PreferencePair], DataReport]:
    """Reads preference pairs and counts every row that gives none.

    Layouts:

    - `plain`: `prompt`, `chosen`, `rejected`; each a text or a list of chat messages. A prompt in HH-RLHF's turns
      ("\\n\\nHuman: …\\n\\nAssistant:") becomes chat messages.
    - `dialogue`: `chosen`, `rejected`, whole dialogues that share all but the last answer, in HH-RLHF's turns or as
      chat messages.
    - `tldr`: comparisons of summaries: `info`, `summaries`, `choice`.

    Args:
        source: a .jsonl, .json, .csv (each also .gz) or .parquet file; a folder or hub id for `datasets`; a loaded
            data set or any iterable of rows.
        layout: one of the above, or "auto" to know it by the first row's fields.
        split: of a data set with several.
        chat: turns of HH-RLHF become chat messages; False keeps them as text, for models without a chat template.

    Returns:
        The pairs in the order of the source, and the report.

    Raises:
        RGTGError: the source cannot be read, no row fits, or no pair is left.
    """
    if layout not in LAYOUTS:
        raise RGTGError(f"layout={layout!r} is unknown: use one of {', '.join(LAYOUTS)}")
    name = str(source) if isinstance(source, (str, os.PathLike)) else "the data"
    report = DataReport()
    pairs: list[PreferencePair] = []
    seen: set[str] = set()
    read: Callable[[Mapping[str, Any], bool], tuple[str | Messages, str, str]] | None = None
    for index, row in enumerate(read_rows(source, split)):
        report.read += 1
        try:
            if isinstance(row, str):
                raise _UnusableError("malformed", row)
            if not isinstance(row, Mapping):
                raise _UnusableError("malformed", f"a row is an object with fields, not {type(row).__name__}")
            read = read or _READERS[_layout_of(row, name) if layout == "auto" else layout]
            prompt, chosen, rejected = read(row, chat)
            _check(prompt, chosen, rejected)
            key = hashlib.sha256(json.dumps([prompt, chosen, rejected]).encode()).hexdigest()
            if key in seen:
                raise _UnusableError("duplicates")
        except _UnusableError as reason:
            setattr(report, reason.reason, getattr(report, reason.reason) + 1)
            if reason.reason == "malformed" and not report.first_malformed:
                report.first_malformed = f"row {index}: {reason}"
            continue
        seen.add(key)
        pairs.append(PreferencePair(prompt, chosen, rejected, index))
    report.kept = len(pairs)
    check_some_left(report, name)
    return pairs, report


def check_some_left(report: DataReport, name: str) -> None:
    """Refuses data of which nothing is left.

    Raises:
        RGTGError: with the reasons and their counts.
    """
    if report.kept:
        return
    if not report.read:
        raise RGTGError(f"{name} has no rows: name a file with preference pairs")
    reasons = "; ".join(line for line in report.lines()[1:])
    raise RGTGError(f"no pairs are left of the {report.read} in {name}: {reasons}")


def hh_messages(text: str) -> Messages | None:
    """HH-RLHF's turns as chat messages, or None where the text is not a dialogue that a human opens.

    A last assistant turn without text, with which a prompt ends, is left out; turns of the same speaker in a row
    become one message.
    """
    before, *turns = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns or turns[0] != "Human":
        return None
    messages: Messages = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        role = _ROLES[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": role, "content": content})
    messages = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def split_by_prompt(
    pairs: Sequence[PreferencePair], held_out: float = 0.1, seed: int = 0
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Splits pairs so that no prompt's opening is on both sides.

    Openings are ordered by a hash of the seed and their text, so the split does not depend on the order of the pairs.

    Args:
        held_out: share of the pairs to hold out, in [0, 1).

    Returns:
        The pairs to train on and those held out, each in their order.

    Raises:
        RGTGError: a share out of range, or all pairs have one opening.
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
    # The last opening always stays to be trained on.
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
    """Token ids of pairs: the prompt's are the decoder's own, each answer ends with EOS.

    Args:
        max_length: tokens of the prompt and the longer answer at most.
        chat_template: Jinja chat template in place of the tokenizer's own.
        truncate_prompt: a prompt over the limit loses its beginning; False drops the pair.
        min_answer_tokens: pairs with a shorter answer (without EOS) are dropped.
        chat: a text prompt becomes one user message where there is a chat template, as `rgtg-fast generate` does.
        eos_token_id: the token that ends an answer, by default the tokenizer's.

    Returns:
        The pairs in their order, and the report.

    Raises:
        RGTGError: no EOS token, chat prompts without a chat template, or no pair is left.
    """
    eos = cast("int | None", tokenizer.eos_token_id) if eos_token_id is None else eos_token_id
    title = tokenizer.name_or_path or type(tokenizer).__name__
    if eos is None:
        raise RGTGError(
            f"the tokenizer of {title} has no EOS token, with which an answer ends: set tokenizer.eos_token"
        )
    if max_length < 2:
        raise RGTGError(f"max_length={max_length} is below 2, one token of prompt and one of answer")
    template = chat_template or tokenizer.chat_template
    if template is None and any(not isinstance(pair.prompt, str) for pair in pairs):
        raise RGTGError(
            f"the pairs are chats and the tokenizer of {title} has no chat template: "
            "pass chat_template, or load pairs in HH's turns with chat=False"
        )
    report = DataReport(read=len(pairs))
    kept: list[TokenizedPair] = []
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        prompts = [_prompt(pair, chat and template is not None) for pair in chunk]
        texts: list[str] = []
        for pair, prompt in zip(chunk, prompts, strict=True):
            answers = (pair.chosen, pair.rejected)
            # A chat template ends where the answer's first letter follows; a text prompt's own spacing is kept.
            texts += [answer.strip() if prompt.messages is not None else answer for answer in answers]
        answer_ids = cast("list[list[int]]", tokenizer(texts, add_special_tokens=False)["input_ids"])
        for i, (pair, prompt) in enumerate(zip(chunk, prompts, strict=True)):
            chosen, rejected = answer_ids[2 * i], answer_ids[2 * i + 1]
            try:
                _check_ids(chosen, rejected, min_answer_tokens)
                ids = prompt.ids(tokenizer, chat_template)
                room = max_length - max(len(chosen), len(rejected)) - 1
                if len(ids) > room and (not truncate_prompt or room < 1):
                    raise _UnusableError("too_long")
            except _UnusableError as reason:
                setattr(report, reason.reason, getattr(report, reason.reason) + 1)
                continue
            report.truncated += len(ids) > room
            kept.append(TokenizedPair(ids[-room:], [*chosen, eos], [*rejected, eos], pair.index))
    report.kept = len(kept)
    check_some_left(report, f"the pairs (max_length={max_length}, min_answer_tokens={min_answer_tokens})")
    return kept, report


# Pairs per call of the tokenizer.
_CHUNK = 256


def _prompt(pair: PreferencePair, wrap: bool) -> Prompt:
    if wrap and isinstance(pair.prompt, str):
        return Prompt([{"role": "user", "content": pair.prompt}], pair.index)
    return Prompt(pair.prompt, pair.index)


def _check_ids(chosen: list[int], rejected: list[int], least: int) -> None:
    if not chosen or not rejected:
        raise _UnusableError("empty")
    if chosen == rejected:
        raise _UnusableError("identical")
    if min(len(chosen), len(rejected)) < least:
        raise _UnusableError("short")


def _check(prompt: str | Messages, chosen: str, rejected: str) -> None:
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    if not (text.strip() and chosen.strip() and rejected.strip()):
        raise _UnusableError("empty")
    if chosen.strip() == rejected.strip():
        raise _UnusableError("identical")


def _layout_of(row: Mapping[str, Any], name: str) -> str:
    """The layout that has this row's fields."""
    if {"info", "summaries", "choice"} <= set(row):
        return "tldr"
    if {"prompt", "chosen", "rejected"} <= set(row):
        return "plain"
    if {"chosen", "rejected"} <= set(row):
        return "dialogue"
    raise RGTGError(
        f"the rows of {name} have the fields {', '.join(map(repr, row)) or 'none'}: preference pairs have prompt, "
        "chosen and rejected, or chosen and rejected dialogues, or info, summaries and choice"
    )


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise _UnusableError("malformed", f"no {name!r} (fields: {', '.join(map(repr, row)) or 'none'})")
    return row[name]


def _read_plain(row: Mapping[str, Any], chat: bool) -> tuple[str | Messages, str, str]:
    prompt = _text_or_messages(row, "prompt")
    chosen, rejected = _text_or_messages(row, "chosen"), _text_or_messages(row, "rejected")
    if isinstance(prompt, str):
        turns = hh_messages(prompt)
        if turns is not None and chat:
            prompt = turns
        elif turns is not None:
            # HH's turns as text: an answer follows the colon after one space.
            chosen, rejected = _spaced(chosen), _spaced(rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise _UnusableError("malformed", "one answer is a text and the other chat messages")
    # Answers as messages: the answer alone, or the whole dialogue with the prompt before it.
    before, answer = _split_last(chosen)
    other, worse = _split_last(rejected)
    if before != other:
        raise _UnusableError("different_prompts")
    if before:
        return before, answer, worse
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, answer, worse


def _read_dialogue(row: Mapping[str, Any], chat: bool) -> tuple[str | Messages, str, str]:
    chosen, rejected = _text_or_messages(row, "chosen"), _text_or_messages(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _UnusableError("malformed", "one dialogue is a text and the other chat messages")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, answer = _cut_dialogue(chosen)
        other, worse = _cut_dialogue(rejected)
    else:
        prompt, answer = _split_last(chosen)
        other, worse = _split_last(rejected)
    if prompt != other:
        raise _UnusableError("different_prompts")
    if not prompt:
        raise _UnusableError("malformed", "the dialogue has no message before the answer")
    if isinstance(prompt, str) and chat:
        messages = hh_messages(prompt)
        if messages is None:
            raise _UnusableError("malformed", "the dialogue does not begin with 'Human:'")
        prompt = messages
    return (prompt, _spaced(answer), _spaced(worse)) if isinstance(prompt, str) else (prompt, answer, worse)


def _read_tldr(row: Mapping[str, Any], chat: bool) -> tuple[str | Messages, str, str]:
    info, summaries, choice = _field(row, "info"), _field(row, "summaries"), _field(row, "choice")
    if not isinstance(info, Mapping):
        raise _UnusableError("malformed", "'info' is not an object")
    if str(choice) not in ("0", "1"):
        raise _UnusableError("malformed", f"choice={choice!r} is neither 0 nor 1")
    texts: Any = None
    if isinstance(summaries, Mapping):
        # `datasets` may turn a list of objects into an object of lists.
        texts = summaries.get("text")
    elif isinstance(summaries, list):
        texts = [s.get("text") if isinstance(s, Mapping) else None for s in summaries]
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise _UnusableError("malformed", "'summaries' are not two objects with a 'text'")
    if info.get("post"):
        heading = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
    else:
        heading = [("TITLE: ", "title"), ("ARTICLE: ", "article")]
    parts = [label + str(info[name]).strip() for label, name in heading if info.get(name)]
    if not info.get("post") and not info.get("article"):
        raise _UnusableError("malformed", "'info' has neither 'post' nor 'article'")
    best = int(choice)
    return "\n".join([*parts, "TL;DR:"]), _spaced(texts[best]), _spaced(texts[1 - best])


_READERS: dict[str, Callable[[Mapping[str, Any], bool], tuple[str | Messages, str, str]]] = {
    "plain": _read_plain,
    "dialogue": _read_dialogue,
    "tldr": _read_tldr,
}


def _spaced(answer: Any) -> Any:
    return " " + answer.strip() if isinstance(answer, str) and answer.strip() else answer


def _text_or_messages(row: Mapping[str, Any], name: str) -> str | Messages:
    value = _field(row, name)
    if isinstance(value, str):
        return value
    good = isinstance(value, (list, tuple)) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(f), str) for f in ("role", "content"))
        for message in value
    )
    if not good:
        raise _UnusableError(
            "malformed", f"{name!r} is neither a text nor a list of messages with role and content"
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _split_last(messages: Any) -> tuple[Messages, str]:
    if not messages:
        raise _UnusableError("empty")
    if messages[-1]["role"] != "assistant":
        raise _UnusableError("malformed", f"the last message is by {messages[-1]['role']!r}, not 'assistant'")
    return messages[:-1], messages[-1]["content"]


def _cut_dialogue(text: str) -> tuple[str, str]:
    """A dialogue's text up to the last assistant's colon, and the answer after it."""
    before, mark, answer = text.rpartition(_ASSISTANT)
    if not mark or _HUMAN in answer:
        raise _UnusableError("malformed", "the dialogue does not end with an assistant's turn")
    return before + mark, answer.strip()


def read_rows(source: Any, split: str = "train") -> Iterator[Any]:
    """The source's rows, as `load_pairs` takes them; one that cannot be parsed is a text that says why."""
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Mapping):
            raise RGTGError(f"the data set has the splits {', '.join(map(repr, source))}: pass one of them")
        return iter(source)
    if not os.fspath(source):
        raise RGTGError("the data's name is empty: name a file, or a data set of Hugging Face")
    path = Path(source)
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if suffix in _FILES:
        return _from_file(path, suffix)
    if path.is_file():
        raise RGTGError(f"{path} is in no known format: use {', '.join(_FILES)}, or .gz of them")
    return _from_datasets(str(source), split)


def _from_file(path: Path, suffix: str) -> Iterator[Any]:
    try:
        if suffix == ".parquet":
            return iter(_parquet(path))
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RGTGError(f"cannot read {path}: {reason}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RGTGError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    if suffix == ".csv":
        return _from_csv(text, path)
    if suffix == ".json" and text.lstrip().startswith("["):
        try:
            return iter(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise RGTGError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
    return (_from_json(line) for line in text.split("\n") if line.strip())


def _from_json(line: str) -> Any:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else 'nested too deeply'})"
    return row if not isinstance(row, str) else "a row is an object with fields, not a text"


def _from_csv(text: str, path: Path) -> Iterator[Any]:
    # The csv module refuses fields over 128 KiB unless told otherwise.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            yield {name: _cell(value) for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise RGTGError(f"{path} is not CSV: {error}") from error


def _cell(value: Any) -> Any:
    """A CSV cell: chat messages and other structures are JSON in it, everything else is text."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"'):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise RGTGError('Parquet files need pyarrow: pip install "rgtg-fast[train]"') from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise RGTGError(f"{path} is not Parquet: {' '.join(str(error).split())[:120]}") from error


def _from_datasets(name: str, split: str) -> Iterator[Any]:
    path = Path(name)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.suffix):
        raise RGTGError(f"the data {name!r} does not exist: check the path")
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RGTGError(f'{name!r} is no file, and data sets need: pip install "rgtg-fast[train]"') from error
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        why = " ".join(str(error).split())[:160]
        raise RGTGError(f"no data set {name!r} with a split {split!r} can be loaded: {why}") from error
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise RGTGError(f"the data set {name!r} has the splits {', '.join(loaded)}, not {split!r}")
        loaded = loaded[split]
    return iter(loaded)
