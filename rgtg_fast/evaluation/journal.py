"""A JSON Lines file that grows by finished rows and survives being killed."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import IO, Any

from rgtg_fast.errors import RGTGError


class Journal:
    """The rows of a JSON Lines file, and a place to add more; each is handed to the operating system at once.

    A last line that a killed run left unfinished is cut off. What is no such row is refused, the file kept as it is.

    Args:
        path: the file; made where it is missing.
        needs: fields that every row has; a row is written with the first of them at its beginning.

    Attributes:
        rows: those that were there, then those that were added.
        truncated: whether an unfinished last line was cut off.

    Raises:
        RGTGError: a row that is none, a second writer, or a file that cannot be written.
    """

    def __init__(self, path: Path, needs: tuple[str, ...]):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.truncated = False
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.exists() else "x+b")
            hold(self._file, path, "use another place")
            self._read(needs)
        except OSError as error:
            self.close()
            raise RGTGError(f"cannot write {path}: {error.strerror or error}") from error
        except RGTGError:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, needs: tuple[str, ...]) -> None:
        assert self._file is not None
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n") and _begins(line, needs[0]):
                self.truncated = True
                break
            end += len(line)
            try:
                row = json.loads(line)
                missing = [name for name in needs if name not in row]
            except (ValueError, TypeError) as error:
                raise RGTGError(
                    f"{self.path}:{number} is no row of such a file: remove that line or use another place"
                ) from error
            if missing or not isinstance(row, dict):
                raise RGTGError(
                    f"{self.path}:{number} has no {missing[0] if missing else 'fields'!r}: remove that line or use "
                    "another place"
                )
            self.rows.append(row)
        self._file.seek(end)
        self._file.truncate()

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row.

        Raises:
            RGTGError: the file cannot be written any more, for instance because the disk is full.
        """
        assert self._file is not None
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise RGTGError(
                f"cannot write {self.path}: {error.strerror or error}; the rows before this one are safe, run again"
            ) from error
        self.rows.append(row)

    def close(self) -> None:
        """Closes the file and ends its lock."""
        if self._file is not None:
            # What could not be flushed was reported when it was written.
            with contextlib.suppress(OSError):
                self._file.close()


def _begins(line: bytes, first: str) -> bool:
    """Whether a line without an end may be the beginning of a row."""
    begin = f'{{"{first}": '.encode()
    return line[: len(begin)] == begin[: len(line)]


def plain(value: Any) -> Any:
    """A value as JSON knows it: numbers that are not finite become null, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def hold(file: IO[bytes], path: Path, instead: str) -> None:
    """Holds an open file against a second writer; the lock ends with the process, however it ends.

    Args:
        path: of the file. instead: what the second writer is told to do.

    Raises:
        RGTGError: another process holds it.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RGTGError(f"{path} is being written by another process: wait for it or {instead}") from error
