"""Runs a study: decodes and judges prompts × methods × settings × seeds; finished work is not repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.accuracy import check_matplotlib
from rgtg_fast.evaluation.jsonl import JsonlWriter
from rgtg_fast.evaluation.judge import conflicts, folders_of
from rgtg_fast.evaluation.study.answers import ANSWERS, FIELDS, Answer, Answers
from rgtg_fast.evaluation.study.prompts import StudyPrompt, load_prompts
from rgtg_fast.evaluation.study.ratings import (
    ACCURACY,
    SCORE_FIELDS,
    SCORES,
    Agreement,
    JudgeRewards,
    Ratings,
    agreements,
)
from rgtg_fast.evaluation.study.settings import Cell, Study
from rgtg_fast.files import reason, write_text
from rgtg_fast.models.loading import ModelAndTokenizer, load_causal_lm, resolve_dtype

CONFIG = "config.yaml"


@dataclass
class Results:
    """Everything that a study found.

    Attributes:
        study: settings of the study.
        base: name of the base model.
        prompts: the prompts that were answered.
        answers: rows of answers.jsonl of each cell.
        scores: judge → cell → (prompt index, seed) → reward.
        agreements: accuracy of the reward models on preference pairs, where the study names some.
        warnings: what a reader has to know before the numbers.
    """

    study: Study
    base: str
    prompts: list[StudyPrompt]
    answers: dict[Cell, list[Answer]]
    scores: JudgeRewards
    agreements: list[Agreement]
    warnings: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Cell:
        """The cell that differences and win rates are measured against."""
        return next(cell for cell in self.answers if cell.method == self.study.baseline)


def run_study(
    study: Study,
    source: str | ModelAndTokenizer | None = None,
    base_name: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Results:
    """Decodes what is missing, rates what is not rated yet, and returns everything.

    Args:
        study: the settings.
        source: what to load as the base model where that is not `study.model`.
        base_name: the base model's name in the results, `study.model` by default.
        progress: receives lines about the progress.

    Returns:
        The results; `rgtg_fast.evaluation.study.report.write_report` makes tables and pages of them.

    Raises:
        RGTGError: a setting, a file or a model that cannot work; what was finished before stays in the output folder.

    Example:
        >>> results = run_study(Study.load("eval.yaml"))  # doctest: +SKIP
    """
    given = source if source is not None else study.model
    if given is None:
        raise RGTGError("the study names no model: set model to a path or hub id")
    # The report needs matplotlib: fail before hours of decoding.
    check_matplotlib()
    folder = Path(study.output)
    _keep_config(study, folder)
    cells = study.cells()
    check_present(study)

    base = load_causal_lm(given, study.device, study.dtype)
    name = base_name or study.model or base[0].config._name_or_path
    if base[1] is None:
        raise RGTGError(f"{name} came without a tokenizer: a study needs texts, pass (model, tokenizer)")
    bases = functools.cache(functools.partial(_in_dtype, study, given, base))
    prompts, notes = load_prompts(study, base[1])
    rewards = list(dict.fromkeys(cell.reward for cell in cells if cell.reward is not None))
    # These come first in the report: without them the numbers mislead.
    warnings = conflicts({judge: settings.model for judge, settings in study.judges.items()}, rewards) + notes
    with JsonlWriter(folder / ANSWERS, FIELDS) as answers_file:
        decoding = Answers(study, bases, name, answers_file, prompts, progress)
        answers = decoding.of(cells)
    with JsonlWriter(folder / SCORES, SCORE_FIELDS) as scores_file:
        rating = Ratings(study, bases, scores_file, progress)
        scores = rating.of(answers)
    with JsonlWriter(folder / ACCURACY, ("told", "accuracy", "longer_wins", "above")) as accuracy_file:
        agreed = agreements(study, bases, accuracy_file, rewards, progress)
    warnings += decoding.warnings + rating.warnings
    return Results(study, name, prompts, answers, scores, agreed, warnings)


def _in_dtype(
    study: Study, given: str | ModelAndTokenizer, base: ModelAndTokenizer, dtype: str | None
) -> ModelAndTokenizer:
    """The base model in a dtype, None for the study's."""
    # A model that the caller passed stays in its dtype.
    if dtype is None or isinstance(given, tuple) or resolve_dtype(dtype, base[0].device) == base[0].dtype:
        return base
    return load_causal_lm(given, study.device, dtype)


def check_present(study: Study) -> None:
    """Refuses a study with a missing model or file before anything is decoded.

    Raises:
        RGTGError: names the first that is missing, and the method or judge that needs it.
    """
    wanted = [(f"judge {name}", judge.model) for name, judge in study.judges.items()]
    for cell in study.cells():
        wanted += [(f"method {cell.method}", name) for name in (cell.reward, cell.model) if name is not None]
        if cell.outputs is not None and not Path(cell.outputs).is_file():
            raise RGTGError(f"method {cell.method}: the file {cell.outputs} does not exist: check the path")
    for who, name in wanted:
        for folder in folders_of(name):
            path = Path(folder)
            # Anything else may be a hub id.
            local = path.is_absolute() or len(path.parts) > 2
            files = [path / file for file in ("config.json", "adapter_config.json")]
            if (path.exists() or local) and not any(file.is_file() for file in files):
                raise RGTGError(f"{who}: {folder} contains no model: check the path, or make the model first")


def _keep_config(study: Study, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, study.as_yaml())
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot write to {folder}: {reason(error)}") from error
