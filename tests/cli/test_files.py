"""Nothing is lost: what a job overwrites, continues and leaves, whatever ends it."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rgtg_fast.bundled import embedded
from rgtg_fast.cli import main as cli
from rgtg_fast.cli import terminal
from rgtg_fast.decoder import RewardGuidedDecoder
from tests.cli.support import CONTEXT, read_rows

SHORT = ("--max-new-tokens", 3)


@pytest.mark.parametrize(
    "change",
    [
        ("--lm", "/proc/no/such/model"),
        ("--reward", "/proc/no/such/model"),
        ("--max-new-tokens", CONTEXT),
        ("--k", 0),
        ("--device", "toaster"),
        ("--stop", ""),
        ("--input", "/proc/no/such/file"),
    ],
)
def test_overwrite_keeps_the_old_rows_until_there_are_new_ones(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, change: tuple
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"line": 1, "text": "old"}\n')
    source = prompts_file({"prompt": "one"})
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", "none", *SHORT)
    assert run(*args, "--overwrite", *change).code == 2
    assert output.read_text() == '{"line": 1, "text": "old"}\n'
    new = tmp_path / "new.jsonl"
    assert run(*args, "--output", new, *change).code == 2
    assert not new.exists()


def test_the_prompts_are_never_the_output(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompts_file({"prompt": "one"})
    before = source.read_bytes()
    link, hard = tmp_path / "link.jsonl", tmp_path / "hard.jsonl"
    link.symlink_to(source)
    hard.hardlink_to(source)
    monkeypatch.chdir(tmp_path)
    for output in (source, link, hard, source.name, tmp_path / "." / ".." / tmp_path.name / source.name):
        for option in ("--overwrite", "--resume"):
            args = ("generate", "--input", source, "--output", output, option, "--lm", lm, *SHORT)
            assert "is the file of --input" in run(*args).error
    assert source.read_bytes() == before


def test_rows_with_weights_are_resumed(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str
) -> None:
    rows = [{"prompt": "one", "weights": [0.5, 1]}, {"prompt": "two", "weights": [1, 0], "id": "\ud83d"}]
    source, output = prompts_file(*rows), tmp_path / "out.jsonl"
    guide = f"mixture:0.7*{rm}+0.3*contrastive"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", guide, *SHORT)
    assert run(*args).code == 0
    before = output.read_bytes()
    assert run(*args, "--resume").code == 0
    assert output.read_bytes() == before
    prompts_file({"prompt": "one", "weights": [0.5, 2]})
    assert "weights" in run(*args, "--resume").error


Step = Callable[[], None]


@pytest.fixture
def after_first_row(monkeypatch: pytest.MonkeyPatch) -> Callable[[Step], None]:
    """Lets something happen once the first row of a job has been written."""
    iterate = RewardGuidedDecoder.iterate

    def install(step: Step) -> None:
        def slow(self: Any, prompts: Any, *args: Any, **options: Any) -> Iterator[Any]:
            rows = iterate(self, prompts, *args, **options)
            if not isinstance(prompts, list) or len(prompts) < 2:
                return rows

            def stopping() -> Iterator[Any]:
                for number, row in enumerate(rows):
                    if number == 1:
                        step()
                    yield row

            return stopping()

        monkeypatch.setattr(RewardGuidedDecoder, "iterate", slow)

    return install


@pytest.fixture
def job(prompts_file: Callable, tmp_path: Path, lm: str) -> tuple[Path, tuple]:
    source, output = prompts_file(*({"prompt": f"prompt {n}"} for n in range(4))), tmp_path / "out.jsonl"
    args = (
        "generate",
        "--input",
        source,
        "--output",
        output,
        "--lm",
        lm,
        "--reward",
        "none",
        "--max-batch",
        1,
    )
    return output, (*args, *SHORT)


def test_an_output_that_is_deleted_under_a_run_is_said(
    run: Callable, job: tuple, after_first_row: Callable, tmp_path: Path
) -> None:
    output, args = job
    deletions = iter([output.unlink])
    after_first_row(lambda: next(deletions, lambda: None)())
    error = run(*args).error
    assert "was deleted or replaced" in error
    (saved,) = tmp_path.glob("*.rescued")
    assert str(saved) in error
    assert [row["line"] for row in read_rows(saved)] == [1]
    saved.rename(output)
    assert run(*args, "--resume").code == 0
    assert [row["line"] for row in read_rows(output)] == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals there")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_a_job_in_order(
    run: Callable, job: tuple, after_first_row: Callable, name: str, code: int
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    # Tests that run in the background of a shell would hand on that an interrupt is ignored.
    signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        output, args = job
        after_first_row(lambda: os.kill(os.getpid(), number))
        outcome = run(*args)
    finally:
        signal.signal(number, before)
    assert outcome.code == code
    assert f"interrupted: 1 finished rows are in {output}" in outcome.err.replace("\n", "")
    assert [row["line"] for row in read_rows(output)] == [1]


class Full(io.StringIO):
    """A stream whose disk is full, or whose reader has gone, after some characters."""

    def __init__(self, room: int, error: OSError):
        super().__init__()
        self.room, self.error = room, error

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.room:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")]
)
def test_stdout_that_takes_no_more_is_one_line(
    run: Callable, job: tuple, monkeypatch: pytest.MonkeyPatch, lm: str, rm: str, error: OSError
) -> None:
    model = ("--lm", lm, "--reward", rm, *SHORT)
    commands: list[tuple] = [("generate", "hello", *model), ("generate", "hello", "--stream", *model)]
    commands += [
        ("generate", "hello", "--json", *model),
        ("explain", "hello", *model),
        ("methods",),
        ("env", "--json"),
    ]
    for command in commands:
        monkeypatch.setattr(sys, "stdout", Full(0, error))
        outcome = run(*command)
        assert outcome.error.startswith(f"rgtg-fast: error: cannot write to stdout: {error.strerror}")
    source = next(args[n + 1] for args in (job[1],) for n, arg in enumerate(args) if arg == "--input")
    monkeypatch.setattr(sys, "stdout", Full(400, error))
    outcome = run("generate", "--input", source, "--max-batch", 1, "--lm", lm, "--reward", "none", *SHORT)
    assert "1 rows were printed: name --output" in outcome.error


def test_any_encoding_of_stdout_and_stderr(
    run: Callable, monkeypatch: pytest.MonkeyPatch, lm: str, rm: str
) -> None:
    args = ("explain", "naïve 😀", "--lm", lm, "--reward", rm, "--max-new-tokens", 2)
    for encoding in ("ascii", "latin-1"):
        for more in ((), ("--json",)):
            raw = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
            outcome = run(*args, *more)
            assert outcome.code == 0, outcome.err
            if more:
                assert json.loads(raw.getvalue().decode("ascii"))["prompt"] == "naïve 😀"


def test_stdin_that_is_closed_or_no_text(run: Callable, monkeypatch: pytest.MonkeyPatch, lm: str) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for command in (("generate", "-"), ("explain", "-"), ("token-rewards", "hi", "-")):
        assert "stdin" in run(*command, "--lm", lm).error
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert "cannot read stdin (not utf-8)" in run("generate", "-", "--lm", lm).error


def test_a_row_that_cannot_be_read_costs_no_other(run: Callable, tmp_path: Path, lm: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "seed": ' + "1" * 5000 + '}\n{"prompt": "c"}\n')
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", "none", *SHORT)
    assert ":2: not JSON" in run(*args).error
    assert [row["line"] for row in read_rows(output)] == [1, 3]


def test_what_a_tokenizer_makes_of_a_row_costs_no_other(
    run: Callable, job: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = RewardGuidedDecoder.iterate

    def picky(self: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        if "prompt 2" in str(prompts) and "prompt 1" not in str(prompts):
            raise TypeError("TextEncodeInput must be")
        return iterate(self, prompts, *args, **options)

    monkeypatch.setattr(RewardGuidedDecoder, "iterate", picky)
    output, args = job
    assert "line 3: the prompt cannot be used (TypeError: TextEncodeInput must be)" in run(*args).error
    assert [row["line"] for row in read_rows(output)] == [1, 2, 4]


def test_a_conversion_clears_away_what_a_killed_one_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setenv("RGTG_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "weights_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: object())
    (tmp_path / ".converting-dead" / embedded.FOLDER).mkdir(parents=True)
    (tmp_path / embedded.LOCK).write_text("")
    assert embedded.default_model() == tmp_path / embedded.FOLDER
    assert [file.name for file in tmp_path.iterdir()] == [embedded.FOLDER]


def test_a_disk_that_is_full_for_a_conversion_is_one_line(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import safetensors

    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "weights_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", fail)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: object())
    assert "RGTG_CACHE" in run("explain", "hello").error
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_on_stdout_are_not_taken_by_the_progress_bar(
    run: Callable, job: tuple, monkeypatch: pytest.MonkeyPatch, lm: str
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = next(args[n + 1] for args in (job[1],) for n, arg in enumerate(args) if arg == "--input")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(SystemExit):
        cli.main(
            ["generate", "--input", str(source), "--lm", lm, "--reward", "none", "--max-new-tokens", "2"]
        )
    assert [json.loads(line)["line"] for line in out.getvalue().splitlines()] == [1, 2, 3, 4]
    assert terminal.console(stderr=True).is_terminal
