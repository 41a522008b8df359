"""The ratings of a study: every answer by every judge, and how often reward models agree with people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgtg_fast.evaluation.accuracy import (
    FRACTIONS,
    length_verdicts,
    longer_wins,
    paired_bootstrap,
    prefix_accuracy,
    score_pairs,
    verdicts,
)
from rgtg_fast.evaluation.jsonl import JsonlWriter, plain
from rgtg_fast.evaluation.judge import Judge, Rating, folders_of, weights_of
from rgtg_fast.evaluation.study.answers import Answer, Bases
from rgtg_fast.evaluation.study.settings import Cell, JudgeSettings, Study, canonical
from rgtg_fast.training.data import PreferencePair, ends_text, load_pairs, tokenize_pairs

SCORES, ACCURACY = "scores.jsonl", "accuracy.jsonl"
SCORE_FIELDS = ("method", "setting", "index", "seed", "judge", "told", "answer", "ended", "unended")
# Lines about the progress of one judge.
PROGRESS_LINES = 5
# Most tokens of a preference pair's prompt and longer answer.
MAX_LENGTH = 1024
# judge → cell → (prompt index, seed) → reward
JudgeRewards = dict[str, dict[Cell, dict[tuple[int, int], float]]]


class Ratings:
    """Rates every answer with every judge; ratings that are in the file already are kept.

    Args:
        study: the settings.
        bases: gives the study's model in a dtype.
        scores_file: scores.jsonl.
        progress: receives lines about the progress.

    Attributes:
        warnings: what a reader of the results has to know.
    """

    def __init__(
        self,
        study: Study,
        bases: Bases,
        scores_file: JsonlWriter,
        progress: Callable[[str], None],
    ):
        self.study, self.bases, self.scores_file, self.progress = study, bases, scores_file, progress
        self.warnings: list[str] = []
        if scores_file.truncated:
            self.warnings.append(
                f"the last line of {SCORES} had been cut off: it was removed and rated again"
            )

    def of(self, answers: Mapping[Cell, Sequence[Answer]]) -> JudgeRewards:
        """The reward of every answer under every judge; what is missing is rated.

        Raises:
            RGTGError: a judge that cannot be loaded, or a reward that is NaN.
        """
        return {name: self._by(name, judge, answers) for name, judge in self.study.judges.items()}

    def _by(
        self, name: str, judge: JudgeSettings, answers: Mapping[Cell, Sequence[Answer]]
    ) -> dict[Cell, dict[tuple[int, int], float]]:
        settings = {
            "model": judge.model,
            "weights": sorted(weights_of(judge.model).values()),
            "dtype": self.study.judge_dtype or self.study.dtype,
        }
        known, present = self._present(name, settings)
        rows = [(row, identity(row)) for found in answers.values() for row in found]
        missing = [(row, text) for row, text in rows if _place(row, text) not in present]
        unread = {text: row for row, text in missing if text not in known}
        self.progress(
            f"judge {name}: {len(rows) - len(missing)} ratings present, {len(unread)} texts to rate"
        )
        waiting: dict[str, list[Answer]] = {}
        for row, text in missing:
            waiting.setdefault(text, []).append(row)
        for text, rating in self._rated(name, judge, unread):
            known[text] = rating
            self._write(name, settings, text, rating, waiting.pop(text))
        for text, rated in waiting.items():
            self._write(name, settings, text, known[text], rated)
        return {
            cell: {(row["index"], row["seed"]): reward(known[identity(row)], row, judge) for row in found}
            for cell, found in answers.items()
        }

    def _present(
        self, name: str, settings: dict[str, Any]
    ) -> tuple[dict[str, Rating], set[tuple[str, str, int, str]]]:
        """A judge's ratings by text, and the answers that have a row under the judge's name."""
        rows = [row for row in self.scores_file.rows if row["told"] == settings]
        known = {row["answer"]: Rating(row["ended"], row["unended"]) for row in rows}
        return known, {_place(row, row["answer"]) for row in rows if row["judge"] == name}

    def _rated(
        self, name: str, judge: JudgeSettings, unread: Mapping[str, Answer]
    ) -> Iterator[tuple[str, Rating]]:
        if not unread:
            return
        rater = Judge(judge.model, self.bases(self.study.judge_dtype))
        texts, rows = list(unread), list(unread.values())
        ratings = rater.rate([row["prompt"] for row in rows], [row["response"] for row in rows])
        step = max(1, len(texts) // PROGRESS_LINES)
        for done, (index, rating) in enumerate(ratings, 1):
            if done % step == 0:
                self.progress(f"judge {name}: {done} of {len(texts)} texts rated")
            yield texts[index], rating

    def _write(
        self, name: str, settings: dict[str, Any], text: str, rating: Rating, rows: Sequence[Answer]
    ) -> None:
        judge = self.study.judges[name]
        for row in rows:
            place = {key: row[key] for key in ("method", "setting", "index", "seed")}
            values = {"reward": reward(rating, row, judge), **asdict(rating)}
            self.scores_file.add({**place, "judge": name, "told": settings, "answer": text, **values})


def reward(rating: Rating, answer: Answer, judge: JudgeSettings) -> float:
    """The one of a judge's two rewards that counts for an answer."""
    cut = judge.ends == "finished" and answer.get("finish") == "length"
    return rating.unended if cut else rating.ended


