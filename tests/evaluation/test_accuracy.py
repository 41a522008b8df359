"""Accuracy by prefix length: the cut, ties, intervals, the paired bootstrap, packed and one-by-one scores alike."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from rgtg_fast import ContrastiveReward, FunctionReward, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.evaluation.accuracy import (
    FractionAccuracy,
    differences,
    figure,
    longer_wins,
    paired_bootstrap,
    prefix_accuracy,
    score_pairs,
    verdicts,
    wilson,
)
from rgtg_fast.training.data import TokenizedPair, load_pairs, tokenize_pairs
from rgtg_fast.training.packing import use_packed_attention
from tests.conftest import make_lm, make_rm, make_tokenizer

PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 10, 1], [11, 1], 0),
    TokenizedPair([12], [13, 1], [14, 15, 16, 17, 18, 1], 1),
    TokenizedPair([20, 21], [22, 23, 1], [24, 25, 1], 5),
]


@pytest.mark.parametrize(
    ("tokens", "fraction", "length"),
    [
        (10, 0.1, 1),
        (10, 0.25, 3),
        (10, 0.5, 5),
        (10, 0.7, 7),
        (10, 0.99, 10),
        (1, 0.1, 1),
        (3, 0.5, 2),
        (7, 1e-9, 1),
    ],
)
def test_a_prefix_is_a_share_of_the_answers_own_text(tokens: int, fraction: float, length: int) -> None:
    """Rewards that are their own position tell which one was read; EOS comes after the text."""
    positions = [float(i) for i in range(1, tokens + 2)]
    for mine, verdict in ((length - 0.5, 1.0), (length, 0.5), (length + 0.5, 0.0)):
        assert verdicts([(positions, [mine, mine])], fraction) == [verdict]


def test_all_of_an_answer_includes_its_eos() -> None:
    assert verdicts([([1.0, 2.0, 9.0], [3.0, 4.0])], 1.0) == [1.0]
    assert verdicts([([1.0, 2.0, 9.0], [3.0, 4.0])], 0.999) == [0.0]


def test_accuracy_counts_ties_half() -> None:
    scores = [([1.0, 0.0], [0.0, 0.0]), ([0.0, 1.0], [1.0, 1.0]), ([2.0, 3.0], [2.0, 1.0])]
    half, whole = prefix_accuracy(scores, [0.5, 1])
    assert (half.fraction, half.accuracy, half.n) == (0.5, 0.5, 3)
    assert (whole.fraction, whole.n) == (1, 3)
    assert whole.accuracy == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert whole.ci95[0] < whole.accuracy < whole.ci95[1]
    assert set(whole.as_dict()) == {"fraction", "accuracy", "ci95", "n"}


@settings(deadline=None)
@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_is_scipys(n: int, share: float) -> None:
    k = round(share * n)
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_longer_wins() -> None:
    baseline = longer_wins(PAIRS)
    assert baseline.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    assert baseline.n == 3


def test_paired_bootstrap_has_the_spread_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    one = (generator.random(500) < 0.7).astype(float).tolist()
    # Mostly the same verdicts: paired, they differ far less than two independent guides would.
    other = [1 - v if generator.random() < 0.1 else v for v in one]
    gap = paired_bootstrap(0.5, one, other)
    gaps = np.subtract(one, other)
    assert gap.difference == pytest.approx(gaps.mean())
    assert (gap.fraction, gap.n) == (0.5, 500)
    half = 1.96 * gaps.std() / math.sqrt(500)
    assert gap.ci95 == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.1 * half)
    few = [paired_bootstrap(0.5, one, other, seed, resamples=30).ci95 for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_paired_bootstrap_of_many_pairs_is_computed_in_portions() -> None:
    one, other = [1.0, 0.0] * 30_000, [0.0, 0.0] * 30_000
    gap = paired_bootstrap(1, one, other, resamples=200)
    assert gap.difference == 0.5
    assert 0.49 < gap.ci95[0] < 0.5 < gap.ci95[1] < 0.51


def test_differences_of_a_guide_to_itself_are_zero() -> None:
    scores = [([1.0, 0.0], [0.0, 0.0]), ([0.0, 1.0], [1.0, 1.0])]
    assert [(gap.difference, gap.ci95) for gap in differences(scores, scores, [0.5, 1])] == [(0, (0, 0))] * 2


def test_what_is_known_is_not_scored_again() -> None:
    tokenizer = make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), reward=SequenceReward((make_rm(), tokenizer))
    )
    model = make_rm()
    use_packed_attention(model)
    for guide in (model, decoder.reward):
        assert guide is not None
        every = score_pairs(guide, PAIRS)
        found = {}
        known = {1: ([5.0], [6.0])}
        assert score_pairs(guide, PAIRS, known=known, found=found.__setitem__) == [
            every[0],
            known[1],
            every[2],
        ]
        assert sorted(found) == [0, 2]
        assert score_pairs(guide, PAIRS, known=dict(enumerate(every))) == every


@pytest.mark.parametrize("budget", [4, 16, 2048])
def test_packed_scores_are_those_of_the_guide_in_its_decoder(budget: int) -> None:
    """Two ways to the same rewards: packed rows, and the guide's own forward over one answer."""
    tokenizer = make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), reward=SequenceReward((make_rm(), tokenizer))
    )
    assert decoder.reward is not None
    model = make_rm()
    use_packed_attention(model)
    found = {}
    packed = score_pairs(model, PAIRS, budget, found=found.__setitem__)
    single = score_pairs(decoder.reward, PAIRS)
    assert [found[position] for position in range(3)] == packed
    for pair, a, b in zip(PAIRS, packed, single, strict=True):
        for ids, mine, theirs in zip((pair.chosen_ids, pair.rejected_ids), a, b, strict=True):
            assert len(mine) == len(theirs) == len(ids)
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert np.std([reward for pair in packed for answer in pair for reward in answer]) > 0.1


