"""Runs `rgtg-fast accuracy`: guides judged by real preferences, at every share of the answers."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import NONE, Setup, quiet
from rgtg_fast.cli.terminal import console, note, print_json, status
from rgtg_fast.errors import RGTGError
from rgtg_fast.files import check_writable

if TYPE_CHECKING:
    from rgtg_fast.evaluation.accuracy import PairScores
    from rgtg_fast.evaluation.jsonl import JsonlWriter
    from rgtg_fast.training.data import DataReport, PreferencePair, TokenizedPair

_KEPT = ("guide", "pair", "chosen", "rejected")
# Lines about the progress that a run off a terminal prints for each guide.
_PROGRESS_LINES = 10


@dataclass(frozen=True)
class Data:
    """Which pairs, and how they become token ids.

    Attributes:
        source: as `load_pairs` takes it.
        layout: of its rows. limit: pairs to take at most.
        max_length: tokens of a prompt and its longer answer.
        budget: tokens of a packed row.
        chat: texts become chat messages where there is a chat template.
        answers_ended: as in `load_pairs`.
        keep: file that each pair's rewards are written to as they come; those in it are not computed again.
    """

    source: str
    layout: str = "auto"
    limit: int | None = None
    max_length: int = 1024
    budget: int = 2048
    chat: bool = True
    keep: Path | None = None
    answers_ended: str = "auto"


@dataclass(frozen=True)
class Judged:
    """One guide with its scores.

    Attributes:
        name: as it was given. pairs: as the guide's tokenizer cuts them.
        scores: of each pair, the rewards of all prefixes of both answers.
        report: which pairs were left out.
    """

    name: str
    pairs: "list[TokenizedPair]"
    scores: "list[PairScores]"
    report: "DataReport"


def parse_fractions(text: str) -> list[float]:
    """Fractions separated by commas.

    Raises:
        RGTGError: something that is no number in (0, 1].
    """
    from rgtg_fast.evaluation.accuracy import check_fractions

    try:
        fractions = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise RGTGError(
            f"--fractions {text!r} are no numbers: use for example 0.1,0.25,0.5,0.75,1"
        ) from error
    check_fractions(fractions)
    return sorted(set(fractions))


def run(
    rewards: Sequence[str],
    data: Data,
    fractions: str,
    models: dict[str, Any],
    figure: Path | None,
    json: bool,
) -> None:
    """Scores the pairs with every guide and tells the accuracies.

    Args:
        rewards: the guides by name.
        fractions: separated by commas.
        models: fields of `Setup` that all guides share.
        figure: where the curves are drawn.

    Raises:
        RGTGError: everything that a user can get wrong.
    """
    if figure is not None:
        from rgtg_fast.evaluation.accuracy import check_figure

        check_figure(figure)
    if data.keep is not None:
        check_writable(data.keep, data.source)
    with status("Loading") as progress:
        report, first = judge(rewards, data, fractions, models, progress)
    if figure is not None:
        _draw(report, figure)
    if json:
        print_json(report)
        return
    for line in first.lines():
        note(line)
    _show(report, console())
    if figure is not None:
        note(f"written: {figure}")


def judge(
    rewards: Sequence[str],
    data: Data,
    fractions: str,
    models: dict[str, Any],
    progress: Callable[[str], None],
) -> "tuple[dict[str, Any], DataReport]":
    """Scores the pairs with every guide.

    Args:
        rewards, data, fractions, models: as in `run`.
        say: receives lines about the progress.

    Returns:
        What `--json` prints, and which pairs the first guide left out.

    Raises:
        RGTGError: everything that a user can get wrong.
    """
    quiet()
    shares = parse_fractions(fractions)
    if data.budget < 1:
        raise RGTGError(f"--batch-tokens {data.budget} is below 1: use for example 2048")
    if len(set(rewards)) < len(rewards):
        raise RGTGError("a guide is named twice: name each --reward once")
    from rgtg_fast.training.data import load_pairs

    # Before any model is loaded: what is wrong with the data should be told at once.
    loaded = load_pairs(data.source, data.layout, answers_ended=data.answers_ended)  # pyright: ignore[reportArgumentType]
    bases: dict[str | None, Any] = {}

    def base(setup: Setup) -> Any:
        """The base model and its tokenizer, loaded once for all guides."""
        if setup.lm not in bases:
            bases[setup.lm] = setup.pair(progress)
        return bases[setup.lm]

    with nullcontext() if data.keep is None else _journal(data.keep) as journal:
        judged = [
            _judge(Setup(reward=name, **models), data, loaded, base, journal, progress) for name in rewards
        ]
    return _report(judged, shares, data), judged[0].report


def _journal(path: Path) -> "JsonlWriter":
    from rgtg_fast.evaluation.jsonl import JsonlWriter

    return JsonlWriter(path, _KEPT)


def _judge(
    setup: Setup,
    data: Data,
    loaded: "tuple[list[PreferencePair], DataReport]",
    base: Callable[[Setup], Any],
    journal: "JsonlWriter | None",
    progress: Callable[[str], None],
) -> Judged:
    """Loads one guide and scores the pairs with it, those that the journal does not know."""
    from rgtg_fast.evaluation.accuracy import score_pairs
    from rgtg_fast.evaluation.judge import load_classifier
    from rgtg_fast.rewards import SequenceReward, named_guide
    from rgtg_fast.training.data import load_pairs, tokenize_pairs

    if setup.reward == NONE:
        raise RGTGError(f"--reward {NONE} is no guide: name one that gives rewards")
    progress(f"Loading {setup.reward}")
    named = named_guide(setup.reward)
    scorer: Any
    if type(named) is SequenceReward:
        scorer, tokenizer = load_classifier(
            str(named.source), lambda lm: base(replace(setup, lm=lm)), setup.lm
        )
    else:
        decoder = setup.decoder(progress, base(setup))
        scorer, tokenizer = decoder.reward, decoder.tokenizer
    assert tokenizer is not None
    chat = data.chat and tokenizer.chat_template is not None
    if not chat:
        layout: Any = data.layout
        loaded = load_pairs(data.source, layout, chat=False, answers_ended=data.answers_ended)
    pairs, report = loaded
    pairs = pairs[: data.limit]
    tokenized, fitted = tokenize_pairs(pairs, tokenizer, data.max_length, chat=chat)
    prompts = {pair.index: pair.prompt for pair in pairs}
    given: list[Any] = [prompts[pair.index] for pair in tokenized]
    if chat:
        given = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in given]
    told = _told(setup)
    names = [_identity(pair) for pair in tokenized]
    rows = [] if journal is None else [row for row in journal.rows if row["guide"] == told]
    kept = {row["pair"]: (row["chosen"], row["rejected"]) for row in rows}
    known = {position: kept[name] for position, name in enumerate(names) if name in kept}
    if known:
        progress(f"{setup.reward}: {len(known)} of {len(names)} pairs scored before")
    done, shown = len(known), len(known) * _PROGRESS_LINES // max(1, len(names))

    def found(position: int, scores: "PairScores") -> None:
        nonlocal done, shown
        if journal is not None:
            chosen, rejected = scores
            journal.add({"guide": told, "pair": names[position], "chosen": chosen, "rejected": rejected})
        done += 1
        if done * _PROGRESS_LINES // len(names) > shown:
            shown = done * _PROGRESS_LINES // len(names)
            progress(f"{setup.reward}: {done} of {len(names)} pairs scored")

    scores = score_pairs(scorer, tokenized, data.budget, given, known, found)
    return Judged(setup.reward, tokenized, scores, report + fitted)


def _told(setup: Setup) -> dict[str, Any]:
    """What the rewards of a guide depend on besides the pair."""
    from rgtg_fast.evaluation.judge import weights_of

    base = str(setup.lm or embedded.NAME)
    weights = [*weights_of(setup.reward).values(), *weights_of(base).values()]
    return {"reward": setup.reward, "lm": base, "weights": sorted(weights), "dtype": setup.dtype}


def _identity(pair: "TokenizedPair") -> str:
    """A pair's tokens as a hash."""
    ids = json.dumps([list(part) for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
    return hashlib.sha256(ids.encode()).hexdigest()[:24]


def _report(judged: list[Judged], fractions: list[float], data: Data) -> dict[str, Any]:
    from rgtg_fast.evaluation.accuracy import (
        differences,
        length_verdicts,
        longer_wins,
        paired_bootstrap,
        prefix_accuracy,
        verdicts,
    )

    guides = []
    for one in judged:
        longer = length_verdicts(one.pairs)
        above = [paired_bootstrap(f, verdicts(one.scores, f), longer).as_dict() for f in fractions]
        accuracy = [point.as_dict() for point in prefix_accuracy(one.scores, fractions)]
        counts = one.report.as_dict()
        guides.append({"reward": one.name, "accuracy": accuracy, "above_longer_wins": above, "data": counts})
    first = judged[0]
    compared = []
    for i, one in enumerate(judged):
        for other in judged[i + 1 :]:
            # Tokenizers may drop different pairs; what is compared is what both have scored.
            theirs = {pair.index: scores for pair, scores in zip(other.pairs, other.scores, strict=True)}
            both = [
                (scores, theirs[pair.index])
                for pair, scores in zip(one.pairs, one.scores, strict=True)
                if pair.index in theirs
            ]
            gaps = differences([a for a, _ in both], [b for _, b in both], fractions)
            compared += [{"rewards": [one.name, other.name], **gap.as_dict()} for gap in gaps]
    limited = {} if data.limit is None else {"limit": data.limit}
    baseline = longer_wins(first.pairs).as_dict()
    del baseline["fraction"]
    return {
        "accuracy": guides[0]["accuracy"],
        "longer_wins": baseline,
        "data": {"file": data.source, **limited, **first.report.as_dict()},
        "read_at": first.report.end_line(),
        "guides": guides,
        "differences": compared,
    }


def _draw(report: dict[str, Any], path: Path) -> None:
    from rgtg_fast.evaluation.accuracy import FractionAccuracy, figure

    curves = {
        guide["reward"]: [FractionAccuracy(**point) for point in guide["accuracy"]]
        for guide in report["guides"]
    }
    title = f"{Path(report['data']['file']).name}, {report['longer_wins']['n']} pairs"
    figure(curves, path, FractionAccuracy(fraction=1.0, **report["longer_wins"]), title)


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(
        box=box.SIMPLE, title=f"Chosen answer preferred, of {report['longer_wins']['n']} pairs (95 %)"
    )
    table.add_column("answer read", justify="right")
    for guide in report["guides"]:
        table.add_column(guide["reward"], justify="right")
    for row in zip(*(guide["accuracy"] for guide in report["guides"]), strict=True):
        table.add_row(f"{100 * row[0]['fraction']:g} %", *map(_interval, row))
    table.add_section()
    table.add_row("longer wins", *[_interval(report["longer_wins"])] * len(report["guides"]))
    console.print(table)
    console.print(report["read_at"], highlight=False, markup=False)
    for gap in report["differences"]:
        one, other = gap["rewards"]
        low, high = gap["ci95"]
        console.print(
            f"{100 * gap['fraction']:g} %: {one} − {other} = {gap['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
            highlight=False,
            markup=False,
        )


def _interval(point: dict[str, Any]) -> str:
    low, high = point["ci95"]
    return f"{point['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