def read_at(answers: Sequence[Answer], judge: JudgeSettings) -> str:
    """A sentence that says at which token a judge read some answers."""
    finishes = [row.get("finish") for row in answers]
    cut, unstated = finishes.count("length"), finishes.count(None)
    if judge.ends == "finished":
        return ends_text(len(answers) - cut, cut, unstated)
    behind = f"whole answers are read at an end token, which is put behind all {len(answers)}"
    return f"{behind}, the {cut} that were cut included" if cut else behind


def identity(answer: Answer) -> str:
    """Hash of what a judge reads of an answer: a text that occurs twice is rated once."""
    read = json.dumps([answer["prompt"], answer["response"]], sort_keys=True)
    return hashlib.sha256(read.encode()).hexdigest()[:24]


def _place(row: Mapping[str, Any], text: str) -> tuple[str, str, int, str]:
    return row["method"], canonical(row["setting"]), row["seed"], text


@dataclass(frozen=True)
class Agreement:
    """How often a model prefers the answer that people chose.

    Attributes:
        name: name in the tables.
        model: name of the model.
        judge: whether it is a judge; else it guides the decoding.
        accuracy: at each fraction of the answers, as `FractionAccuracy.as_dict` gives it.
        longer_wins: the same of the baseline that prefers the longer answer.
        above: accuracy minus that on the same pairs, as `AccuracyDifference.as_dict` gives it.
        read_at: a sentence that says at which token it read whole answers.
    """

    name: str
    model: str
    judge: bool
    accuracy: list[dict[str, Any]]
    longer_wins: dict[str, Any]
    above: list[dict[str, Any]]
    read_at: str = ""


def agreements(
    study: Study,
    bases: Bases,
    accuracy_file: JsonlWriter,
    rewards: Sequence[str],
    progress: Callable[[str], None],
) -> list[Agreement]:
    """Accuracy of the judges and of the reward models that guide the decoding, by how much of the answers they read.

    Args:
        study: names the pairs.
        bases: as in `Ratings`.
        accuracy_file: accuracy.jsonl.
        rewards: names of the rewards that guide the decoding.
        progress: receives lines about the progress.

    Raises:
        RGTGError: pairs that cannot be read, or a model that cannot be loaded.
    """
    if study.pairs is None:
        return []
    pairs, _ = load_pairs(study.pairs, answers_ended=study.answers_ended)
    pairs = pairs[: study.pairs_limit]
    # Where no answer is known to have been cut, the pairs are their texts alone.
    parts = [[p.prompt, p.chosen, p.rejected, *([p.ended] if False in p.ended else [])] for p in pairs]
    content = json.dumps(parts)
    data = hashlib.sha256(content.encode()).hexdigest()[:16]
    models: dict[str, str] = {}
    for name, settings in study.judges.items():
        models.setdefault(settings.model, name)
    # A reward without files of its own, such as contrastive prompts, was not trained on preferences.
    models |= {name: name for name in rewards if folders_of(name) and name not in models}
    found = []
    for model, name in models.items():
        settings = {
            "model": model,
            "weights": sorted(weights_of(model).values()),
            "data": data,
            "dtype": study.dtype,
        }
        row = next((row for row in accuracy_file.rows if row["told"] == settings), None)
        if row is None:
            progress(f"{name}: {len(pairs)} preference pairs")
            row = {"told": settings, **_agreement(Judge(model, bases(study.judge_dtype)), pairs, study)}
            accuracy_file.add(row)
        judge = name in study.judges
        numbers = row["accuracy"], row["longer_wins"], row["above"]
        found.append(Agreement(name, model, judge, *numbers, row.get("read_at", "")))
    return found


def _agreement(judge: Judge, pairs: Sequence[PreferencePair], study: Study) -> dict[str, Any]:
    chat = study.chat and judge.template is not None
    tokenized, fitted = tokenize_pairs(pairs, judge.tokenizer, MAX_LENGTH, judge.template, chat=chat)
    prompts = {pair.index: pair.prompt for pair in pairs}
    given: list[Any] = [prompts[pair.index] for pair in tokenized]
    if chat:
        given = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in given]
    scores = score_pairs(judge.scorer, tokenized, judge.budget, given)
    longer = length_verdicts(tokenized)
    return plain(
        {
            "accuracy": [point.as_dict() for point in prefix_accuracy(scores)],
            "longer_wins": longer_wins(tokenized).as_dict(),
            "above": [paired_bootstrap(f, verdicts(scores, f), longer).as_dict() for f in FRACTIONS],
            "read_at": fitted.end_line(),
        }
    )
