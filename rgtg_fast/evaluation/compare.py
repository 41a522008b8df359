"""Compares reward models on preference pairs: how often each prefers the chosen answer, and by how much they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgtg_fast.bundled import embedded
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.accuracy import (
    FRACTIONS,
    PairScores,
    differences,
    length_verdicts,
    longer_wins,
    paired_bootstrap,
    prefix_accuracy,
    score_pairs,
    verdicts,
)
from rgtg_fast.evaluation.jsonl import JsonlWriter
from rgtg_fast.evaluation.judge import load_classifier, weights_of
from rgtg_fast.models.loading import ModelAndTokenizer, load_causal_lm
from rgtg_fast.rewards import SequenceReward, named_guide
from rgtg_fast.training.data import DataReport, PreferencePair, TokenizedPair, load_pairs, tokenize_pairs

# Fields of a row of the file that keeps scores.
_KEPT = ("guide", "pair", "chosen", "rejected")
# Lines of progress for each reward model.
_PROGRESS_LINES = 10

Loaded = tuple[list[PreferencePair], DataReport]


@dataclass(frozen=True)
class PairData:
    """Which pairs, and how they become token ids.

    Attributes:
        source: file or data set, as in `load_pairs`.
        layout: layout of its rows, as in `load_pairs`.
        limit: pairs to take at most.
        max_length: tokens of a prompt and its longer answer.
        token_budget: tokens of a packed row.
        chat: texts become chat messages where the tokenizer has a chat template.
        keep: JSON Lines file that each pair's rewards are written to as they come; those in it are not computed again.
        answers_ended: as in `load_pairs`.
    """

    source: str
    layout: str = "auto"
    limit: int | None = None
    max_length: int = 1024
    token_budget: int = 2048
    chat: bool = True
    keep: Path | None = None
    answers_ended: str = "auto"

    def load(self, chat: bool = True) -> Loaded:
        """The pairs, and which were left out."""
        layout: Any = self.layout
        return load_pairs(self.source, layout, chat=chat, answers_ended=self.answers_ended)


@dataclass(frozen=True)
class _Scored:
    """One reward model with its scores.

    Attributes:
        name: name of the reward, as given.
        pairs: pairs as tokenized by its tokenizer.
        scores: scores of each pair, the rewards of all prefixes of both answers.
        report: which pairs were left out.
    """

    name: str
    pairs: list[TokenizedPair]
    scores: list[PairScores]
    report: DataReport


def compare_rewards(
    rewards: Sequence[str],
    data: PairData,
    fractions: Sequence[float] = FRACTIONS,
    *,
    lm: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    label: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[dict[str, Any], DataReport]:
    """Scores preference pairs with reward models and compares their accuracies.

    Args:
        rewards: names of reward models, as in `named_guide`.
        data: the pairs.
        fractions: fractions of each answer to judge by, in (0, 1].
        lm: base model, path or hub id; None for the embedded one, or for an adapter's own.
        device: as in `RewardGuidedDecoder.from_pretrained`.
        dtype: as in `RewardGuidedDecoder.from_pretrained`.
        label: of the only reward model, as in `RewardGuidedDecoder.from_pretrained`.
        progress: receives lines about the progress.

    Returns:
        What `rgtg-fast accuracy --json` prints, and which pairs the first reward model left out.

    Raises:
        RGTGError: data or models that cannot be used, or a reward that is NaN.
    """
    # Before any model is loaded, so that an error in the data is reported at once.
    loaded = data.load()
    if label is not None and len(rewards) > 1:
        raise RGTGError(
            f"label={label!r} chooses a label of one reward model and there are {len(rewards)}: score one"
        )
    scoring = _Scoring(data, lm, device, dtype, label, progress)
    with nullcontext() if data.keep is None else JsonlWriter(data.keep, _KEPT) as kept:
        scored = [scoring.score(name, loaded, kept) for name in rewards]
    return _report(scored, fractions, data), scored[0].report


class _Scoring:
    """Scores the pairs with one reward model after the other; a base model is loaded once for all of them."""

    def __init__(
        self,
        data: PairData,
        lm: str | None,
        device: str | None,
        dtype: str | None,
        label: str | None,
        progress: Callable[[str], None],
    ):
        self.data, self.lm, self.device, self.dtype, self.progress = data, lm, device, dtype, progress
        self.label = label
        self._bases: dict[str | None, ModelAndTokenizer] = {}

    def _base(self, lm: str | None) -> ModelAndTokenizer:
        if lm not in self._bases:
            source = lm if lm is not None else str(embedded.default_model(self.progress))
            self._bases[lm] = load_causal_lm(source, self.device, self.dtype)
        return self._bases[lm]

    def _scorer(self, reward: str) -> tuple[Any, Any]:
        """A model that scores packed rows, or a reward bound to the base model; and the tokenizer."""
        named = named_guide(reward)
        if type(named) is SequenceReward:
            return load_classifier(str(named.source), self._base, self.lm, self.label)
        decoder = RewardGuidedDecoder.from_pretrained(
            self._base(self.lm), reward=reward, label=self.label, device=self.device, dtype=self.dtype
        )
        return decoder.reward, decoder.tokenizer

    def score(self, reward: str, loaded: Loaded, kept: JsonlWriter | None) -> _Scored:
        """Scores the pairs with one reward model.

        Args:
            reward: its name.
            loaded: the pairs with their texts as chat messages.
            kept: scores of earlier runs; new ones are added.
        """
        data, progress = self.data, self.progress
        progress(f"Loading {reward}")
        scorer, tokenizer = self._scorer(reward)
        assert tokenizer is not None
        chat = data.chat and tokenizer.chat_template is not None
        pairs, report = loaded if chat else data.load(chat=False)
        pairs = pairs[: data.limit]
        tokenized, fitted = tokenize_pairs(pairs, tokenizer, data.max_length, chat=chat)
        texts = {pair.index: pair.prompt for pair in pairs}
        prompts: list[Any] = [texts[pair.index] for pair in tokenized]
        if chat:
            prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        names = [_identity(pair) for pair in tokenized]
        known: dict[int, PairScores] = {}
        settings = self._settings(reward)
        if kept is not None:
            rows = {
                row["pair"]: (row["chosen"], row["rejected"]) for row in kept.rows if row["guide"] == settings
            }
            known = {position: rows[name] for position, name in enumerate(names) if name in rows}
        if known:
            progress(f"{reward}: {len(known)} of {len(names)} pairs scored before")
        done, shown = len(known), len(known) * _PROGRESS_LINES // max(1, len(names))

        def found(position: int, scores: PairScores) -> None:
            nonlocal done, shown
            if kept is not None:
                chosen, rejected = scores
                kept.add({"guide": settings, "pair": names[position], "chosen": chosen, "rejected": rejected})
            done += 1
            if done * _PROGRESS_LINES // len(names) > shown:
                shown = done * _PROGRESS_LINES // len(names)
                progress(f"{reward}: {done} of {len(names)} pairs scored")

        scores = score_pairs(scorer, tokenized, data.token_budget, prompts, known, found)
        return _Scored(reward, tokenized, scores, report + fitted)

    def _settings(self, reward: str) -> dict[str, Any]:
        """What the scores of a reward model depend on besides the pair, as kept rows name it."""
        base = str(self.lm or embedded.NAME)
        weights = [*weights_of(reward).values(), *weights_of(base).values()]
        found = {"reward": reward, "lm": base, "weights": sorted(weights), "dtype": self.dtype}
        return found if self.label is None else {**found, "label": self.label}


def _identity(pair: TokenizedPair) -> str:
    """A pair's tokens as a hash."""
    ids = json.dumps([list(part) for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
    return hashlib.sha256(ids.encode()).hexdigest()[:24]


def _report(scored: list[_Scored], fractions: Sequence[float], data: PairData) -> dict[str, Any]:
    models = []
    for one in scored:
        longer = length_verdicts(one.pairs)
        above = [paired_bootstrap(f, verdicts(one.scores, f), longer).as_dict() for f in fractions]
        accuracy = [point.as_dict() for point in prefix_accuracy(one.scores, fractions)]
        counts = one.report.as_dict()
        models.append({"reward": one.name, "accuracy": accuracy, "above_longer_wins": above, "data": counts})
    compared = [
        gap
        for i, one in enumerate(scored)
        for other in scored[i + 1 :]
        for gap in _gaps(one, other, fractions)
    ]
    first = scored[0]
    limited = {} if data.limit is None else {"limit": data.limit}
    baseline = longer_wins(first.pairs).as_dict()
    del baseline["fraction"]
    return {
        "accuracy": models[0]["accuracy"],
        "longer_wins": baseline,
        "data": {"file": data.source, **limited, **first.report.as_dict()},
        "read_at": first.report.end_line(),
        "guides": models,
        "differences": compared,
    }


def _gaps(one: _Scored, other: _Scored, fractions: Sequence[float]) -> list[dict[str, Any]]:
    """Differences on the pairs that both have scored: tokenizers may drop different ones."""
    theirs = {pair.index: scores for pair, scores in zip(other.pairs, other.scores, strict=True)}
    both = [
        (scores, theirs[pair.index])
        for pair, scores in zip(one.pairs, one.scores, strict=True)
        if pair.index in theirs
    ]
    gaps = differences([a for a, _ in both], [b for _, b in both], fractions)
    return [{"rewards": [one.name, other.name], **gap.as_dict()} for gap in gaps]
