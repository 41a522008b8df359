"""The results of a study as numbers: a row for every method, setting and judge, and for every two methods."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rgtg_fast.evaluation.study import metrics
from rgtg_fast.evaluation.study.metrics import bootstrap_mean, by_prompt
from rgtg_fast.evaluation.study.run import Results
from rgtg_fast.evaluation.study.settings import Cell
from rgtg_fast.files import replacing

SUMMARY, PAIRWISE = "summary.csv", "pairwise.csv"
COLUMNS = (
    "method",
    "beta",
    "top_k",
    "temperature",
    "seeds",
    "answers",
    "cut",
    "judge",
    "read_at",
    "reward",
    "reward_se",
    "reward_diff",
    "diff_lo",
    "diff_hi",
    "win_rate",
    "win_lo",
    "win_hi",
    "length",
    "length_matched_diff",
    "lm_lo",
    "lm_hi",
    "diversity",
    "coherence",
    "rouge_l",
    "kl",
    "tokens_per_second",
    "lm_calls_per_token",
    "rm_calls_per_token",
    "lm_tokens_per_token",
    "rm_tokens_per_token",
)
Row = dict[str, Any]
# Rewards of a cell's answers, averaged over the samples of each prompt.
PromptRewards = Mapping[int, float]


@dataclass(frozen=True)
class Comparison:
    """The reward of one method minus that of another, on the same prompts.

    Attributes:
        judge: name of the judge.
        method: name of the method.
        other: the other method's name.
        settings: number of settings that the method was run with.
        other_settings: number of settings that the other method was run with.
        difference: mean over prompts.
        low: lower end of its 95 % interval by the paired bootstrap.
        high: upper end.
        prompts: the prompts that both answered.
    """

    judge: str
    method: str
    other: str
    settings: int
    other_settings: int
    difference: float
    low: float
    high: float
    prompts: int


def summarize(results: Results) -> list[Row]:
    """One row for every cell and judge, in the columns of summary.csv; None where there is no number.

    Without a judge there is one row for every cell, without rewards.
    """
    cells, baseline = list(results.answers), results.baseline
    measured = _texts(results)
    rows = []
    for judge in list(results.study.judges) or [None]:
        for cell in cells:
            row: Row = dict.fromkeys(COLUMNS)
            row |= _setting(cell, results.answers[cell]) | measured[cell] | _costs(results.answers[cell])
            if judge is not None and results.answers[cell]:
                row["judge"] = judge
                finished = row["cut"] and results.study.judges[judge].ends == "finished"
                row["read_at"] = "end token, or last token where cut" if finished else "end token"
                row |= _rewards(results, judge, cell, baseline)
            rows.append(row)
    return rows


def comparisons(results: Results) -> list[Comparison]:
    """Every two methods under every judge, each at settings that were chosen on other prompts."""
    found = []
    for judge in results.study.judges:
        scored = {cell: _scored(results, judge, cell) for cell in results.answers}
        rewards = {cell: _by_prompt(of_cell) for cell, of_cell in scored.items()}
        found += compare(judge, rewards)
    return found


def at_setting_of_other_half(cells: Mapping[Cell, PromptRewards]) -> dict[int, float]:
    """A method's reward for every prompt, at the setting that did best on the other half of the prompts.

    The setting that does best on some prompts looks better on them than it is. Here no prompt takes part in choosing
    the setting that it is counted with (two-fold cross-validation; halves are every other prompt), so that a method
    gains nothing from being run with many settings.

    Args:
        cells: rewards by prompt of each of the method's settings; only prompts that all settings have are counted.
    """
    shared = sorted(set.intersection(*(set(rewards) for rewards in cells.values())))
    found = {}
    for half in (0, 1):
        own, others = shared[half::2], shared[1 - half :: 2]
        # A single prompt has no other half.
        chosen = max(cells.values(), key=lambda rewards, on=others or own: sum(rewards[i] for i in on))
        found |= {index: chosen[index] for index in own}
    return found


def compare(judge: str, rewards: Mapping[Cell, PromptRewards]) -> list[Comparison]:
    """Compares every two methods, the later one of the study minus the earlier one.

    Args:
        judge: its name.
        rewards: by prompt, of every cell that was judged.
    """
    methods: dict[str, dict[Cell, PromptRewards]] = {}
    for cell, of_prompts in rewards.items():
        if of_prompts:
            methods.setdefault(cell.method, {})[cell] = of_prompts
    at = {name: at_setting_of_other_half(cells) for name, cells in methods.items()}
    found = []
    for other, method in itertools.combinations(methods, 2):
        shared = sorted(set(at[method]) & set(at[other]))
        if shared:
            gap = bootstrap_mean([at[method][i] - at[other][i] for i in shared])
            tried = len(methods[method]), len(methods[other])
            found.append(Comparison(judge, method, other, *tried, gap.mean, gap.low, gap.high, len(shared)))
    return found


def gaps(rows: Sequence[Row]) -> list[str]:
    """A line for every column that is empty, with the reason."""
    notes = []
    if all(row["rouge_l"] is None for row in rows):
        installed = metrics.rouge_l() is not None
        why = (
            "no method has several samples"
            if installed
            else 'rouge-score is missing: pip install "rgtg-fast[evaluate]"'
        )
        notes.append(f"rouge_l is empty: {why}")
    if metrics.SentenceEncoder.installed() is None:
        notes.append(
            'coherence is empty: its sentence encoder is missing: install it with pip install "rgtg-fast[evaluate]"'
        )
    unknown = dict.fromkeys(row["method"] for row in rows if row["kl"] is None)
    if unknown:
        notes.append(
            f"kl is empty for {', '.join(unknown)}: only token-by-token sampling knows the probability of its answers"
        )
    return notes


def _setting(cell: Cell, answers: Sequence[Mapping[str, Any]]) -> Row:
    return {
        "method": cell.method,
        "beta": cell.beta,
        "top_k": cell.top_k,
        "temperature": cell.temperature,
        "seeds": len({row["seed"] for row in answers}),
        "answers": len(answers),
        "cut": sum(row.get("finish") == "length" for row in answers),
    }


def _rewards(results: Results, judge: str, cell: Cell, baseline: Cell) -> Row:
    own, other = _scored(results, judge, cell), _scored(results, judge, baseline)
    means = _by_prompt(own)
    row: Row = {
        "reward": _mean(list(means.values())),
        "reward_se": metrics.standard_error(list(means.values())),
    }
    shared = sorted(set(own) & set(other))
    if cell == baseline or not shared:
        return row
    gaps = bootstrap_mean([means[i] - _mean([reward for reward, _ in other[i]]) for i in shared])
    wins = bootstrap_mean(
        [metrics.win_rate([a for a, _ in own[i]], [b for b, _ in other[i]]) for i in shared]
    )
    row |= _estimate("reward_diff", "diff", gaps) | _estimate("win_rate", "win", wins)
    matched = [metrics.length_matched_difference(own[i], other[i]) for i in shared]
    found = [gap for gap in matched if gap is not None]
    if found:
        row |= _estimate("length_matched_diff", "lm", bootstrap_mean(found))
    return row


def _estimate(name: str, stem: str, found: metrics.Interval) -> Row:
    """A mean and the ends of its interval, which are None for a single prompt: resampling it gives no interval."""
    low, high = (found.low, found.high) if found.n > 1 else (None, None)
    return {name: found.mean, f"{stem}_lo": low, f"{stem}_hi": high}


def _scored(results: Results, judge: str, cell: Cell) -> dict[int, list[tuple[float, int]]]:
    """(reward, length) of the answers of each prompt."""
    found: dict[int, list[tuple[float, int]]] = {}
    scores = results.scores[judge][cell]
    for row in results.answers[cell]:
        found.setdefault(row["index"], []).append((scores[row["index"], row["seed"]], row["tokens"]))
    return found


def _by_prompt(scored: Mapping[int, Sequence[tuple[float, int]]]) -> dict[int, float]:
    """The mean reward of each prompt's answers."""
    return {index: _mean([reward for reward, _ in found]) for index, found in scored.items()}


