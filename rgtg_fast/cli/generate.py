"""`rgtg-fast generate`: one answer, one answer as a stream, or a file of prompts."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rgtg_fast.cli.jobs import AnswerFile, Job, check_prompt, read_prompts
from rgtg_fast.cli.options import argument, include, json_option
from rgtg_fast.cli.session import Decoding, Progress, Setup
from rgtg_fast.cli.terminal import (
    USER_ERROR,
    OutputError,
    complain,
    console,
    note,
    print_json,
    print_line,
    read_stdin,
    status,
    write,
)
from rgtg_fast.config import OUTPUT, Guidance, option
from rgtg_fast.errors import RewardNaNError, RGTGError
from rgtg_fast.processes import Place

if TYPE_CHECKING:
    from rgtg_fast import RewardGuidedDecoder


@dataclass(kw_only=True)
class Generate:
    """Answer one prompt, or a file of prompts."""

    prompt: str | None = argument("The prompt; `-` reads it from stdin.", None)
    input: Path | None = option(
        'Prompts as JSON Lines (plain or gzip): {"prompt": text, chat or token ids} with optional id, seed, k, beta, '
        "temperature, weights, gate_entropy.",
        None,
        OUTPUT,
    )
    output: Path | None = option("Where finished rows go, each at once, as JSON Lines.", None, OUTPUT)
    field: str = option("The name of the prompt's field in --input.", "prompt", OUTPUT)
    resume: bool = option("Continue an interrupted run: keep the rows of --output.", False, OUTPUT)
    overwrite: bool = option("Start anew where --output has rows.", False, OUTPUT)
    stream: bool = option("Print tokens as they come.", False, OUTPUT)
    json: bool = json_option()
    setup: Setup = include()
    decoding: Decoding = include()

    def run(self) -> None:
        """Answers the prompts.

        Raises:
            Exit: with code 2, some prompts could not be answered.
        """
        self.setup = self.setup.with_reward(self.decoding.support)
        place = Place.from_environment()
        if place.count > 1:
            from rgtg_fast.cli import processes

            answer = processes.answer_together if self.setup.tp_plan else processes.answer_in_processes
            answer(self, place)
        else:
            with ExitStack() as held:
                self.carry_out(*self.plan(held))

    def plan(self, held: ExitStack) -> tuple[list[Job], AnswerFile | None, int]:
        """Reads the prompts and opens the output.

        Args:
            held: closes the output.

        Returns:
            The prompts that have no answer yet, the output, and the number of lines that are no prompts.
        """
        jobs, broken = self.jobs()
        if self.output is None:
            return jobs, None, broken
        answers = held.enter_context(AnswerFile(self.output, self.resume, self.overwrite, self.input))
        return answers.remaining(jobs, self.common()), answers, broken

    def carry_out(self, jobs: list[Job], answers: AnswerFile | None, broken: int) -> None:
        """Answers the prompts of `plan`.

        Raises:
            Exit: with code 2, some prompts could not be answered.
        """
        try:
            if self.stream:
                self._stream_one(jobs[0])
            elif self.input is None and self.output is None:
                self._answer_one(jobs[0])
            elif jobs:
                broken += self._answer_many(jobs, answers)
        except KeyboardInterrupt:
            if answers is not None:
                note_interrupted(answers)
            raise
        if answers is not None:
            answers.check_place()
            report(answers, broken)
        # Where no prompt could be answered, rows that were to be overwritten stay.
        if broken:
            raise typer.Exit(USER_ERROR)

    def jobs(self) -> tuple[list[Job], int]:
        """The prompts, and the number of lines that are none; each of those is reported in one line.

        Raises:
            RGTGError: options that do not fit each other, or prompts that cannot be read.
        """
        self._check_options()
        job = self._settings()
        if self.input is None:
            text = read_stdin() if self.prompt == "-" else self.prompt
            check_prompt(text)
            assert text is not None
            return [replace(job, prompt=text)], 0
        jobs, broken = read_prompts(self.input, job.guidance, job.seed, self.field, complain)
        return [replace(each, strategy=job.strategy) for each in jobs], broken

    def _check_options(self) -> None:
        if (self.prompt is None) == (self.input is None):
            both = ", not both" if self.prompt is not None else ""
            raise RGTGError(f"give one prompt or --input with a file of prompts{both}")
        if self.stream and self.input is not None:
            raise RGTGError("--stream shows one answer as it comes: give one prompt instead of --input")
        if self.stream and self.output is not None:
            raise RGTGError("--stream prints to stdout: leave out --output")
        if (self.resume or self.overwrite) and self.output is None:
            raise RGTGError("--resume and --overwrite are about --output: name it")
        if self.resume and self.overwrite:
            raise RGTGError("--resume keeps the rows of --output and --overwrite drops them: choose one")
        if self.stream and self.decoding.strategy != "tokenwise":
            raise RGTGError("--stream shows tokens as they are chosen: leave out --strategy")

    def _settings(self) -> Job:
        """The settings of every prompt, as a job with an empty one.

        A strategy has settings of its own instead of the guidance; its temperature may come from --temperature.
        """
        options, strategy = self.decoding, self.decoding.strategy
        if strategy == "tokenwise":
            job = Job(1, "", options.guidance(), options.seed)
        else:
            if "temperature=" not in strategy:
                strategy += f"{',' if ':' in strategy else ':'}temperature={options.temperature}"
            job = Job(1, "", Guidance(gate_entropy=options.gate_entropy), options.seed, strategy=strategy)
        if options.max_batch < 1:
            raise RGTGError(f"max_batch={options.max_batch} leaves no row: use at least 1")
        return job

    def common(self) -> dict[str, Any]:
        """The settings that all rows have in common; every row of the output repeats them."""
        return {**self.setup.names(), **self._lengths(), "chat": self.setup.chat}

    def _lengths(self) -> dict[str, Any]:
        return {"max_new_tokens": self.decoding.max_new_tokens, "stop": self.decoding.stop or []}

    def _load(self, progress: Progress) -> "RewardGuidedDecoder":
        """The decoder; one prompt needs no more than one row."""
        rows = 1 if self.input is None and not self.setup.pad_batch else self.decoding.max_batch
        return self.setup.decoder(progress, max_batch=rows, max_length=self.decoding.max_length)

    def _answer_one(self, job: Job) -> None:
        """Answers one prompt and prints the answer, or its row as JSON with the statistics."""
        with status("Loading") as progress:
            decoder = self._load(progress)
            progress("Answering")
            result = decoder.generate(
                [self.setup.as_chat(job.prompt, decoder)],
                guidance=job.guidance,
                seed=job.seed,
                strategy=job.strategy,
                **self._lengths(),
            )
        row, stats = result[0], result.stats
        if self.json:
            print_json({**self._output(job, row), "stats": stats.as_dict()})
            return
        print_line(row.text)
        reward = "" if row.reward is None else f", reward {row.reward:+.3f}"
        speed = f"{stats.tokens} tokens at {stats.tokens_per_second:.1f} tokens/s"
        note(f"{speed}, ended by {row.finish_reason}{reward}")

    def _stream_one(self, job: Job) -> None:
        """Prints the tokens of one answer as they come: as text, or as one JSON object a line."""
        with status("Loading") as progress:
            decoder = self._load(progress)
        started, count = time.perf_counter(), 0
        chunks = decoder.stream(
            self.setup.as_chat(job.prompt, decoder),
            guidance=job.guidance,
            seed=job.seed,
            **self._lengths(),
        )
        for chunk in chunks:
            count += 1
            if self.json:
                print_json({"token": chunk.token, "text": chunk.text, "finish_reason": chunk.finish_reason})
            else:
                write(chunk.text)
        if not self.json:
            print_line("")
        note(f"{count} tokens at {count / (time.perf_counter() - started):.1f} tokens/s")

    def _answer_many(self, jobs: list[Job], answers: AnswerFile | None) -> int:
        """Answers many prompts.

        Returns:
            The number of prompts that could not be answered; each was reported in one line.

        Raises:
            RGTGError: nothing can be answered at all, or as in `write_rows`.
        """
        with status("Loading") as progress:
            decoder, jobs, refused = self.prepare(jobs, progress)
        if jobs:
            self.write_rows(decoder, jobs, answers)
        return refused

    def prepare(self, jobs: list[Job], progress: Progress) -> tuple["RewardGuidedDecoder", list[Job], int]:
        """Loads the decoder.

        Returns:
            The decoder, the jobs that it can answer, and the number of the others; each of those is reported in one
            line.

        Raises:
            RGTGError: nothing can be answered at all.
        """
        decoder = self._load(progress)
        return decoder, *self._possible(decoder, jobs)

    def write_rows(
        self, decoder: "RewardGuidedDecoder", jobs: list[Job], answers: AnswerFile | None, shown: bool = True
    ) -> None:
        """Answers many prompts; a finished row is written at once, to the file or as a line of JSON to stdout.

        Args:
            decoder: as `prepare` gives it, with the jobs.
            jobs: one at least.
            answers: None for stdout.
            shown: whether a progress bar is.

        Raises:
            RGTGError: a reward is NaN (the rows finished before are written), or the file cannot be written any more.
        """
        done = 0 if answers is None else len(answers.done)
        count, tokens, started = 0, 0, time.perf_counter()
        with _progress_bar(answers is None, shown) as progress:
            task = progress.add_task("answering", total=done + len(jobs), completed=done, speed="")
            rows = decoder.iterate(
                [self.setup.as_chat(job.prompt, decoder) for job in jobs],
                guidance=[job.guidance for job in jobs],
                seed=[job.seed for job in jobs],
                strategy=jobs[0].strategy,
                **self._lengths(),
            )
            try:
                for index, row in rows:
                    output = self._output(jobs[index], row)
                    if answers is None:
                        print_json(output)
                    else:
                        answers.write(jobs[index].key, output)
                    count += 1
                    tokens += len(row.tokens)
                    speed = tokens / (time.perf_counter() - started)
                    progress.update(task, advance=1, speed=f"{speed:.1f} tokens/s")
            except RewardNaNError as error:
                safe = "" if answers is None else "; the finished rows are written, continue with --resume"
                raise RGTGError(f"line {jobs[error.row].line}: {error}{safe}") from error
            except OutputError as error:
                printed = f"{count} rows were printed: name --output to keep every row"
                raise OutputError(f"{error}; {printed}") from error

    def _possible(self, decoder: "RewardGuidedDecoder", jobs: list[Job]) -> tuple[list[Job], int]:
        """The jobs whose prompts can be used, and the number of the others; each of those is reported in one line."""
        fitting = []
        for job in jobs:
            try:
                # A call checks its arguments at once and decodes only when its rows are asked for.
                decoder.iterate(
                    self.setup.as_chat(job.prompt, decoder),
                    self.decoding.max_new_tokens,
                    job.guidance,
                    job.seed,
                    strategy=job.strategy,
                )
            except RGTGError as error:
                complain(f"line {job.line}: {str(error).replace('prompt 0 ', 'the prompt ', 1)}")
            except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
                # A row that a tokenizer, a template or torch cannot handle must not end the run.
                complain(f"line {job.line}: the prompt cannot be used ({type(error).__name__}: {error})")
            else:
                fitting.append(job)
        return fitting, len(jobs) - len(fitting)

    def _output(self, job: Job, row: Any) -> dict[str, Any]:
        names = ("text", "finish_reason", "reward", "tokens")
        return {**job.header(), **{name: getattr(row, name) for name in names}, **self.common()}


def report(answers: AnswerFile, left_out: int) -> None:
    """Says on stderr what the output file has."""
    note(f"{len(answers.done)} rows in {answers.path}" + (f", {left_out} left out" if left_out else ""))


def note_interrupted(answers: AnswerFile) -> None:
    """Says on stderr what an interrupted run has left."""
    note(f"interrupted: {len(answers.done)} finished rows are in {answers.path}, use --resume")


def _progress_bar(to_stdout: bool, shown: bool) -> Any:
    from rich import progress

    columns = (
        progress.TextColumn("[bold]answering"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # The bar must not redirect rows that go to stdout; rows on the same terminal need no bar.
    hidden = not shown or (to_stdout and sys.stdout.isatty())
    return progress.Progress(*columns, console=console(stderr=True), redirect_stdout=False, disable=hidden)
