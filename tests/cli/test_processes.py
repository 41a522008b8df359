"""`generate` in several processes: the rows of one, whatever their number, and whichever of them is killed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import typer

from rgtg_fast.cli.generate import Generate
from rgtg_fast.cli.jobs import part_of
from rgtg_fast.cli.processes import _Share
from rgtg_fast.cli.session import Decoding, Setup
from rgtg_fast.errors import RGTGError
from rgtg_fast.processes import FailedElsewhereError, Place, device_of_process
from tests.cli.support import ENDED, HANGS, Outcome, environment, read_rows

# One row at a time, so that one process too writes the rows in the order of the prompts.
LENGTHS = {"max_new_tokens": 6, "max_batch": 1}
SHORT = ("--max-new-tokens", 6, "--max-batch", 1)
PROMPTS = [{"prompt": "hello " * (i % 3) + str(i), "seed": i} for i in range(7)]
PROMPTS[3]["id"] = "three"


class ThreadGroup:
    """A `ProcessGroup` whose processes are threads of this one."""

    def __init__(self, place: Place, shared: dict[str, Any], barrier: threading.Barrier):
        self.place, self._shared, self._barrier = place, shared, barrier

    def together(self, work: Callable[[], Any]) -> list[Any]:
        try:
            outcome = (work(), None)
        except RGTGError as error:
            outcome = (None, str(error))
        self._shared[self.place.rank] = outcome
        self._barrier.wait()
        outcomes = [self._shared[rank] for rank in range(self.place.count)]
        self._barrier.wait()
        for _, error in outcomes:
            if error is not None:
                raise RGTGError(error) if self.place.main else FailedElsewhereError(error)
        return [result for result, _ in outcomes]

    def scatter(self, work: Callable[[], Sequence[Any]]) -> Any:
        return self.together(lambda: work() if self.place.main else None)[0][self.place.rank]


def in_threads(count: int, **options: Any) -> list[BaseException | None]:
    """Runs the shares of a command; how each of them ended."""
    shared: dict[str, Any] = {}
    barrier = threading.Barrier(count)
    ended: list[BaseException | None] = [None] * count

    def share(rank: int) -> None:
        command = Generate(**options)
        try:
            with ExitStack() as held:
                _Share(command, ThreadGroup(Place(rank, count, rank), shared, barrier), held).run()  # pyright: ignore[reportArgumentType]
        except (RGTGError, typer.Exit) as error:
            ended[rank] = error
        except BaseException as error:  # noqa: BLE001, the test shows it
            ended[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=share, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def options_of(lm: str, rm: str, source: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "input": source,
        "output": output,
        "setup": Setup(lm=lm, reward=rm),
        "decoding": Decoding(**LENGTHS),
        **more,
    }


@pytest.fixture
def expected(run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str) -> bytes:
    """What one process writes."""
    source, output = prompts_file(*PROMPTS), tmp_path / "one.jsonl"
    assert (
        run("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm, *SHORT).code == 0
    )
    return output.read_bytes()


@pytest.mark.parametrize("count", [2, 9])
def test_rows_are_those_of_one_process(
    prompts_file: Callable, tmp_path: Path, lm: str, rm: str, expected: bytes, count: int
) -> None:
    source, output = prompts_file(*PROMPTS), tmp_path / "out.jsonl"
    assert in_threads(count, **options_of(lm, rm, source, output)) == [None] * count
    assert output.read_bytes() == expected
    assert not list(tmp_path.glob("*.rank-*"))


def test_broken_lines_are_reported_once_at_the_end_of_all(
    prompts_file: Callable, tmp_path: Path, lm: str, rm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = prompts_file("broken", *PROMPTS, {"prompt": "x" * 400}), tmp_path / "out.jsonl"
    capsys.readouterr()
    first, second = in_threads(2, **options_of(lm, rm, source, output))
    assert isinstance(first, typer.Exit)
    assert first.exit_code == 2
    assert second is None
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 2
    assert len(read_rows(output)) == len(PROMPTS)


def test_a_reward_that_is_nan_costs_the_rows_of_its_process_alone(
    prompts_file: Callable, tmp_path: Path, lm: str, nan_rm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": text, "k": 1, "temperature": 0} for text in ("hello", "~~~~", "hi", "ho")]
    source, output = prompts_file(*rows), tmp_path / "out.jsonl"
    first, second = in_threads(2, **options_of(lm, nan_rm, source, output))
    assert isinstance(first, typer.Exit)
    assert first.exit_code == 2
    assert second is None
    assert "line 2" in capsys.readouterr().err
    assert [row["line"] for row in read_rows(output)] == [1, 3]


def test_parts_of_an_interrupted_run_belong_to_the_output(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str, expected: bytes
) -> None:
    source, output = prompts_file(*PROMPTS), tmp_path / "out.jsonl"
    lines = expected.splitlines(keepends=True)
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm, *SHORT)

    def interrupted() -> None:
        output.write_bytes(lines[0])
        part_of(output, 0).write_bytes(lines[2])
        part_of(output, 3).write_bytes(lines[1] + lines[4] + lines[5][:20])

    interrupted()
    assert "has rows already" in run(*args).error
    assert run(*args, "--resume", "--seed", 3, "--beta", 2).code == 2
    assert output.read_bytes() == lines[0]
    # One process continues, or another number of them.
    assert run(*args, "--resume").code == 0
    assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert not list(tmp_path.glob("*.rank-*"))
    interrupted()
    assert in_threads(3, **options_of(lm, rm, source, output, resume=True)) == [None] * 3
    assert output.read_bytes() == expected
    # A run that starts anew takes nothing over.
    interrupted()
    assert run(*args, "--overwrite", "--beta", 2).code == 0
    assert {row["beta"] for row in read_rows(output)} == {2.0}
    assert not list(tmp_path.glob("*.rank-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": None, "prompt": "hello"}, "several processes need a file of prompts"),
        ({"output": None}, "several processes need a file of prompts"),
        ({"output": Path("/dev/null")}, "not a regular file"),
        ({"setup": Setup(lm="/proc/no/such/model", reward="none")}, "no/such/model"),
        ({"resume": True, "overwrite": True}, "choose one"),
    ],
)
def test_process_0_reports_what_all_of_them_find(
    prompts_file: Callable, tmp_path: Path, lm: str, rm: str, change: dict[str, Any], said: str
) -> None:
    source, output = prompts_file(*PROMPTS), tmp_path / "out.jsonl"
    first, second = in_threads(2, **(options_of(lm, rm, source, output) | change))
    assert said in str(first)
    assert type(first) is RGTGError
    assert isinstance(second, FailedElsewhereError)
    assert not output.exists()


def test_place_is_read_from_the_environment() -> None:
    assert Place.from_environment({}) == Place(0, 1, 0)
    of_torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Place.from_environment(of_torchrun) == Place(5, 8, 1)
    for wrong in ({"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}):
        with pytest.raises(RGTGError, match="in the environment"):
            Place.from_environment(wrong)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert device_of_process(None, Place(3, 4, 1)) == "cuda:1"
    assert device_of_process("cuda", Place(2, 4, 0)) == "cuda:0"
    assert chosen == [1, 0]
    assert device_of_process("cpu", Place(3, 4, 1)) == "cpu"
    with pytest.raises(RGTGError, match="torch sees 2"):
        device_of_process("cuda", Place(2, 3, 2))


# ---- real processes

# Ends one process of a run by a signal, as `ENDED` does.
ENDED_RANK = (
    "import os, runpy, sys\n" + "if os.environ['RANK'] != sys.argv.pop(1):\n    sys.argv[2] = '1000'\n"
)


def torchrun(count: int, *args: object, script: tuple[object, ...] = ("-m", "rgtg_fast")) -> Outcome:
    """Runs a command in processes that torchrun starts."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, *script, *args]
    # A process that aborts shows where.
    variables = environment() | {"PYTHONFAULTHANDLER": "1"}
    started = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=variables, timeout=HANGS, check=False
    )
    return Outcome(started.returncode, started.stdout, started.stderr)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_process_costs_its_unfinished_rows_alone(
    prompts_file: Callable, tmp_path: Path, lm: str, rm: str, expected: bytes
) -> None:
    source, output = prompts_file(*PROMPTS), tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm, *SHORT)
    script = tmp_path / "ended.py"
    script.write_text(ENDED_RANK + ENDED, encoding="utf-8")
    # Process 1 kills itself once it has finished one of its rows.
    killed = torchrun(2, "1", "iterate", 1, int(signal.SIGKILL), *args, script=(script,))
    assert killed.code != 0
    assert killed.out == ""
    kept = read_rows(part_of(output, 1))
    assert [row["line"] for row in kept] == [2]
    assert "rank-0" in killed.err
    before = {part: part.read_bytes() for part in tmp_path.glob("*.rank-*")}
    resumed = torchrun(3, *args, "--resume")
    assert resumed.code == 0, resumed.err
    assert output.read_bytes() == expected
    assert all(lines in expected for part in before.values() for lines in part.splitlines())


@pytest.mark.slow
def test_two_processes_hold_one_model_together(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str
) -> None:
    source = prompts_file("broken", *PROMPTS)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    args = ("generate", "--input", source, "--lm", lm, "--reward", rm, "--temperature", 0, *SHORT)
    assert run(*args, "--output", one).code == 2
    started = torchrun(2, *args, "--output", two, "--tp-plan", "auto")
    assert started.out == ""
    assert started.err.count("rgtg-fast: error: ") == 1
    rows = list(zip(read_rows(one), read_rows(two), strict=True))
    assert len(rows) == len(PROMPTS)
    for expected, row in rows:
        assert row["tokens"] == expected["tokens"]
        assert row["reward"] == pytest.approx(expected["reward"], rel=1e-5)
