"""Output of the commands: results to stdout, everything else to stderr.

Texts of models and users are data: nothing in them is interpreted as markup, and on a terminal control characters are
shown by their codes. A pipe or a file gets texts unchanged.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.jsonl import plain, to_json
from rgtg_fast.files import reason
from rgtg_fast.plaintext import printable

# The exit code after an error that the user can fix.
USER_ERROR = 2


class OutputError(RGTGError):
    """Stdout cannot be written: the disk is full, the reader has gone, or it was closed from the start."""


class _Stream:
    """A standard stream whose failing writes raise `OutputError` (stdout) or are ignored (stderr)."""

    def __init__(self, file: Any, fatal: bool):
        # A rich progress bar replaces the stream by a proxy.
        self._file, self._fatal = getattr(file, "rich_proxied_file", file), fatal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def isatty(self) -> bool:
        return self._file is not None and self._file.isatty()

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, name: str, *args: str) -> None:
        try:
            getattr(self._file, name)(*args)
        except (OSError, ValueError, AttributeError) as error:
            if self._fatal:
                raise OutputError(f"cannot write to stdout: {reason(error)}") from error


class _Console(Console):
    """A console that interprets no markup and shows control characters by their codes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text) if self.is_terminal else text, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and self.is_terminal:
                segment = Segment(printable(segment.text), segment.style)
            yield segment


def console(stderr: bool = False) -> Console:
    """A console for stdout or stderr; strings are printed as plain text, styles need a `Text`."""
    stream: Any = _Stream(sys.stderr, False) if stderr else _Stream(sys.stdout, True)
    return _Console(file=stream, stderr=stderr, markup=False, highlight=False, emoji=False)


def complain(message: str) -> None:
    """Prints an error as one line on stderr, without wrapping it."""
    stream = _Stream(sys.stderr, False)
    stream.write(f"rgtg-fast: error: {printable(' '.join(message.split()))}\n")
    stream.flush()


def note(message: str) -> None:
    """Prints a dim line on stderr."""
    console(stderr=True).print(Text(printable(message), style="dim"), soft_wrap=True)


def write(text: str) -> None:
    """Prints a text on stdout and flushes it.

    Raises:
        OutputError: stdout cannot be written.
    """
    stream = _Stream(sys.stdout, True)
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def print_line(text: str) -> None:
    """Prints a line on stdout."""
    write(text + "\n")


def print_json(value: Any) -> None:
    """Prints a value as one line of JSON on stdout."""
    line = to_json(value)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(plain(value), allow_nan=False)
    print_line(line)


def read_stdin() -> str:
    """Reads all of stdin.

    Raises:
        RGTGError: it is closed, cannot be read, or is not text.
    """
    if sys.stdin is None:
        raise RGTGError("`-` reads stdin, which is closed: give the text itself, or pipe it in")
    try:
        return sys.stdin.read()
    except (OSError, ValueError) as error:
        why = f"not {error.encoding}" if isinstance(error, UnicodeDecodeError) else reason(error)
        raise RGTGError(f"cannot read stdin ({why}): give the text itself, or pipe it in as UTF-8") from error


@contextmanager
def streams() -> Iterator[None]:
    """Prepares stdout and stderr for a command, and flushes stdout at its end.

    A character that the encoding lacks is written by its code. A closed standard stream is replaced by the null device,
    so that no other file gets its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The system gives the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout is not None:
            _Stream(sys.stdout, True).flush()
    except OutputError:
        _abandon_stdout()
        raise


def _abandon_stdout() -> None:
    """Redirects stdout to the null device: Python would try to flush it again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Shows a status on stderr and yields a function that changes it.

    Where stderr is not a terminal, each change is printed as a line.
    """
    shown_on = console(stderr=True)
    if not shown_on.is_terminal:
        yield note
        return
    with shown_on.status(Text(printable(message))) as shown:
        yield lambda text: shown.update(Text(printable(text)))
