"""How often a reward model prefers the chosen answer, by how much of the answers it has read.

Guided decoding scores unfinished answers, so a reward model must tell prefixes apart: one trained on whole answers may
rank whole answers well and prefixes no better than chance (arXiv 2406.07780).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.study.metrics import bootstrap_mean
from rgtg_fast.files import check_writable, replacing
from rgtg_fast.models.prompts import Prompt, PromptLike
from rgtg_fast.plaintext import printable
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.packing import collate, cost, pack, packed_rewards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
# The rewards of every prefix of a pair's chosen and rejected answer, and after them the reward of the whole answer:
# with EOS, or, for an answer that was cut, at its last text token again (`TokenizedPair.read_whole`).
PairScores: TypeAlias = "tuple[Sequence[float], Sequence[float]]"

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class FractionAccuracy:
    """Share of pairs whose chosen answer is preferred, both answers cut to one fraction.

    Attributes:
        fraction: fraction of the answer's text tokens that is read; 1 is the whole answer, with EOS where it ended.
        accuracy: ties count one half.
        ci95: Wilson's 95 % interval.
        n: pairs.
    """

    fraction: float
    accuracy: float
    ci95: tuple[float, float]
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class AccuracyDifference:
    """Accuracy of one reward model minus that of another on the same pairs.

    Attributes:
        fraction: as in `FractionAccuracy`.
        difference: difference of the accuracies.
        ci95: 95 % interval of the paired bootstrap.
        n: pairs.
    """

    fraction: float
    difference: float
    ci95: tuple[float, float]
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@torch.no_grad()
def score_pairs(
    reward: nn.Module | Reward,
    pairs: Sequence[TokenizedPair],
    budget: int = 2048,
    prompts: Sequence[PromptLike] | None = None,
    known: Mapping[int, PairScores] | None = None,
    found: Callable[[int, PairScores], None] = lambda position, scores: None,
) -> list[PairScores]:
    """Rewards of every prefix of both answers' texts of each pair, followed by those of the whole answers.

    Args:
        reward: a causal model with a score head and `use_packed_attention`, which scores packed rows; or a `Reward`
            bound to a base model, which scores one answer after the other.
        pairs: tokenized under the reward model's tokenizer.
        budget: tokens of a packed row (more where a pair is longer).
        prompts: for a bound `Reward`, the pairs' prompts as the decoder takes them; by default their ids, which suffice
            for rewards that do not format the prompt themselves.
        known: scores of pairs that need not be scored again, by position in `pairs`.
        found: called with the position and the scores of each pair as it is scored.

    Returns:
        The scores of each pair, in the order of `pairs`.

    Raises:
        RGTGError: a reward that is NaN.
    """
    scores = dict(known or {})
    if isinstance(reward, Reward):
        scored = _one_by_one(reward, pairs, prompts, scores.keys())
    else:
        scored = _packed(reward, pairs, budget, scores.keys())
    for index, answers in scored:
        if any(math.isnan(value) for answer in answers for value in answer):
            raise RGTGError(
                f"a reward of pair {pairs[index].index} is NaN: check the reward model's weights and dtype (float16 "
                "overflows: try bfloat16 or float32)"
            )
        scores[index] = answers
        found(index, answers)
    return [scores[position] for position in range(len(pairs))]


def _packed(
    model: nn.Module, pairs: Sequence[TokenizedPair], budget: int, known: Collection[int]
) -> Iterator[tuple[int, PairScores]]:
    """The scores of the pairs that are not known.

    Rows are packed as if none were known, because the last digits of a reward depend on its neighbors in the row.
    """
    device = next(model.parameters()).device
    missing = set(range(len(pairs))) - set(known)
    training = model.training
    model.eval()
    try:
        for row in pack(pairs, max([budget, *map(cost, pairs)])):
            if missing.isdisjoint(row):
                continue
            batch = collate(pairs, [row], pad_id=0).to(device)
            rewards, offsets = packed_rewards(model, batch)
            answers = [part.tolist() for part in rewards.split(offsets.diff().tolist())]
            for n, index in enumerate(batch.pairs):
                if index in missing:
                    yield index, pairs[index].read_whole(answers[2 * n], answers[2 * n + 1])
    finally:
        model.train(training)


def _one_by_one(
    reward: Reward,
    pairs: Sequence[TokenizedPair],
    prompts: Sequence[PromptLike] | None,
    known: Collection[int],
) -> Iterator[tuple[int, PairScores]]:
    for index, pair in enumerate(pairs):
        if index in known:
            continue
        prompt = Prompt(pair.prompt_ids if prompts is None else prompts[index], pair.index)
        answers = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            rewards = reward.score_answer(Prefix(prompt, pair.prompt_ids), ids)
            # Rewards by token, such as log-ratios, add up to the reward of a prefix.
            answers.append([reward.answer_reward(rewards[: i + 1]) for i in range(len(rewards))])
        yield index, pair.read_whole(answers[0], answers[1])


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuses numbers that are not fractions of an answer.

    Raises:
        RGTGError: no fraction, or one outside (0, 1].
    """
    if not fractions:
        raise RGTGError("there is no fraction: use for example 0.1,0.25,0.5,0.75,1")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise RGTGError(
                f"fraction {fraction:g} of an answer is not in (0, 1]: use for example 0.5, or 1 for all"
            )


