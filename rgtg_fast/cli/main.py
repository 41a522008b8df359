"""The command line `rgtg-fast`: the app, its commands, and errors as one line on stderr with exit code 2.

A command imports what takes long to load (torch, transformers) when it runs, so that help is instant.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rgtg_fast.cli.accuracy import Accuracy
from rgtg_fast.cli.bench import Bench
from rgtg_fast.cli.check import Check
from rgtg_fast.cli.demo import Demo
from rgtg_fast.cli.env import Env
from rgtg_fast.cli.evaluate import Evaluate
from rgtg_fast.cli.explain import Explain
from rgtg_fast.cli.export import Export
from rgtg_fast.cli.generate import Generate
from rgtg_fast.cli.methods import Methods
from rgtg_fast.cli.options import register
from rgtg_fast.cli.terminal import USER_ERROR, complain, print_line, streams
from rgtg_fast.cli.token_rewards import TokenRewards
from rgtg_fast.cli.train import Train
from rgtg_fast.cli.train_policy import TrainPolicy
from rgtg_fast.errors import RGTGError
from rgtg_fast.files import reason

INTERRUPTED = 130
# In the order of `rgtg-fast --help`.
COMMANDS = (
    Demo,
    Generate,
    Check,
    Explain,
    Export,
    Bench,
    Methods,
    Train,
    TrainPolicy,
    TokenRewards,
    Accuracy,
    Evaluate,
    Env,
)
# click's UsageError, whether typer brings its own click or depends on one.
UsageError: Any = typer.BadParameter.__mro__[1]


class _OneLineErrors(TyperGroup):
    """Prints every error that a user can cause as one line on stderr and exits with code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        ended: list[int] = []
        try:
            with streams(), _ended_by_signals(ended):
                code = super().main(
                    args,
                    prog_name=prog_name,
                    complete_var=complete_var,
                    standalone_mode=False,
                    windows_expand_args=windows_expand_args,
                    **extra,
                )
        except UsageError as error:
            message = error.format_message().rstrip(".")
            # Without a command the help has been shown, and there is no message.
            code = _fail(f"{message}: see `{_command(error)} --help`") if message else USER_ERROR
        except RGTGError as error:
            code = _fail(str(error))
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            if _is_out_of_memory(error):
                code = _fail(
                    "out of memory: use a smaller --max-batch, --max-length or --k, or --dtype bfloat16"
                )
            elif isinstance(error, OSError):
                # The files that options name have messages of their own; this is for all others.
                at = "" if error.filename is None else f" ({error.filename})"
                code = _fail(f"{reason(error)}{at}: check the path, the permissions and the free disk space")
            else:
                raise
        code = 128 + ended[0] if ended else code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code


@contextlib.contextmanager
def _ended_by_signals(ended: list[int]) -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `KeyboardInterrupt`, so that a command ends with its cleanup.

    Args:
        ended: receives the signal's number.
    """

    def end(number: int, frame: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # A signal that is ignored, for example by nohup, stays ignored.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command(error: Any) -> str:
    return (
        "rgtg-fast" if error.ctx is None or error.ctx.parent is None else f"rgtg-fast {error.ctx.info_name}"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Only CUDA has an exception class for it; on a CPU it is a RuntimeError, an OSError or an ImportError."""
    text = str(error).lower()
    texts = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(part in text for part in texts)


def _fail(message: str) -> int:
    complain(message)
    return USER_ERROR


app = typer.Typer(
    cls=_OneLineErrors,
    name="rgtg-fast",
    help="Reward-guided text generation: a reward model scores the candidates for every token.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from rgtg_fast import __version__

        print_line(f"rgtg-fast {__version__}")
        raise typer.Exit


for command in COMMANDS:
    register(app, command)


def main(args: Sequence[str] | None = None) -> None:
    """The console script."""
    app(args)


if __name__ == "__main__":
    main()
