"""Batch jobs of `rgtg-fast generate`: prompts from a JSON Lines file, answers to another, one row a line.

Every finished row is written at once. A run that is interrupted leaves complete rows and at most one incomplete last
line, which --resume cuts off.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rgtg_fast.config import Guidance
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.jsonl import JsonlWriter, plain
from rgtg_fast.files import reason, same_file

Prompt: TypeAlias = "str | list[dict[str, str]] | list[int]"
# Identifies a row across runs: ("id", its id), or ("line", its line in the prompts file) where it has none.
Key: TypeAlias = tuple[str, Any]
_INSTEAD = "name another --output"


@dataclass(frozen=True)
class Job:
    """One prompt with the settings that decide its answer.

    Attributes:
        line: in the prompts file, from 1.
        prompt: a text, chat messages or token ids.
        guidance: guidance of every token.
        seed: seed of the sampling noise.
        id: the row's own name, None where it has none.
        strategy: in place of the guidance, with its settings; None for token by token.
    """

    line: int
    prompt: Prompt
    guidance: Guidance
    seed: int
    id: str | int | None = None
    strategy: str | None = None

    @property
    def key(self) -> Key:
        """What identifies the row across runs."""
        return ("line", self.line) if self.id is None else ("id", self.id)

    def header(self) -> dict[str, Any]:
        """The fields of the output row that come before the answer."""
        name = {"line": self.line} if self.id is None else {"line": self.line, "id": self.id}
        g = self.guidance
        settings: dict[str, Any] = {
            "k": g.k,
            "beta": g.beta,
            "temperature": g.temperature,
            "support": g.support,
        }
        if g.weights is not None:
            settings["weights"] = g.weights
        if g.gate_entropy is not None:
            settings["gate_entropy"] = g.gate_entropy
        if self.strategy is not None:
            settings = {"strategy": self.strategy}
        return {**name, "prompt": self.prompt, "seed": self.seed, **settings}


def read_prompts(
    path: Path, guidance: Guidance, seed: int, field: str, complain: Callable[[str], None]
) -> tuple[list[Job], int]:
    """Reads a prompts file (plain or gzip), one JSON object a line.

    A row has the prompt (a text, chat messages or token ids) under `field` and may have `id`, `seed`, `k`,
    `beta`, `temperature`, `weights` and `gate_entropy`. Broken lines are reported and skipped; empty lines are skipped.

    Args:
        path: the file.
        guidance: the guidance of rows that name none.
        seed: the seed of rows that name none.
        field: the name of the prompt's field.
        complain: receives one line of text for every broken line.

    Returns:
        The jobs in file order and the number of broken lines.

    Raises:
        RGTGError: the file cannot be read.
    """
    jobs: list[Job] = []
    seen: dict[Key, int] = {}
    broken = 0
    for number, text in _lines(path):
        try:
            job = _parse(number, text, guidance, seed, field)
            if job.key in seen:
                raise RGTGError(f"id {job.id!r} was already used on line {seen[job.key]}")
        except RGTGError as error:
            complain(f"{path}:{number}: {error}")
            broken += 1
            continue
        seen[job.key] = number
        jobs.append(job)
    return jobs, broken


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                # A line that is not UTF-8 must not end the run: its bytes are kept, and `_parse` refuses it.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
                if text.strip():
                    yield number, text
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot read {path}: {reason(error)}") from error


def _parse(number: int, text: str, guidance: Guidance, seed: int, field: str) -> Job:
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise RGTGError("not UTF-8")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        # A number with thousands of digits raises a plain ValueError.
        why = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
        raise RGTGError(f"not JSON ({why})") from error
    if not isinstance(row, dict):
        raise RGTGError(f'a row is an object like {{"{field}": "..."}}, not {_kind(row)}')
    if field not in row:
        raise RGTGError(f'no "{field}" in the row (its fields: {", ".join(map(repr, row)) or "none"})')
    prompt = row[field]
    check_prompt(prompt)
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise RGTGError(f"id must be a string or an integer, not {_kind(name)}")
    # null counts as absent.
    own = {
        f: row[f] for f in ("k", "beta", "temperature", "weights", "gate_entropy") if row.get(f) is not None
    }
    row_seed = seed if row.get("seed") is None else row["seed"]
    if isinstance(row_seed, bool) or not isinstance(row_seed, int):
        raise RGTGError(f"seed={row_seed!r} is not a whole number")
    return Job(line=number, prompt=prompt, guidance=replace(guidance, **own), seed=row_seed, id=name)


def check_prompt(prompt: Any) -> None:
    """Checks that a prompt is a text, chat messages or token ids, and not empty.

    Raises:
        RGTGError: it is not one of these, or empty.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise RGTGError("the prompt is empty: give it at least one character")
        return
    if not isinstance(prompt, list) or not prompt:
        raise RGTGError(
            f"a prompt is a text, a list of chat messages or a list of token ids, not {_kind(prompt)}"
        )
    if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return
    for message in prompt:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(f), str) for f in ("role", "content")
        ):
            raise RGTGError('a chat message is an object with the texts "role" and "content"')


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, (list, str)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty text"
    return names.get(type(value), f"{value!r}")