def verdicts(scores: Sequence[PairScores], fraction: float) -> list[float]:
    """For each pair, 1 where the chosen answer's prefix has the higher reward, ½ for a tie, else 0.

    Each answer is cut to ⌈fraction · n⌉ of its own n text tokens; fraction 1 is the whole answer, with EOS where it
    ended.
    """
    check_fractions([fraction])
    found = []
    for chosen, rejected in scores:
        better, worse = (answer[_length(len(answer), fraction) - 1] for answer in (chosen, rejected))
        found.append(1.0 if better > worse else 0.5 if better == worse else 0.0)
    return found


def _length(tokens: int, fraction: float) -> int:
    if fraction == 1:
        return tokens
    # 0.7 · 10 is 7.000000000000001 in floating point, and its prefix has 7 tokens.
    return max(1, math.ceil(fraction * (tokens - 1) - 1e-9))


def prefix_accuracy(
    scores: Sequence[PairScores], fractions: Sequence[float] = FRACTIONS
) -> list[FractionAccuracy]:
    """Accuracy on prefixes of each length, with Wilson's 95 % interval.

    Args:
        scores: as `score_pairs` gives them.
        fractions: fractions of each answer's own length, in (0, 1].

    Raises:
        RGTGError: no pairs, or a fraction out of range.
    """
    check_fractions(fractions)
    if not scores:
        raise RGTGError("there are no pairs to judge by: pass at least one")
    return [_accuracy(fraction, verdicts(scores, fraction)) for fraction in fractions]


def longer_wins(pairs: Sequence[TokenizedPair]) -> FractionAccuracy:
    """Accuracy of preferring the longer answer in tokens: the baseline of every accuracy."""
    return _accuracy(1.0, length_verdicts(pairs))


def length_verdicts(pairs: Sequence[TokenizedPair]) -> list[float]:
    """For each pair, 1 where the chosen answer has more tokens, ½ for as many, else 0."""
    lengths = [
        ([float(chosen)], [float(rejected)]) for chosen, rejected in (pair.text_lengths for pair in pairs)
    ]
    return verdicts(lengths, 1.0)


