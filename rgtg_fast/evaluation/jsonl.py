"""A JSON Lines file that is appended row by row, so that a killed run keeps its finished rows."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from rgtg_fast.errors import RGTGError
from rgtg_fast.files import hold, reason, replacing, still_at

# Characters that JSON allows unescaped but that control a terminal, end a line for some readers, or are not UTF-8.
_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class JsonlWriter:
    """Reads the rows of a JSON Lines file and appends more, each written to the operating system at once.

    A last line that a killed run left unfinished is cut off. Any other invalid line is an error, and the file is
    left as it is.

    Args:
        path: the file; created where it is missing, and removed again where an error ends the run before its first row.
        needs: fields that every row must have; every row begins with the first of them.
        instead: end of an error message: what to do where the file cannot be used.
        again: end of an error message: what to do after a run that failed.
        anew: do not read the rows that are there, and drop them when the first row is added.

    Attributes:
        rows: those that were read, then those that were added.
        truncated: whether an unfinished last line was cut off.

    Raises:
        RGTGError: a line that is not a row, a second writer, or a file that cannot be written.
    """

    def __init__(
        self,
        path: Path,
        needs: tuple[str, ...],
        instead: str = "use another place",
        again: str = "run again",
        anew: bool = False,
    ):
        self.path, self._instead, self._again, self._anew = path, instead, again, anew
        self.rows: list[dict[str, Any]] = []
        self.truncated = False
        self._end = 0
        self._file: io.FileIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made = not path.exists()
            self._file = io.FileIO(path, "x+" if self._made else "r+")
            hold(self._file, path, instead)
            if not anew and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._read(needs)
        except (OSError, ValueError) as error:
            self.close()
            if isinstance(error, RGTGError):
                raise
            raise RGTGError(f"cannot write {path}: {reason(error)}") from error

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *where: object) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            if error is not None and self._made and not self._end and self._file is not None:
                with contextlib.suppress(OSError):
                    if still_at(self.path, self._file):
                        self.path.unlink()
            self.close()

    def _read(self, needs: tuple[str, ...]) -> None:
        assert self._file is not None
        reader = io.BufferedReader(self._file)
        for number, line in enumerate(reader, start=1):
            if not line.endswith(b"\n") and _begins(line, needs[0]):
                self.truncated = True
                break
            self._end += len(line)
            try:
                row = json.loads(line)
                missing = [name for name in needs if name not in row]
            except (ValueError, TypeError, RecursionError) as error:
                raise RGTGError(
                    f"{self.path}:{number} is not a row of such a file: remove that line or {self._instead}"
                ) from error
            if missing or not isinstance(row, dict):
                raise RGTGError(
                    f"{self.path}:{number} has no {missing[0] if missing else 'fields'!r}: remove that line or "
                    f"{self._instead}"
                )
            self.rows.append(row)
        reader.detach()
        self._file.seek(self._end)
        self._file.truncate()

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row.

        Args:
            row: its fields by name.

        Raises:
            RGTGError: the file cannot be written any more, for instance because the disk is full, or it was deleted or
                replaced.
        """
        assert self._file is not None
        self.check_place()
        line = memoryview(to_json(row).encode() + b"\n")
        try:
            self._begin_anew()
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError as error:
            # The next run would cut off half a row; removing it now keeps the file readable for other programs too.
            with contextlib.suppress(OSError):
                self._file.seek(self._end)
                self._file.truncate()
            raise RGTGError(
                f"cannot write {self.path}: {reason(error)}; its {len(self.rows)} finished rows are safe, {self._again}"
            ) from error
        self._end += len(line)
        self.rows.append(row)

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file by one with these rows, completely or not at all.

        Raises:
            RGTGError: the file cannot be written, or it was deleted or replaced.
        """
        assert self._file is not None
        self.check_place()
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(to_json(row).encode() + b"\n" for row in rows))
        replaced, self._file = self._file, io.FileIO(self.path, "r+")
        replaced.close()
        hold(self._file, self.path, self._instead)
        self._end = self._file.seek(0, io.SEEK_END)
        self.rows, self._anew = rows, False

    def finish(self) -> None:
        """Ends a run without an error: with `anew`, the old rows are dropped even if no row was added.

        Raises:
            RGTGError: the file was deleted or replaced.
        """
        if self._file is None:
            return
        self.check_place()
        try:
            self._begin_anew()
        except OSError as error:
            raise RGTGError(f"cannot write {self.path}: {reason(error)}") from error

    def _begin_anew(self) -> None:
        assert self._file is not None
        if self._anew and os.fstat(self._file.fileno()).st_size:
            self._file.truncate(0)
        self._anew = False

    def check_place(self) -> None:
        """Refuses to go on where the file was deleted or replaced; its rows are saved in a file next to its path.

        Raises:
            RGTGError: it was.
        """
        assert self._file is not None
        if still_at(self.path, self._file):
            return
        try:
            number, saved = tempfile.mkstemp(".rescued", f"{self.path.name[:100]}.", self.path.parent)
            self._file.seek(0)
            with os.fdopen(number, "wb") as copy:
                shutil.copyfileobj(self._file, copy)
            rows = f"its rows are in {saved}: move that file back and {self._again}"
        except OSError as error:
            rows = f"its rows could not be saved beside it ({reason(error)})"
        raise RGTGError(f"{self.path} was deleted or replaced while this run was writing it; {rows}")

    def close(self) -> None:
        """Closes the file and releases its lock."""
        if self._file is not None:
            # A failed write has been reported already.
            with contextlib.suppress(OSError):
                self._file.close()


def _begins(line: bytes, first: str) -> bool:
    """Whether a line without a newline may be the beginning of a row."""
    begin = f'{{"{first}": '.encode()
    return line[: len(begin)] == begin[: len(line)]


def to_json(value: Any) -> str:
    """A value as one line of JSON, with control characters and lone surrogates escaped."""
    line = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def plain(value: Any) -> Any:
    """A value of JSON's own types: numbers that are not finite become None, tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
