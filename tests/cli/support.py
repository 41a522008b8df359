"""What several command-line tests use."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = 256


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


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "rgtg_fast", *map(str, args)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
