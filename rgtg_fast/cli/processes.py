"""`generate` in several processes: torchrun --nproc-per-node N -m rgtg_fast generate --input ... --output ...

With --tp-plan the processes hold one model together and answer every prompt side by side (`answer_together`). Without
it each has the models and answers its share (`answer_in_processes`):

Process 0 reads the prompts and deals them out in turn. Each process loads the models and writes its rows to a part of
its own beside the output, so that a process that is killed costs its unfinished rows only. At the end process 0 merges
the parts in the order of the prompts. A row depends on its own prompt, seed and settings alone, so it is the row that
one process gives.
"""

import os
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rgtg_fast.cli.generate import note_interrupted, report
from rgtg_fast.cli.jobs import AnswerFile, Job, Key, part_of
from rgtg_fast.cli.terminal import USER_ERROR, complain, note
from rgtg_fast.errors import RGTGError
from rgtg_fast.processes import (
    FailedElsewhereError,
    Place,
    ProcessGroup,
    device_of_process,
    noticing_lost_processes,
)

if TYPE_CHECKING:
    from rgtg_fast import RewardGuidedDecoder
    from rgtg_fast.cli.generate import Generate


def answer_in_processes(command: "Generate", place: Place) -> None:
    """Answers this process's share of the prompts; process 0 also merges the rows of all.

    Raises:
        RGTGError: nothing could be answered; process 0 reports it.
        Exit: with code 2, some prompts could not be answered, or another process reports an error.
    """
    try:
        with ProcessGroup(place) as group, ExitStack() as held:
            _Share(command, group, held).run()
    except FailedElsewhereError as error:
        raise typer.Exit(USER_ERROR) from error


def answer_together(command: "Generate", place: Place) -> None:
    """Answers all prompts in every process, which hold the language model together (--tp-plan).

    Process 0 reads, prints and writes; the others compute the same answers beside it.

    Raises:
        RGTGError: as in one process; process 0 reports it.
        Exit: with code 2, some prompts could not be answered, or another process reports an error.
    """
    planned: list[tuple[list[Job], AnswerFile | None, int]] = []

    def plan() -> list[list[Job]]:
        planned.append(command.plan(held))
        return [planned[0][0]] * place.count

    try:
        with ProcessGroup(place, by_device=True) as group, noticing_lost_processes(), ExitStack() as held:
            jobs = group.scatter(plan)
            device = device_of_process(command.setup.device, place)
            command.setup = replace(command.setup, device=device)
            if place.main:
                command.carry_out(*planned[0])
                return
            nowhere = held.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                command.carry_out(jobs, None, 0)
    except FailedElsewhereError as error:
        raise typer.Exit(USER_ERROR) from error
    except RGTGError as error:
        if place.main:
            raise
        raise typer.Exit(USER_ERROR) from error


class _Share:
    """One process's share of a run.

    Args:
        command: the command's options.
        group: the processes.
        held: closes the output, which process 0 holds.
    """

    def __init__(self, command: "Generate", group: ProcessGroup, held: ExitStack) -> None:
        self._command, self._group, self._held = command, group, held
        self._place = group.place
        # Of process 0 alone: the output, the order of its rows, and the number of lines that are no prompts.
        self._output: AnswerFile | None = None
        self._order: list[Key] = []
        self._broken = 0
        self._part: AnswerFile | None = None
        self._decoder: RewardGuidedDecoder | None = None

    def run(self) -> None:
        """Deals out, answers and merges; all processes take every step together."""
        self._jobs = self._group.scatter(self._plan)
        # Nothing is overwritten before every process could load the models.
        prepared = self._group.together(self._prepare)
        if any(possible for possible, _ in prepared):
            self._group.together(self._begin)
        try:
            outcomes = self._group.together(self._answer)
        except (KeyboardInterrupt, RGTGError):
            # Interrupted, or another process was killed.
            if self._part is not None:
                note_interrupted(self._part)
            raise
        if self._output is None:
            return
        broken = self._broken + sum(refused for _, refused in prepared)
        # Where no prompt could be answered, rows that were to be overwritten stay.
        if not broken or any(possible for possible, _ in prepared):
            self._output.merge([rows for rows, _ in outcomes], self._order)
        report(self._output, broken)
        if broken or any(failed for _, failed in outcomes):
            raise typer.Exit(USER_ERROR)

    def _plan(self) -> list[list[Job]]:
        """Reads the prompts and opens the output, in process 0; the jobs that have no row yet, by rank."""
        command, count = self._command, self._place.count
        if command.input is None or command.output is None:
            raise RGTGError(
                f"WORLD_SIZE={count}: several processes need a file of prompts, --input, and --output"
            )
        jobs, self._broken = command.jobs()
        self._order = [job.key for job in jobs]
        if command.output.exists() and not command.output.is_file():
            raise RGTGError(f"--output {command.output} is not a regular file, which several processes need")
        self._output = AnswerFile(command.output, command.resume, command.overwrite, command.input)
        self._held.enter_context(self._output)
        jobs = self._output.remaining(jobs, command.common())
        return [jobs[rank::count] for rank in range(count)]

    def _prepare(self) -> tuple[int, int]:
        """Loads the models where there is a prompt; the numbers of prompts that can and that cannot be answered."""
        if not self._jobs:
            return 0, 0
        setup = self._command.setup
        self._command.setup = replace(setup, device=device_of_process(setup.device, self._place))
        progress = note if self._place.main else _ignore
        self._decoder, self._jobs, refused = self._command.prepare(self._jobs, progress)
        return len(self._jobs), refused

    def _begin(self) -> None:
        if self._output is not None:
            self._output.begin()

    def _answer(self) -> tuple[int, bool]:
        """Writes this process's part; the number of its rows, and whether it failed, which it reports itself."""
        if not self._jobs:
            return 0, False
        assert self._decoder is not None
        assert self._command.output is not None
        part = part_of(self._command.output, self._place.rank)
        with AnswerFile(part, resume=False, overwrite=True) as answers:
            self._part = answers
            try:
                self._command.write_rows(self._decoder, self._jobs, answers, shown=self._place.main)
            except RGTGError as error:
                # The others go on: their rows are not lost.
                complain(str(error))
                return len(answers.done), True
        return len(answers.done), False


def _ignore(text: str) -> None:
    """What is the same in all processes is told by process 0."""
