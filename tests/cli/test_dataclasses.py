"""A command is a dataclass: what its fields become on the command line, and which values it gets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from rgtg_fast.cli.options import argument, include, options_of, register
from rgtg_fast.cli.train import Train
from rgtg_fast.cli.train_policy import TrainPolicy
from rgtg_fast.config import option


@dataclass(frozen=True, kw_only=True)
class Shared:
    first: int = option("The first.", 1, "Shared", min=0)
    second: bool = option("The second.", True)
    third: float = option("The third.", 3.0)
    internal: int = 7


@dataclass(frozen=True, kw_only=True)
class WriteDown:
    """Write down what was given."""

    text: str = argument("A text.")
    path: Path | None = option("A path.", None, flags=("--to", "--into"))
    shared: Shared = include("third first", first=5)
    early: list[str] | None = option("Several.", None, before="first", shown="nothing")
    quick: bool = option("A switch.", False)
    cautious: bool | None = option("A switch with a third value.", None)
    needed: int = option("It has no default.")

    def run(self) -> None:
        given.append(self)


given: list[WriteDown] = []


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.callback()(lambda: None)
    register(made, WriteDown)
    given.clear()
    return made


def test_the_order_is_that_of_the_fields() -> None:
    names = [each.name for each in options_of(WriteDown)]
    assert names == ["text", "path", "third", "early", "first", "quick", "cautious", "needed"]


def test_values_reach_the_fields(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["write-down", "hello", "--needed", "2"]).exit_code == 0
    assert given == [WriteDown(text="hello", shared=Shared(first=5, third=3.0), needed=2)]
    line = "write-down hello --needed 2 --into a/b --early x --early y --quick --no-cautious --first 9 --third 0.5"
    assert CliRunner().invoke(app, line.split()).exit_code == 0
    assert given[1] == WriteDown(
        text="hello",
        path=Path("a/b"),
        shared=Shared(first=9, third=0.5),
        early=["x", "y"],
        quick=True,
        cautious=False,
        needed=2,
    )


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        "--needed 2",
        "hello --needed x",
        "hello --needed 2 --first -1",
        "hello --needed 2 --no-quick",
        "hello --needed 2 --second",
        "hello --needed 2 --internal 3",
    ],
)
def test_what_is_refused(app: typer.Typer, line: str) -> None:
    assert CliRunner().invoke(app, ["write-down", *line.split()]).exit_code == 2
    assert given == []


def test_help_has_what_the_fields_say(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["write-down", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for part in (
        "Write down what was given.",
        "--to",
        "--into",
        "A path.",
        "[default: 5]",
        "(nothing)",
        "Shared",
    ):
        assert part in text
    assert "--internal" not in text
    assert text.index("--third") < text.index("--early")


def test_training_commands_have_every_option_of_their_configuration() -> None:
    for command in (Train, TrainPolicy):
        config = get_type_hints(command)["config"]
        offered = {each.name: each.default for each in options_of(command)}
        for each in options_of(config):
            assert offered[each.name] == each.default, each.name
        # The warm-up is set by Python alone.
        assert {f.name for f in fields(config)} - set(offered) == {"warmup_ratio"}