class AnswerFile:
    """The output file of a run, to which each finished row is written at once.

    A context manager: a run that fails before its first row leaves no new file, and rows to be overwritten are kept
    until the first new one is written. Several processes write a part each (`part_of`), and their rows are merged at
    the end; where that run was interrupted, its parts belong to the file.

    Args:
        path: the file.
        resume: keep the rows of an earlier run and skip their jobs.
        overwrite: replace the rows of an earlier run.
        source: the prompts file, None if there is none.

    Attributes:
        done: the finished rows.

    Raises:
        RGTGError: the file has rows and neither `resume` nor `overwrite` is given; it is not a file of answers, is the
            prompts file, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool, source: Path | None = None) -> None:
        self.path = path
        self.done: dict[Key, dict[str, Any]] = {}
        if path.suffix == ".gz":
            raise RGTGError(
                f"{path}: answers are written as plain JSON Lines, so that rows can be added: drop the .gz"
            )
        if source is not None and same_file(path, source):
            raise RGTGError(f"--output {path} is the file of --input ({source}): name another --output")
        # Parts that an interrupted run of several processes has left.
        self._parts = _parts_of(path)
        if not (resume or overwrite) and (_size(path) or self._parts):
            raise RGTGError(
                f"{path if _size(path) else self._parts[0]} has rows already: pass --resume to continue it or "
                "--overwrite to start anew"
            )
        again = "continue with --resume"
        self._resume = resume
        self._journal = JsonlWriter(path, ("line",), _INSTEAD, again, anew=overwrite)
        try:
            self.done = _by_key(self._journal.rows, path)
        except RGTGError:
            self._journal.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._journal.__exit__(*error)

    def remaining(self, jobs: list[Job], run: dict[str, Any]) -> list[Job]:
        """The jobs that have no row yet; rows in parts of an earlier run are taken over first.

        Args:
            jobs: all jobs.
            run: the settings that all rows have in common.

        Raises:
            RGTGError: a row has another prompt or other settings, so that the file would mix two runs.
        """
        found: dict[Key, dict[str, Any]] = {}
        if self._resume:
            for part in self._parts:
                found |= rows_of(part)
        for job in jobs:
            row = self.done.get(job.key) or found.get(job.key)
            if row is None:
                continue
            for name, value in plain({**job.header(), **run}).items():
                if name != "line" and row.get(name) != value:
                    raise RGTGError(
                        f"{self.path}: the row of line {job.line} was made with "
                        f"{name}={_short(row.get(name))} and this run has {_short(value)}: "
                        "name another --output or pass --overwrite"
                    )
        if self._resume:
            for key, row in found.items():
                if key not in self.done:
                    self._journal.add(row)
                    self.done[key] = row
            self._remove_parts()
        return [job for job in jobs if job.key not in self.done]

    def write(self, key: Key, row: dict[str, Any]) -> None:
        """Writes a finished row.

        Args:
            key: identifies the row across runs.
            row: its fields.

        Raises:
            RGTGError: the file cannot be written any more, for example because the disk is full.
        """
        if self._parts:
            self._remove_parts()
        self._journal.add(row)
        self.done[key] = row

    def begin(self) -> None:
        """Rows that are to be overwritten are dropped now: other processes write the new ones.

        Raises:
            RGTGError: the file cannot be written.
        """
        self._journal.finish()
        self._remove_parts()

    def merge(self, counts: list[int], order: list[Key]) -> None:
        """Adds the rows of all parts and sorts the file; the parts are removed.

        Args:
            counts: rows that each process has written.
            order: of the rows; others come last.

        Raises:
            RGTGError: a part is not to be seen here, or the file cannot be written.
        """
        places = {key: place for place, key in enumerate(order)}
        self._parts = [part_of(self.path, rank) for rank in range(len(counts))]
        for part, count in zip(self._parts, counts, strict=True):
            rows = rows_of(part) if part.exists() else {}
            if len(rows) != count:
                raise RGTGError(
                    f"{part} has {len(rows)} of the {count} rows that its process has written: put --output on a file "
                    "system that all machines share, bring the parts there and continue with --resume"
                )
            self.done |= rows
        rows = sorted(self.done.items(), key=lambda item: places.get(item[0], len(places)))
        self._journal.rewrite([row for _, row in rows])
        self._remove_parts()

    def _remove_parts(self) -> None:
        for part in self._parts:
            part.unlink(missing_ok=True)
        self._parts = []

    def check_place(self) -> None:
        """Checks that the file has not been deleted or replaced.

        Raises:
            RGTGError: it has.
        """
        self._journal.check_place()


def part_of(path: Path, rank: int) -> Path:
    """The file to which one of several processes writes its rows of an output file."""
    return path.with_name(f"{path.name}.rank-{rank}")


def _parts_of(path: Path) -> list[Path]:
    """The parts of an output file that exist, by rank."""
    begin = part_of(path, 0).name.removesuffix("0")
    try:
        parts = [part for part in path.parent.iterdir() if part.name.startswith(begin)]
    except (OSError, ValueError):
        return []
    ranks = {part: part.name.removeprefix(begin) for part in parts}
    return sorted((part for part in parts if ranks[part].isdecimal()), key=lambda part: int(ranks[part]))


def rows_of(part: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a part; an unfinished last line is cut off.

    Raises:
        RGTGError: it is not a file of answers, or is being written.
    """
    journal = JsonlWriter(part, ("line",), _INSTEAD)
    try:
        return _by_key(journal.rows, part)
    finally:
        journal.close()


def _by_key(rows: list[dict[str, Any]], path: Path) -> dict[Key, dict[str, Any]]:
    found: dict[Key, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        key = ("id", row["id"]) if "id" in row else ("line", row["line"])
        if not isinstance(key[1], (str, int)):
            raise RGTGError(f"{path}:{number} is not a row of an earlier run: name another --output")
        found[key] = row
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
