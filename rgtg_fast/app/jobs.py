"""Batch jobs of `rgtg-fast generate`: prompts from a JSON Lines file, answers to another, one row a line.

Every finished row is written and flushed at once, so that whatever ends a run leaves complete rows and at
most one broken last line, which resuming cuts off.
"""

import contextlib
import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

from rgtg_fast.config import Guidance
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.journal import hold

Prompt: TypeAlias = "str | list[dict[str, str]] | list[int]"
# What names a row across runs: its id where it has one, else its line in the prompts file.
Key: TypeAlias = tuple[str, Any]


@dataclass(frozen=True)
class Job:
    """One prompt with everything that decides its answer."""

    line: int
    prompt: Prompt
    guidance: Guidance
    seed: int
    id: str | int | None = None
    strategy: str | None = None  # with its settings, in place of the guidance; None for token by token

    @property
    def key(self) -> Key:
        """The row's name across runs."""
        return ("line", self.line) if self.id is None else ("id", self.id)

    def header(self) -> dict[str, Any]:
        """The fields of an output row that are known before the answer is."""
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
                # A line that is not UTF-8 breaks itself alone: its bytes are kept, to be found by the parser.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
                if text.strip():
                    yield number, text
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RGTGError(f"cannot read {path}: {reason}") from error


def _parse(number: int, text: str, guidance: Guidance, seed: int, field: str) -> Job:
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise RGTGError("not UTF-8")
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise RGTGError(f"not JSON ({reason})") from error
    if not isinstance(row, dict):
        raise RGTGError(f'a row is an object like {{"{field}": "..."}}, not {_kind(row)}')
    if field not in row:
        raise RGTGError(f'no "{field}" in the row (its fields: {", ".join(map(repr, row)) or "none"})')
    prompt = row[field]
    check_prompt(prompt)
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise RGTGError(f"id must be a string or an integer, not {_kind(name)}")
    # A field that is null is as good as absent.
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
        RGTGError: it is none of these, or empty.
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
    """The output of a job: complete rows, each flushed as soon as it is written.

    Args:
        path: the file.
        resume: keep the rows that are there and leave out their jobs.
        overwrite: start anew even if the file has rows.

    Raises:
        RGTGError: the file has rows and neither `resume` nor `overwrite` is given; it is no answer file, is
            being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool) -> None:
        self.path = path
        self.done: dict[Key, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        if path.suffix == ".gz":
            raise RGTGError(
                f"{path}: answers are written as plain JSON Lines, so that rows can be added: drop the .gz"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.exists() else "x+b")
            hold(self._file, path, "name another --output")
            if overwrite:
                self._file.truncate(0)
            elif resume:
                self._read_done()
            elif path.stat().st_size:
                raise RGTGError(
                    f"{path} has rows already: pass --resume to continue it or --overwrite to start anew"
                )
        except OSError as error:
            self.close()
            raise RGTGError(f"cannot write {path}: {error.strerror or error}") from error
        except RGTGError:
            self.close()
            raise

    def _read_done(self) -> None:
        assert self._file is not None
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                # The run was killed while this line was being written.
                break
            end += len(line)
            try:
                row = json.loads(line)
                key = ("id", row["id"]) if "id" in row else ("line", row["line"])
            except (ValueError, TypeError, KeyError) as error:
                raise RGTGError(
                    f"{self.path}:{number} is no row of an earlier run: "
                    "name another --output or pass --overwrite"
                ) from error
            self.done[key] = row
        self._file.seek(end)
        self._file.truncate()

    def remaining(self, jobs: list[Job], run: dict[str, Any]) -> list[Job]:
        """The jobs that have no row yet.

        Args:
            jobs: all jobs.
            run: the settings common to all rows, as they will be written.

        Raises:
            RGTGError: a row was made from another prompt or with other settings: the file would mix two runs.
        """
        for job in jobs:
            row = self.done.get(job.key)
            if row is None:
                continue
            for name, value in {**job.header(), **run}.items():
                if name != "line" and row.get(name) != value:
                    raise RGTGError(
                        f"{self.path}: the row of line {job.line} was made with "
                        f"{name}={_short(row.get(name))} and this run has {_short(value)}: "
                        "name another --output or pass --overwrite"
                    )
        return [job for job in jobs if job.key not in self.done]

    def write(self, key: Key, row: dict[str, Any]) -> None:
        """Adds a row and hands it to the operating system at once.

        Args:
            key: what names the row across runs.
            row: its fields.

        Raises:
            RGTGError: the file cannot be written any more, for instance because the disk is full.
        """
        assert self._file is not None
        try:
            self._file.write(to_json(row).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise RGTGError(
                f"cannot write {self.path}: {error.strerror or error}; "
                "the rows before this one are safe, continue with --resume"
            ) from error
        self.done[key] = row

    def close(self) -> None:
        """Closes the file and ends its lock."""
        if self._file is not None:
            # What could not be flushed was reported when it was written.
            with contextlib.suppress(OSError):
                self._file.close()


def to_json(value: Any) -> str:
    """One line of JSON; numbers that JSON does not know (NaN, infinities) become null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        # Lone surrogates cannot be written as UTF-8.
        return value.encode("utf-8", "replace").decode("utf-8")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