def _texts(results: Results) -> dict[Cell, Row]:
    """Length, diversity, coherence, overlap and divergence of each cell's answers."""
    overlap, encoder = metrics.rouge_l(), metrics.SentenceEncoder.installed()
    coherence = _coherence(results, encoder)
    found = {}
    for cell, answers in results.answers.items():
        if not answers:
            found[cell] = {}
            continue
        row: Row = {
            "length": _mean(list(by_prompt(answers, lambda a: a["tokens"]).values())),
            "diversity": _mean(list(by_prompt(answers, lambda a: metrics.diversity(a["response"])).values())),
            "kl": _divergence(answers),
        }
        if coherence is not None:
            near = by_prompt(answers, lambda a: coherence[_text(a["prompt"]), a["response"]])
            row["coherence"] = _mean(list(near.values()))
        if overlap is not None:
            samples: dict[int, list[str]] = {}
            for answer in answers:
                samples.setdefault(answer["index"], []).append(answer["response"])
            alike = [value for value in map(overlap, samples.values()) if value is not None]
            row["rouge_l"] = _mean(alike) if alike else None
        found[cell] = row
    return found


def _coherence(results: Results, encoder: Path | None) -> dict[tuple[str, str], float] | None:
    if encoder is None:
        return None
    pairs = [(_text(a["prompt"]), a["response"]) for answers in results.answers.values() for a in answers]
    unique = list(dict.fromkeys(pairs))
    values = metrics.SentenceEncoder(encoder).coherence([p for p, _ in unique], [a for _, a in unique])
    return dict(zip(unique, values, strict=True))


def _text(prompt: Any) -> str:
    """The prompt's text: the last message of a chat, or the text itself."""
    return str(prompt[-1]["content"]) if isinstance(prompt, list) else str(prompt)


def _divergence(answers: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over prompts of log p(y) − log π(y), an estimate of KL(p ‖ π); None where p is not known."""
    if any(row.get("guided_logprob") is None for row in answers):
        return None
    return _mean(list(by_prompt(answers, lambda a: a["guided_logprob"] - a["base_logprob"]).values()))


def _costs(answers: Sequence[Mapping[str, Any]]) -> Row:
    if not answers or any(row.get("seconds") is None for row in answers):
        return {}
    sums = {
        name: sum(row[name] for row in answers)
        for name in ("decided", "seconds", "lm_calls", "rm_calls", "lm_tokens", "rm_tokens")
    }
    per_token = ("lm_calls", "rm_calls", "lm_tokens", "rm_tokens")
    return {
        "tokens_per_second": sums["decided"] / sums["seconds"],
        **{f"{name}_per_token": sums[name] / sums["decided"] for name in per_token},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_summary(rows: Sequence[Row], path: Path) -> None:
    """Writes summary.csv."""
    _write(rows, COLUMNS, path)


def write_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes pairwise.csv."""
    _write([asdict(one) for one in comparisons], [field.name for field in fields(Comparison)], path)


def _write(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Writes numbers with six digits, and an empty field where there is no number."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _shown(row[name]) for name in columns} for row in rows)


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    # A spreadsheet would read such a name as a formula.
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value
