"""The cost of every method, and what a study found about its answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from benchmarks.method_costs import GATE, MEASURED, STRATEGY
from benchmarks.report.pages import Row, grouped, interval
from benchmarks.report.study import setting
from rgtg_fast.methods import METHODS, POLICIES, STRATEGIES

NO_COSTS = "Not measured yet: run `python -m benchmarks.method_costs`."
NO_EVIDENCE = "Not measured yet: run `python -m benchmarks.study`."
BASELINE = "unguided"
# Names in studies of what the tables of methods call otherwise.
_ALSO = {"best-of": "best_of_n", "cards": "segment", "proxy-tuning": "eft", "t-reg": "treg"}


def costs_block(rows: Sequence[Row]) -> str:
    """Forwards and tokens of every method, beside what the table of methods says."""
    parts = []
    for measured in grouped(rows, ("model", "dtype", "rows", "k")):
        first = measured[0]
        lines = [
            f"{first['model']}, {first['rows']} prompts at once, k = {first['k']}, {first['dtype']}; counted where "
            f"tokens enter the models (rgtg-fast {first['rgtg_fast']}, {first['commit']}). A step decides one token of "
            "every row.",
            "",
            "| method | reward | LM forwards a step | LM tokens a token | RM forwards a step | RM tokens a token "
            "| as the table says |",
            "|---|---|--:|--:|--:|--:|---|",
        ]
        for same in grouped(measured, ("guide", *MEASURED, *(f"table_{name}" for name in MEASURED))):
            row = same[0]
            wrong = [name for name in MEASURED if row[name] != row[f"table_{name}"]]
            told = (
                "no: " + ", ".join(f"{row[f'table_{name}']} {_words(name)}" for name in wrong)
                if wrong
                else "yes"
            )
            names = ", ".join(each["method"] for each in same)
            lines.append(
                f"| {names} | {row['guide']} | {' | '.join(row[name] for name in MEASURED)} | {told} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_COSTS


def strategies_block(rows: Sequence[Row]) -> str:
    """Tokens of every strategy, and of sparse guidance, beside what the table of strategies says."""
    table = {strategy.name: (strategy.lm, strategy.reward) for strategy in STRATEGIES}
    table[GATE] = ("n", "k·guided tokens, and the skipped ones once")
    lines = [
        "| strategy | measured with | LM tokens a token of the answer | the table, for n tokens "
        "| RM tokens a token of the answer | the table, for n tokens |",
        "|---|---|--:|---|--:|---|",
    ]
    for row in rows:
        lm, reward = table[row["method"]]
        lines.append(
            f"| {row['method']} | {_settings(row['settings'])} | {float(row['lm_tokens_per_token']):.3g} | {lm} "
            f"| {float(row['reward_tokens_per_token']):.3g} | {reward} |"
        )
    return "\n".join(lines) if rows else NO_COSTS


def cost_blocks(rows: Sequence[Row]) -> str:
    """The tables of methods and of strategies."""
    strategies = [row for row in rows if row["guide"] == STRATEGY]
    both = [costs_block([row for row in rows if row["guide"] != STRATEGY])]
    return "\n\n".join([*both, strategies_block(strategies)] if strategies else both)


def source_of(method: str) -> str:
    """Where a study's method comes from, found by the beginning of its name; a dash where nothing is known.

    Example:
        >>> source_of("PARGS-G"), source_of("best-of-10"), source_of("unguided")
        ('arXiv 2406.07780', '–', '–')
    """
    known = {each.name: each.source for each in (*METHODS, *STRATEGIES, *POLICIES)}
    known |= {also: known[name] for also, name in _ALSO.items()}
    name = re.sub(r"[\s_]+", "-", method.strip().lower())
    for begin in sorted(known, key=len, reverse=True):
        if re.match(rf"{re.escape(begin.replace('_', '-'))}(?![a-z])", name):
            return known[begin] or "–"
    return "–"


def evidence_block(rows: Sequence[Row], pairs: Sequence[Row]) -> str:
    """The judged reward of every method at its best setting, beside its cost.

    Args:
        rows: of the summary.csv that `rgtg-fast evaluate` writes.
        pairs: of its pairwise.csv.
    """
    judged = [row for row in rows if row["judge"] and row["reward"]]
    parts = []
    for of_judge in grouped(judged, ("judge",)):
        judge, baseline = of_judge[0]["judge"], _baseline(of_judge)
        gains = {
            pair["method"]: pair for pair in pairs if pair["judge"] == judge and pair["other"] == baseline
        }
        lines = [
            f"Judge `{judge}`. *Difference*: to `{baseline}` on the same prompts, in brackets its 95 % interval over "
            "prompts.",
            "",
            "| method | source | best setting | judge's reward there ± SE | difference | above? | tokens/s "
            "| LM forwards, tokens | RM forwards, tokens |",
            "|---|---|---|--:|--:|---|--:|--:|--:|",
        ]
        for same in grouped(of_judge, ("method",)):
            best = max(same, key=lambda row: float(row["reward"]))
            lines.append(_evidence(best, len(same), gains.get(best["method"])))
        parts.append("\n".join(lines))
    if not parts:
        return NO_EVIDENCE
    notes = (
        "A method that was run with several settings stands at the one that this judge rates highest on these prompts, "
        "and that reward flatters it; its *difference* does not: there every prompt is counted at the setting that did "
        "best on the other half of the prompts. The study's report has all settings. *Above?*: yes where the whole "
        "interval is above 0, no where all of it is below, otherwise unclear. Forwards are those that a row took part "
        "in; forwards and tokens are per token of the answers."
    )
    return "\n\n".join([*parts, notes])


def _evidence(row: Row, settings: int, gain: Row | None) -> str:
    cells = [
        row["method"],
        source_of(row["method"]),
        setting(row) + (f" (of {settings})" if settings > 1 else ""),
        f"{float(row['reward']):.3f} ± {float(row['reward_se']):.3f}" if row["reward_se"] else row["reward"],
        "–",
        "–",
    ]
    if gain is not None:
        cells[4] = interval(gain, ("difference", "low", "high"), "+.3f")
        cells[5] = "yes" if float(gain["low"]) > 0 else "no" if float(gain["high"]) < 0 else "unclear"
    cells.append(_number(row["tokens_per_second"]))
    for owner in ("lm", "rm"):
        calls, tokens = row[f"{owner}_calls_per_token"], row[f"{owner}_tokens_per_token"]
        cells.append(f"{_number(calls)}, {_number(tokens)}" if calls or tokens else "–")
    return f"| {' | '.join(cells)} |"


def _baseline(rows: Sequence[Row]) -> str:
    """The method that the others are compared with: the only one without a difference."""
    return next((row["method"] for row in rows if not row["reward_diff"]), BASELINE)


def _number(text: str) -> str:
    if not text or not math.isfinite(float(text)):
        return "–"
    return f"{float(text):.3g}"


def _settings(text: str) -> str:
    """`BestOfN(n=4, top_k=None)` as `BestOfN(n=4)`: what is not set is left out, and numbers are short."""
    kept = [
        part for part in re.split(r",\s*", text.partition("(")[2].rstrip(")")) if not part.endswith("=None")
    ]
    return ", ".join(re.sub(r"(\d+\.\d{3})\d+", r"\1", part) for part in kept)


def _words(name: str) -> str:
    return name.replace("_", " ")
