"""What several command-line tests use."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rgtg_fast.cli import main as cli

CONTEXT = 256
# Seconds after which a process counts as one that hangs, many times what any of them takes.
HANGS = 1200


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error lines on stderr; a traceback is never among what a user sees."""
        assert "Traceback" not in self.err, self.err
        return [line for line in self.err.splitlines() if line.startswith("rgtg-fast: error: ")]

    @property
    def error(self) -> str:
        """The one line that a user error prints."""
        assert self.code == 2, (self.code, self.out, self.err)
        (line,) = self.errors
        return line

    @property
    def rows(self) -> list[Any]:
        """The JSON values on stdout, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Outcome]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command line in this process."""

    def call(*args: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "rgtg_fast", *map(str, args)]


# Sends the process a signal from within, when it asks for an answer after so many.
ENDED = """
import os, signal, sys
from rgtg_fast import RewardGuidedDecoder
from rgtg_fast.cli import main as cli

method, after, number, *arguments = sys.argv[1:]
decode, count = getattr(RewardGuidedDecoder, method), 0

def end_then(value):
    global count
    count += 1
    if count > int(after):
        os.kill(os.getpid(), int(number))
    return value

if method == "iterate":
    def ended(self, *args, **kwargs):
        return (end_then(row) for row in decode(self, *args, **kwargs))
else:
    def ended(self, *args, **kwargs):
        return decode(end_then(self), *args, **kwargs)

setattr(RewardGuidedDecoder, method, ended)
# Tests that run in the background of a shell would hand on that an interrupt is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(arguments)
"""


def run_until(method: str, after: int, ending: signal.Signals, *args: object) -> Outcome:
    """Runs a command in a process that ends itself by a signal.

    Args:
        method: `iterate`, whose rows are counted, or `generate`, whose calls are.
        after: how many of them are done before the signal comes.
        ending: SIGKILL or SIGINT.
    """
    line = [sys.executable, "-c", ENDED, method, str(after), str(int(ending)), *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=HANGS)
    return Outcome(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
