"""The report of a study: summary.csv, report.md with its figures, and report.html, one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.study import page, plots
from rgtg_fast.evaluation.study.metrics import rank_correlation
from rgtg_fast.evaluation.study.page import Drawing, Notes, Part, Section, SideBySide, Table, Text
from rgtg_fast.evaluation.study.ratings import read_at
from rgtg_fast.evaluation.study.run import Results
from rgtg_fast.evaluation.study.settings import Cell
from rgtg_fast.evaluation.study.summary import (
    PAIRWISE,
    SUMMARY,
    Comparison,
    Row,
    comparisons,
    gaps,
    summarize,
    write_comparisons,
    write_summary,
)
from rgtg_fast.files import reason, write_text

MARKDOWN, HTML, FIGURES = "report.md", "report.html", "figures"
TITLE = "Decoding methods compared"
# Characters of an answer that the report shows.
_SHOWN = 600


def write_report(results: Results, facts: Mapping[str, Any] | None = None) -> list[Row]:
    """Summarizes a study and writes its tables and pages into its output folder.

    Args:
        results: results of `run_study`.
        facts: about the machine and the versions, name to value, for the beginning of the report.

    Returns:
        The rows of summary.csv.

    Raises:
        RGTGError: matplotlib is missing, or a file cannot be written.
    """
    folder = Path(results.study.output)
    rows, compared = summarize(results), comparisons(results)
    sections = report(results, rows, compared, facts or {})
    drawings = [part for section in sections for part in section.parts if isinstance(part, Drawing)]
    try:
        write_summary(rows, folder / SUMMARY)
        write_comparisons(compared, folder / PAIRWISE)
        (folder / FIGURES).mkdir(exist_ok=True)
        for drawing in drawings:
            write_text(folder / FIGURES / f"{drawing.name}.svg", drawing.svg)
        write_text(folder / MARKDOWN, page.markdown(TITLE, sections, FIGURES))
        write_text(folder / HTML, page.html(TITLE, sections))
    except OSError as error:
        raise RGTGError(f"cannot write the report in {folder}: {reason(error)}") from error
    return rows


def report(
    results: Results, rows: Sequence[Row], compared: Sequence[Comparison], facts: Mapping[str, Any]
) -> list[Section]:
    """The parts of the report, warnings first.

    Args:
        results: results of `run_study`.
        rows: as `summarize` gives them.
        compared: as `comparisons` gives them.
        facts: as in `write_report`.
    """
    warnings = (*results.warnings, *gaps(rows))
    sections = [Section("", (Notes(warnings, urgent=True),))] if warnings else []
    sections.append(Section("", (Text(_what(results)), *_facts(facts))))
    for judge in results.study.judges:
        own = [row for row in rows if row["judge"] == judge]
        sections.append(Section(f"Rewards under the judge {judge}", _rewards(own, results, judge)))
        pairs = [one for one in compared if one.judge == judge]
        if pairs:
            parts = (_against_each_other(pairs), Text(_AGAINST))
            sections.append(Section(f"Methods against each other, by {judge}", parts))
        sections.append(Section(f"What a better answer costs, by {judge}", _figures(own, judge, results)))
    once = list({_name(row): row for row in rows}.values())
    sections.append(Section("Texts and costs", (_texts(once), Text(_TEXTS))))
    checks = _checks(results)
    if checks:
        sections.append(Section("The guide, the judge, or length?", (*checks, Text(_CHECKS))))
    if results.agreements:
        sections.append(Section("Agreement with people", _agreement(results)))
    examples = _examples(results)
    if examples:
        sections.append(Section("Answers side by side", examples))
    return sections


def _what(results: Results) -> str:
    study = results.study
    return (
        f"{results.base} answers {len(results.prompts)} prompts with at most {study.max_new_tokens} tokens, "
        f"{len(study.seeds)} samples each (greedy methods: one), compared with {results.baseline.label}."
    )


def _facts(facts: Mapping[str, Any]) -> tuple[Part, ...]:
    text = ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    return (Text(f"{text}."),) if text else ()


_REWARDS = (
    "Rewards are means over prompts of the mean over seeds, ± the standard error over prompts. Differences, win rates "
    "(share of answers with the higher reward, ties one half) and length-matched differences (pairs of answers to the "
    "same prompt whose lengths differ by at most a tenth) are against the baseline, with 95 % intervals of the paired "
    "bootstrap over prompts. The intervals are of one comparison each: the best of many settings looks better than it "
    "is."
)
_AGAINST = (
    "The row's reward minus the column's on the same prompts; ▲ and ▼ where the 95 % interval of the paired bootstrap "
    "lies above or below 0 (pairwise.csv has the intervals, which are of one comparison each). A method that was run "
    "with several settings is counted, on each half of the prompts, with the one that did best on the other half: "
    "having tried many gives no advantage."
)
_TEXTS = (
    "Diversity is Π(1 − rep-n) for n = 2, 3, 4 over an answer's words; coherence the cosine similarity of prompt and "
    "answer; ROUGE-L the overlap between samples of one prompt, lower for more diverse ones; KL the divergence from "
    "the base model in nats an answer. Calls are the forwards that an answer took part in, tokens those that went "
    "through a model for it, both per token of the answer; prompts count in neither. Seconds are of the batched run, "
    "prompts included."
)
_CHECKS = (
    "Spearman's rank correlation over all answers of a method. Guide and judge: near 0, the guide asks for something "
    "else than the judge rewards. Judge and length: near 1, the judge counts words."
)


def _rewards(rows: Sequence[Row], results: Results, judge: str) -> tuple[Part, ...]:
    head = ("method", "β", "k", "τ", "answers", "reward", "difference", "win rate", "difference, same length")
    lines = tuple(
        (
            row["method"],
            _number(row["beta"], "g"),
            _number(row["top_k"], "d"),
            _number(row["temperature"], "g"),
            str(row["answers"]),
            f"{_number(row['reward'], '.3f')} ± {_number(row['reward_se'], '.3f')}",
            _interval(row["reward_diff"], row["diff_lo"], row["diff_hi"], "+.3f"),
            _interval(row["win_rate"], row["win_lo"], row["win_hi"], ".3f"),
            _interval(row["length_matched_diff"], row["lm_lo"], row["lm_hi"], "+.3f"),
        )
        for row in rows
    )
    answers = [row for found in results.answers.values() for row in found]
    text = read_at(answers, results.study.judges[judge])
    return Table(head, lines), Text(f"{text[:1].upper()}{text[1:]}. {_REWARDS}")


def _against_each_other(pairs: Sequence[Comparison]) -> Table:
    """A table of every method but the first against those before it."""
    rows = list(dict.fromkeys(one.method for one in pairs))
    columns = list(dict.fromkeys(one.other for one in pairs))
    cells = {(one.method, one.other): one for one in pairs}
    lines = []
    for row in rows:
        found = [cells.get((row, column)) for column in columns]
        lines.append((row, *("" if one is None else _gap(one) for one in found)))
    return Table(("", *columns), tuple(lines))


def _gap(one: Comparison) -> str:
    sign = " ▲" if one.low > 0 else " ▼" if one.high < 0 else ""
    return f"{one.difference:+.3f}{sign}"


def _figures(rows: Sequence[Row], judge: str, results: Results) -> tuple[Part, ...]:
    baseline = results.study.baseline
    drawn = (
        (
            "reward_over_beta",
            "Reward against the weight of the guide β",
            plots.reward_over_beta(rows, baseline),
        ),
        (
            "reward_over_kl",
            "Reward against the divergence from the base model",
            plots.reward_over_kl(rows, baseline),
        ),
        ("reward_over_speed", "Reward against tokens per second", plots.reward_over_speed(rows, baseline)),
    )
    several = len(results.study.judges) > 1
    parts: list[Part] = []
    for name, caption, svg in drawn:
        if svg is None:
            parts.append(Text(f"{caption}: no method has the numbers for it."))
            continue
        caption = f"{caption}; bars and bands are 95 % intervals."
        parts.append(Drawing(f"{name}_{file_name(judge)}" if several else name, caption, svg))
    return tuple(parts)


def _texts(rows: Sequence[Row]) -> Table:
    columns = (
        ("length", "length", ".1f"),
        ("diversity", "diversity", ".3f"),
        ("coherence", "coherence", ".3f"),
        ("ROUGE-L", "rouge_l", ".3f"),
        ("KL", "kl", ".2f"),
        ("tokens/s", "tokens_per_second", ".1f"),
        ("LM calls", "lm_calls_per_token", ".2f"),
        ("RM calls", "rm_calls_per_token", ".2f"),
        ("LM tokens", "lm_tokens_per_token", ".2f"),
        ("RM tokens", "rm_tokens_per_token", ".2f"),
    )
    lines = tuple((_name(row), *(_number(row[name], form) for _, name, form in columns)) for row in rows)
    return Table(("method", *(head for head, _, _ in columns)), lines)


def _checks(results: Results) -> tuple[Part, ...]:
    """Rank correlations that show whether reward model and judge disagree, and whether the judge prefers length."""
    parts: list[Part] = []
    for judge, cells in results.scores.items():
        lines = []
        for cell, answers in results.answers.items():
            rewards = [cells[cell][row["index"], row["seed"]] for row in answers]
            guided = [row["guide_reward"] for row in answers if row.get("guide_reward") is not None]
            known = rank_correlation(guided, rewards) if guided and len(guided) == len(rewards) else None
            lengths = rank_correlation([row["tokens"] for row in answers], rewards) if answers else None
            lines.append((cell.label, _number(known, "+.2f"), _number(lengths, "+.2f")))
        parts.append(Table((f"judge {judge}", "guide and judge", "judge and length"), tuple(lines)))
    return tuple(parts)


def _agreement(results: Results) -> tuple[Part, ...]:
    found = results.agreements
    pairs = Path(results.study.pairs or "").name.partition(".")[0]
    title = f"{pairs}, {found[0].accuracy[-1]['n']} pairs"
    fractions = [point["fraction"] for point in found[0].accuracy]
    head = ("prefers the chosen answer, of which it reads", *(f"{100 * f:g} %" for f in fractions))
    lines = []
    for one in found:
        role = "judge" if one.judge else "guide"
        cells = (_spread(p["accuracy"], p["ci95"], ".3f") for p in one.accuracy)
        lines.append((f"{role} {one.name}", *cells))
        gap = (_spread(p["difference"], p["ci95"], "+.3f") for p in one.above)
        lines.append((f"{one.name} − longer wins", *gap))
    longer = found[0].longer_wins
    text = (
        f"{title}. The longer answer is the chosen one in {_spread(longer['accuracy'], longer['ci95'], '.3f')} of "
        "them: what an accuracy has to be compared with."
    )
    text += f" At 100 %, {found[0].read_at}." if found[0].read_at else ""
    svg = plots.accuracy_over_length(found, title)
    drawing = () if svg is None else (Drawing("accuracy", "Accuracy by the share of the answer read", svg),)
    return Text(text), Table(head, tuple(lines)), *drawing


def _examples(results: Results) -> tuple[Part, ...]:
    """The first sample of every cell for some prompts, evenly spread over the study."""
    count = min(results.study.examples, len(results.prompts))
    chosen = [results.prompts[i * len(results.prompts) // count] for i in range(count)]
    parts: list[Part] = []
    for prompt in chosen:
        answers = []
        for cell, rows in results.answers.items():
            row = next((row for row in rows if row["index"] == prompt.index), None)
            if row is None:
                continue
            text = row["response"] if len(row["response"]) <= _SHOWN else row["response"][:_SHOWN] + "…"
            answers.append((cell.label, _known(results, cell, row), text or "(empty)"))
        parts.append(SideBySide(prompt.text, tuple(answers)))
    return tuple(parts)


def _known(results: Results, cell: Cell, row: Mapping[str, Any]) -> str:
    rewards = [
        f"{judge} {cells[cell][row['index'], row['seed']]:+.2f}" for judge, cells in results.scores.items()
    ]
    return ", ".join([*rewards, f"{row['tokens']} tokens"])


def _name(row: Row) -> str:
    parts = (("β", row["beta"]), ("k", row["top_k"]), ("τ", row["temperature"]))
    text = ", ".join(f"{name} = {value:g}" for name, value in parts if value is not None)
    return f"{row['method']} ({text})" if text else row["method"]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:{form}}"


def _interval(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return "–"
    if low is None:
        return f"{_number(value, form)} [–]"
    return f"{_number(value, form)} [{_number(low, form)}, {_number(high, form)}]"


def _spread(value: float, ci95: Sequence[float], form: str) -> str:
    return _interval(value, ci95[0], ci95[1], form)


def file_name(name: str) -> str:
    """A judge's name as part of the name of a figure's file."""
    return "".join(character if character.isalnum() else "_" for character in name)
