"""Runs `rgtg-fast generate`: one answer, one answer as a stream, or a file of prompts."""

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rgtg_fast.cli.jobs import AnswerFile, Job
from rgtg_fast.cli.session import Setup, as_chat
from rgtg_fast.cli.terminal import OutputError, complain, console, note, print_json, print_line, status, write
from rgtg_fast.errors import RewardNaNError, RGTGError

if TYPE_CHECKING:
    from rgtg_fast import RewardGuidedDecoder


def answer_one(setup: Setup, job: Job, run: dict[str, Any], json: bool) -> None:
    """Answers one prompt and prints the answer, or its row as JSON with the statistics."""
    with status("Loading") as progress:
        decoder = setup.decoder(progress)
        progress("Answering")
        result = decoder.generate(
            [as_chat(job.prompt, decoder, run["chat"])],
            max_new_tokens=run["max_new_tokens"],
            guidance=job.guidance,
            seed=job.seed,
            stop=run["stop"],
            strategy=job.strategy,
        )
    row, stats = result[0], result.stats
    if json:
        print_json({**_output(job, row, run), "stats": stats.as_dict()})
        return
    print_line(row.text)
    reward = "" if row.reward is None else f", reward {row.reward:+.3f}"
    note(
        f"{stats.tokens} tokens at {stats.tokens_per_second:.1f} tokens/s, "
        f"ended by {row.finish_reason}{reward}"
    )


def stream_one(setup: Setup, job: Job, run: dict[str, Any], json: bool) -> None:
    """Prints the tokens of one answer as they come: as text, or as one JSON object a line."""
    with status("Loading") as progress:
        decoder = setup.decoder(progress)
    started, count = time.perf_counter(), 0
    pieces = decoder.stream(
        as_chat(job.prompt, decoder, run["chat"]),
        max_new_tokens=run["max_new_tokens"],
        guidance=job.guidance,
        seed=job.seed,
        stop=run["stop"],
    )
    for piece in pieces:
        count += 1
        if json:
            print_json({"token": piece.token, "text": piece.text, "finish_reason": piece.finish_reason})
        else:
            write(piece.text)
    if not json:
        print_line("")
    note(f"{count} tokens at {count / (time.perf_counter() - started):.1f} tokens/s")


def answer_many(setup: Setup, jobs: list[Job], run: dict[str, Any], answers: AnswerFile | None) -> int:
    """Answers many prompts; a finished row is written at once, to the file or as a line of JSON to stdout.

    Returns:
        The number of prompts that could not be answered; each was reported in one line.

    Raises:
        RGTGError: nothing can be answered at all, or a reward is NaN (the rows finished before are written).
    """
    with status("Loading") as progress:
        decoder = setup.decoder(progress)
    jobs, refused = _possible(decoder, jobs, run)
    if not jobs:
        return refused
    columns = (
        TextColumn("[bold]answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    done = 0 if answers is None else len(answers.done)
    count, tokens, started = 0, 0, time.perf_counter()
    # A bar would take what goes to stdout for its own, and rows on the same terminal need no bar.
    shown = {"redirect_stdout": False, "disable": answers is None and sys.stdout.isatty()}
    with Progress(*columns, console=console(stderr=True), transient=False, **shown) as progress:
        task = progress.add_task("answering", total=done + len(jobs), completed=done, speed="")
        rows = decoder.iterate(
            [as_chat(job.prompt, decoder, run["chat"]) for job in jobs],
            max_new_tokens=run["max_new_tokens"],
            guidance=[job.guidance for job in jobs],
            seed=[job.seed for job in jobs],
            stop=run["stop"],
            strategy=jobs[0].strategy,
        )
        try:
            for index, row in rows:
                output = _output(jobs[index], row, run)
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
            raise OutputError(
                f"{error}; {count} rows were printed: name --output to keep every row"
            ) from error
    return refused


def _possible(decoder: "RewardGuidedDecoder", jobs: list[Job], run: dict[str, Any]) -> tuple[list[Job], int]:
    """The jobs whose prompts fit, and the number of the others, each of which is reported in one line."""
    fitting = []
    for job in jobs:
        try:
            # A call checks its arguments at once and decodes only when its rows are asked for.
            decoder.iterate(
                as_chat(job.prompt, decoder, run["chat"]),
                run["max_new_tokens"],
                job.guidance,
                job.seed,
                strategy=job.strategy,
            )
        except RGTGError as error:
            complain(f"line {job.line}: {str(error).replace('prompt 0 ', 'the prompt ', 1)}")
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            # What a tokenizer, a template or torch makes of a row must not cost the others their answers.
            complain(f"line {job.line}: the prompt cannot be used ({type(error).__name__}: {error})")
        else:
            fitting.append(job)
    return fitting, len(jobs) - len(fitting)


def _output(job: Job, row: Any, run: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "text": row.text,
        "finish_reason": row.finish_reason,
        "reward": row.reward,
        "tokens": row.tokens,
    }
    return {**job.header(), **answer, **run}
