"""`rgtg-fast accuracy`: reward models compared on preference pairs, at every share of the answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import LABEL_HELP, NONE, PAIRS_HELP, Progress, Setup, quiet
from rgtg_fast.cli.terminal import console, note, print_json, status
from rgtg_fast.config import DATA, MODELS, OUTPUT, option
from rgtg_fast.errors import RGTGError
from rgtg_fast.files import check_writable
from rgtg_fast.training.config import ANSWERS_ENDED_HELP


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Compare reward models on preference pairs: how often the chosen answer wins, by the share of it that is read."""

    reward: list[str] = option(
        "Reward, as in the other commands: path or hub id of a reward model or adapter, `bundled:NAME`, `text:PATH`, "
        "`contrastive`, … (repeatable, to compare several).",
        panel=MODELS,
    )
    reward_label: str | None = option(LABEL_HELP, None, MODELS)
    data: str = option(f"{PAIRS_HELP}.", panel=DATA)
    fractions: str = option("Shares of each answer to judge by, separated by commas.", "0.1,0.25,0.5,0.75,1")
    layout: str = option("plain, dialogue, tldr, or auto by the fields.", "auto", DATA)
    limit: int | None = option("Pairs to take at most.", None, DATA, shown="all", min=1)
    max_length: int = option(
        "Tokens of a prompt and its longer answer; longer prompts are truncated from the left.", 1024, DATA
    )
    answers_ended: str = option(ANSWERS_ENDED_HELP, "auto", DATA)
    setup: Setup = include("chat lm dtype device")
    batch_tokens: int = option("Tokens of a packed row.", 2048)
    figure: Path | None = option("Draw the curves to this .png, .svg or .pdf.", None, OUTPUT)
    keep: Path | None = option(
        "Write the rewards of each pair to this .jsonl file as they come; what is in it is not computed again, so "
        "that an interrupted run can be continued.",
        None,
        OUTPUT,
    )
    json: bool = json_option()

    def run(self) -> None:
        """Scores the pairs with every reward model and shows the accuracies."""
        if self.figure is not None:
            from rgtg_fast.evaluation.accuracy import check_figure

            check_figure(self.figure)
        if self.keep is not None:
            check_writable(self.keep, self.data)
        with status("Loading") as progress:
            report, first = self._compare(progress)
        if self.figure is not None:
            _draw(report, self.figure)
        if self.json:
            print_json(report)
            return
        for line in first.lines():
            note(line)
        _show(report, console())
        if self.figure is not None:
            note(f"written: {self.figure}")

    def _compare(self, progress: Progress) -> Any:
        quiet()
        fractions = parse_fractions(self.fractions)
        if self.batch_tokens < 1:
            raise RGTGError(f"--batch-tokens {self.batch_tokens} is below 1: use for example 2048")
        if len(set(self.reward)) < len(self.reward):
            raise RGTGError("a reward model is given twice: name each --reward once")
        if NONE in self.reward:
            raise RGTGError(f"--reward {NONE} is not a reward model: name one that gives rewards")
        from rgtg_fast.evaluation.compare import PairData, compare_rewards

        data = PairData(
            self.data,
            self.layout,
            self.limit,
            self.max_length,
            self.batch_tokens,
            self.setup.chat,
            self.keep,
            self.answers_ended,
        )
        models = {"lm": self.setup.lm, "device": self.setup.device, "dtype": self.setup.dtype}
        return compare_rewards(
            self.reward, data, fractions, **models, label=self.reward_label, progress=progress
        )


def parse_fractions(text: str) -> list[float]:
    """Fractions separated by commas.

    Raises:
        RGTGError: something that is not a number in (0, 1].
    """
    from rgtg_fast.evaluation.accuracy import check_fractions

    try:
        fractions = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise RGTGError(
            f"--fractions {text!r} are not numbers: use for example 0.1,0.25,0.5,0.75,1"
        ) from error
    check_fractions(fractions)
    return sorted(set(fractions))


def _draw(report: dict[str, Any], path: Path) -> None:
    from rgtg_fast.evaluation.accuracy import FractionAccuracy, figure

    curves = {
        model["reward"]: [FractionAccuracy(**point) for point in model["accuracy"]]
        for model in report["guides"]
    }
    title = f"{Path(report['data']['file']).name}, {report['longer_wins']['n']} pairs"
    figure(curves, path, FractionAccuracy(fraction=1.0, **report["longer_wins"]), title)


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(
        box=box.SIMPLE, title=f"Chosen answer preferred, of {report['longer_wins']['n']} pairs (95 %)"
    )
    table.add_column("answer read", justify="right")
    models = report["guides"]
    for model in models:
        table.add_column(model["reward"], justify="right")
    for row in zip(*(model["accuracy"] for model in models), strict=True):
        table.add_row(f"{100 * row[0]['fraction']:g} %", *map(_interval, row))
    table.add_section()
    table.add_row("longer wins", *[_interval(report["longer_wins"])] * len(models))
    console.print(table)
    console.print(report["read_at"])
    for gap in report["differences"]:
        one, other = gap["rewards"]
        low, high = gap["ci95"]
        console.print(
            f"{100 * gap['fraction']:g} %: {one} − {other} = {gap['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )


def _interval(point: dict[str, Any]) -> str:
    low, high = point["ci95"]
    return f"{point['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
