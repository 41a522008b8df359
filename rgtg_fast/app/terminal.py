"""What goes to the terminal: results to stdout, everything else to stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from rgtg_fast.app.jobs import to_json


def complain(message: str) -> None:
    """One line on stderr, never wrapped, so that it can be searched for."""
    sys.stderr.write(f"rgtg-fast: error: {' '.join(message.split())}\n")
    sys.stderr.flush()


def note(message: str) -> None:
    """One dim line on stderr."""
    Console(stderr=True).print(escape(message), style="dim", soft_wrap=True, highlight=False)


def print_line(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """A value as one line of JSON on stdout."""
    print_line(to_json(value))


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is going on and gives a function to change it; off a terminal they are lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield note
        return
    with console.status(escape(message)) as shown:
        yield lambda text: shown.update(escape(text))