def test_a_guide_by_token_adds_up() -> None:
    """Contrastive prompts give each token a log-ratio; a prefix is worth their sum."""
    tokenizer = make_tokenizer()
    guide = ContrastiveReward("w1 w2", "w3")
    RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=guide)
    rows = [{"prompt": [{"role": "user", "content": "w4"}], "chosen": "w5 w6 w7", "rejected": "w8"}]
    pairs, _ = tokenize_pairs(load_pairs(rows)[0], tokenizer)
    ((chosen, rejected),) = score_pairs(guide, pairs, prompts=[rows[0]["prompt"]])
    assert (len(chosen), len(rejected)) == (4, 2)
    from rgtg_fast import Prefix
    from rgtg_fast.models.prompts import Prompt

    tokens = guide.score_answer(Prefix(Prompt(rows[0]["prompt"]), pairs[0].prompt_ids), pairs[0].chosen_ids)
    assert chosen == pytest.approx(np.cumsum(tokens).tolist())


def test_a_function_that_knows_the_answer_is_always_right() -> None:
    def likes_even(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        seen = torch.tensor([[float((ids[-1:] % 2 == 0).sum())] for ids in prefix_ids])
        return seen + (candidates % 2 == 0)

    guide = FunctionReward(likes_even)
    RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), reward=guide)
    pairs = [TokenizedPair([3], [8, 10, 12, 14, 1], [9, 11, 13, 15, 1], i) for i in range(3)]
    assert [point.accuracy for point in prefix_accuracy(score_pairs(guide, pairs))] == [1] * 5


def test_a_model_in_training_stays_in_training() -> None:
    model = make_rm().train()
    use_packed_attention(model)
    score_pairs(model, PAIRS)
    assert model.training


def test_figure(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    curve = [FractionAccuracy(f, 0.5 + f / 10, (0.45 + f / 10, 0.55 + f / 10), 100) for f in (1.0, 0.5, 0.1)]
    path = tmp_path / "curves.svg"
    figure({"first guide": curve, "second guide": curve[:2]}, path, curve[0], "title")
    text = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for label in ("first guide", "second guide", "longer answer wins", "chance", "title"):
        assert label in text
    with pytest.raises(RGTGError, match=r"cannot write the figure .*curves\.xyz: end its name in \.png"):
        figure({"a": curve}, tmp_path / "curves.xyz")
    with pytest.raises(RGTGError, match=r"cannot write .*curves\.png: the folder .*none does not exist"):
        figure({"a": curve}, tmp_path / "none" / "curves.png")


def test_bad_input_is_named() -> None:
    scores = [([1.0, 0.0], [0.0, 0.0])]
    for fraction in (0, -0.5, 1.1, math.nan):
        with pytest.raises(RGTGError, match=r"of an answer is not in \(0, 1\]"):
            prefix_accuracy(scores, [fraction])
    with pytest.raises(RGTGError, match="there is no fraction"):
        prefix_accuracy(scores, [])
    with pytest.raises(RGTGError, match="there are no pairs to judge by"):
        prefix_accuracy([])
    with pytest.raises(RGTGError, match="scored on 1 and 2 pairs"):
        differences(scores, scores * 2)
    model = make_rm()
    use_packed_attention(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[24] = torch.nan
    with pytest.raises(RGTGError, match="a reward of pair 5 is NaN"):
        score_pairs(model, PAIRS)


def test_one_model_is_scored_in_rows_and_decoded_with_in_any_order() -> None:
    """Each sets the model's attention for itself; the owner may set another one in between."""
    tokenizer = make_tokenizer()
    alone = make_rm()
    use_packed_attention(alone)
    scores = score_pairs(alone, PAIRS)
    model = make_rm()
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), reward=SequenceReward((model, tokenizer)), engine="transformers"
    )
    right = decoder.generate("w1 w2", 6)[0]
    for change in (
        lambda: None,
        lambda: use_packed_attention(model),
        lambda: model.set_attn_implementation("sdpa"),
    ):
        change()
        assert score_pairs(model, PAIRS) == scores
        row = decoder.generate("w1 w2", 6)[0]
        assert (row.tokens, row.rewards) == (right.tokens, right.rewards)