def differences(
    one: Sequence[PairScores],
    other: Sequence[PairScores],
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> list[AccuracyDifference]:
    """Accuracy of one reward model minus another's at each fraction, with a paired bootstrap interval.

    Args:
        one: scores of the first reward model.
        other: scores of the second, of the same pairs in the same order.
        fractions: fractions of each answer's own length, in (0, 1].
        seed: seed of the resampling.

    Raises:
        RGTGError: not the same number of pairs.
    """
    check_fractions(fractions)
    if len(one) != len(other) or not one:
        raise RGTGError(
            f"the reward models were scored on {len(one)} and {len(other)} pairs: compare them on the same pairs"
        )
    return [paired_bootstrap(f, verdicts(one, f), verdicts(other, f), seed) for f in fractions]


def paired_bootstrap(
    fraction: float, one: Sequence[float], other: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> AccuracyDifference:
    """Mean of `one` − `other` with the 2.5 % and 97.5 % quantiles of its mean over resampled pairs.

    Args:
        fraction: fraction of the answers that the verdicts are about.
        one: verdicts of the first reward model.
        other: verdicts of the second on the same pairs.
        seed: seed of the resampling.
        resamples: how often the pairs are resampled.
    """
    gaps = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    found = bootstrap_mean(gaps, seed, resamples)
    return AccuracyDifference(fraction, found.mean, (found.low, found.high), found.n)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: the p₀ with |p − p₀| ≤ z √(p₀(1 − p₀)/n) (Wilson 1927).

    Args:
        successes: out of n; halves come from ties.
    """
    share = successes / n
    center = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def _accuracy(fraction: float, found: Sequence[float]) -> FractionAccuracy:
    return FractionAccuracy(fraction, sum(found) / len(found), wilson(sum(found), len(found)), len(found))


def figure(
    curves: Mapping[str, Sequence[FractionAccuracy]],
    path: str | os.PathLike[str],
    baseline: FractionAccuracy | None = None,
    title: str = "",
) -> None:
    """Draws accuracy over the share of the answer that is read, one curve per reward model, intervals as bands.

    Args:
        curves: by the names of the reward models.
        path: .png, .svg or .pdf.
        baseline: longer wins, a horizontal line.
        title: title of the figure.

    Raises:
        RGTGError: matplotlib is missing, or the file cannot be written.
    """
    drawing = drawn(curves, baseline, title)
    kind = check_figure(Path(path))
    # The same points give the same file: a date would not.
    undated = {"Date": None} if kind == "svg" else None
    with replacing(Path(path)) as partial, plain_labels():
        drawing.savefig(partial, dpi=150, format=kind, metadata=undated)


def drawn(
    curves: Mapping[str, Sequence[FractionAccuracy]],
    baseline: FractionAccuracy | None = None,
    title: str = "",
) -> Figure:
    """The figure that `figure` writes, with the same arguments.

    Raises:
        RGTGError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    with plain_labels():
        drawing = Figure(figsize=(6, 3.8), layout="constrained")
        axes = drawing.subplots()
        for (name, points), color in zip(curves.items(), _colors(len(curves)), strict=True):
            ordered = sorted(points, key=lambda point: point.fraction)
            x = [100 * point.fraction for point in ordered]
            low, high = ([100 * point.ci95[side] for point in ordered] for side in (0, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            y = [100 * point.accuracy for point in ordered]
            axes.plot(x, y, color=color, marker="o", label=label(name))
        if baseline is not None:
            axes.axhline(100 * baseline.accuracy, color="#7f7f7f", linestyle="--", label="longer answer wins")
        axes.axhline(50, color="#bbbbbb", linestyle=":", label="chance")
        axes.set_xlabel("share of the answer read, %")
        axes.set_ylabel("chosen answer preferred, %")
        axes.set_title(label(title))
        axes.legend(fontsize="small")
    return drawing


@contextlib.contextmanager
def plain_labels() -> Iterator[None]:
    """A context in which matplotlib shows labels as plain text, without mathematics between dollar signs or TeX."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def label(name: str) -> str:
    """A name as a figure's label; matplotlib leaves out those that begin with an underscore."""
    shown = printable(" ".join(name.split()))
    return f" {shown}" if shown.startswith("_") else shown


def check_figure(path: Path) -> str:
    """Refuses a path that no figure can be written to, before the work for the figure begins.

    Returns:
        The format: "png", "svg" or "pdf".

    Raises:
        RGTGError: another ending, a path that cannot be written, or no matplotlib.
    """
    check_matplotlib()
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise RGTGError(f"cannot write the figure {path}: end its name in .png, .svg or .pdf")
    check_writable(path)
    return kind


def check_matplotlib() -> None:
    """Refuses work that ends in a figure, before it begins, where matplotlib is missing.

    Raises:
        RGTGError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RGTGError('figures need matplotlib: pip install "rgtg-fast[train]"')


def _colors(count: int) -> list[str]:
    palette = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    return [palette[i % len(palette)] for i in range(count)]
