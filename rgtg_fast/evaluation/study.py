"""Runs a study: prompts × methods × settings × seeds are decoded and judged, and nothing is done twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.accuracy import check_matplotlib
from rgtg_fast.evaluation.answers import ANSWERS, FIELDS, Answer, Answers
from rgtg_fast.evaluation.journal import Journal
from rgtg_fast.evaluation.judge import conflicts
from rgtg_fast.evaluation.prompts import StudyPrompt, load_prompts
from rgtg_fast.evaluation.ratings import (
    ACCURACY,
    SCORE_FIELDS,
    SCORES,
    Agreement,
    Ratings,
    Scores,
    agreements,
)
from rgtg_fast.evaluation.settings import Cell, Study
from rgtg_fast.models.loading import ModelAndTokenizer, load_causal_lm, resolve_dtype

CONFIG = "config.yaml"


@dataclass
class Results:
    """Everything that a study found.

    Attributes:
        study: its settings. base: name of the base model. prompts: those that were answered.
        answers: rows of answers.jsonl of each cell. scores: judge → cell → (prompt index, seed) → reward.
        agreements: accuracy of judges and guides on preference pairs, where the study names some.
        warnings: what a reader has to know before the numbers.
    """

    study: Study
    base: str
    prompts: list[StudyPrompt]
    answers: dict[Cell, list[Answer]]
    scores: Scores
    agreements: list[Agreement]
    warnings: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Cell:
        """What differences and win rates are against."""
        return next(cell for cell in self.answers if cell.method == self.study.baseline)


def run_study(
    study: Study,
    source: str | ModelAndTokenizer | None = None,
    base_name: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Results:
    """Decodes what is missing, rates what is not rated yet, and returns everything.

    Args:
        study: the settings.
        source: what to load as the base model where that is not `study.model`.
        base_name: the base model's name in the results, `study.model` by default.
        say: receives lines about the progress.

    Returns:
        The results; `rgtg_fast.evaluation.report.write_report` makes tables and pages of them.

    Raises:
        RGTGError: a setting, a file or a model that cannot work; what was finished before stays in the output folder.

    Example:
        >>> results = run_study(Study.load("eval.yaml"))  # doctest: +SKIP
    """
    given = source if source is not None else study.model
    if given is None:
        raise RGTGError("the study names no model: set model to a path or hub id")
    # A study runs for hours, and its report should not fail for want of a package then.
    check_matplotlib()
    folder = Path(study.output)
    _keep_config(study, folder)
    base = load_causal_lm(given, study.device, study.dtype)
    name = base_name or study.model or base[0].config._name_or_path
    if base[1] is None:
        raise RGTGError(f"{name} came without a tokenizer: a study needs texts, pass (model, tokenizer)")
    prompts, notes = load_prompts(study, base[1])
    cells = study.cells()
    guides = list(dict.fromkeys(cell.reward for cell in cells if cell.reward is not None))
    # First of all: who reads on without knowing it is misled.
    warnings = conflicts({judge: settings.model for judge, settings in study.judges.items()}, guides) + notes
    with Journal(folder / ANSWERS, FIELDS) as journal:
        decoding = Answers(study, base, name, journal, prompts, say)
        answers = decoding.of(cells)
    exact = functools.cache(lambda: base if isinstance(given, tuple) else _exact(study, given, base))
    with Journal(folder / SCORES, SCORE_FIELDS) as journal:
        rating = Ratings(study, exact, journal, say)
        scores = rating.of(answers)
    with Journal(folder / ACCURACY, ("told", "accuracy", "longer_wins", "above")) as journal:
        agreed = agreements(study, exact, journal, guides, say)
    warnings += decoding.warnings + rating.warnings
    return Results(study, name, prompts, answers, scores, agreed, warnings)


def _exact(study: Study, source: str, base: ModelAndTokenizer) -> ModelAndTokenizer:
    """The base model in the judges' dtype."""
    if study.judge_dtype is None or resolve_dtype(study.judge_dtype, base[0].device) == base[0].dtype:
        return base
    return load_causal_lm(source, study.device, study.judge_dtype)


def _keep_config(study: Study, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(study.as_yaml(), encoding="utf-8")
    except OSError as error:
        raise RGTGError(f"cannot write to {folder}: {error.strerror or error}") from error
