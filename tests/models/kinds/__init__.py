"""Tiny saved models of every kind that people bring: each is served exactly, or refused by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The tables of docs/models.md.
GROUPS = ("language model", "reward model", "file format")


@dataclass(frozen=True)
class Sources:
    """What a user passes for a saved model: `--lm LM --reward REWARD` and further options.

    Attributes:
        lm: the language model's path.
        reward: the reward, as `--reward` takes it.
        options: further command-line options, such as `("--trust-remote-code",)`.
    """

    lm: str
    reward: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A row of the table of models in docs/models.md.

    Attributes:
        name: what it is, as the table says it: "Mistral v0.1 (sliding window)".
        group: "language model", "reward model" or "file format".
        build: saves tiny models below a folder and returns what a user would pass.
        served: how it is served, for the table; empty where it is refused.
        refused: a part of the message where it is refused; empty where it is served.
        needs: an importable package without which the test is skipped.
    """

    name: str
    group: str
    build: Callable[[Path], Sources]
    served: str = ""
    refused: str = ""
    needs: str = ""


def all_kinds() -> list[Kind]:
    """The kinds of all modules of this package, by group and then in the order of modules and lists."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [kind for module in modules for kind in getattr(module, "KINDS", [])]
    return sorted(found, key=lambda kind: GROUPS.index(kind.group))
