"""Texts of models and users are data on the terminal: neither markup nor control sequences."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from rgtg_fast.cli import terminal
from rgtg_fast.cli.explain import page

NASTY = "\x1b]0;owned\x07 \x9b31m \u202e [red]x[/] :smile: \r"
SHOWN = r"\x1b]0;owned"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    terminal.print_line(NASTY)
    terminal.print_json({NASTY: NASTY})
    table = Table("[bold]" + NASTY, title=NASTY)
    table.add_row(NASTY)
    for shown in (NASTY, Text(NASTY), table):
        terminal.console().print(shown)
    text = screen.getvalue()
    assert not any(character in text for character in "\x1b\x9b\u202e\r\x07")
    # One in the first line, two keys and values, two prints, and three in the table with its title.
    assert text.count("[red]x[/] :smile:") == 8
    assert text.count(SHOWN) == 6
    (line,) = (line for line in text.splitlines() if line.startswith("{"))
    assert json.loads(line) == {NASTY: NASTY}


def test_a_pipe_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.write("a\x1b[31mb\n")
    assert capsys.readouterr().out == "a\x1b[31mb\n"


def test_messages_are_lines_without_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.complain(f"no such file {NASTY}\nsecond")
    terminal.note(NASTY)
    with terminal.status(f"[/]{NASTY}") as progress:
        progress(NASTY)
    err = capsys.readouterr().err
    assert not any(character in err for character in "\x1b\x9b\u202e\r\x07")
    assert err.count("[red]x[/] :smile:") == 3
    assert err.splitlines()[0].startswith("rgtg-fast: error: no such file \\x1b]0;owned")


def test_markup_in_the_names_of_guides(
    run: Callable, tmp_path: Path, lm: str, rm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("[red]rm").symlink_to(rm)
    Path("g[").mkdir()
    Path("g[/b]").symlink_to(rm)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(3))
    )
    outcome = run("accuracy", "--lm", lm, "--reward", "[red]rm", "--reward", "g[/b]", "--data", pairs)
    assert outcome.code == 0, outcome.err
    assert "[red]rm" in outcome.out
    assert "g[/b]" in outcome.out
    error = run("generate", "hi", "--lm", "[/]nowhere[bold]").error
    assert "[/]nowhere[bold]" in error


def test_a_page_shows_what_would_steer_it() -> None:
    text = page("</title><script>x</script>\u202e", [], lambda ids: "", {"model": '"><b>\x1b'})
    assert "<script>" not in text
    assert "<b>" not in text
    assert "\u202e" not in text
    assert "&lt;/title&gt;" in text
