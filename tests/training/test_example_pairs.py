"""The project's own pairs: every row gives a pair, and the longer answer does not give the chosen one away."""

from __future__ import annotations

from pathlib import Path

from rgtg_fast.training.data import load_pairs, split_by_prompt

PAIRS = Path(__file__).parents[2] / "examples" / "preferences.jsonl"


def test_every_row_is_a_pair():
    pairs, report = load_pairs(PAIRS)
    assert report.kept == report.read >= 120
    assert len({pair.opening for pair in pairs}) == len(pairs)
    assert sum(len(pair.prompt) > 1 for pair in pairs) >= 15
    train, held_out = split_by_prompt(pairs)
    assert len(train) + len(held_out) == len(pairs)


def test_about_half_of_the_chosen_answers_are_the_longer_ones():
    pairs, _ = load_pairs(PAIRS)
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    assert 0.4 < longer / len(pairs) < 0.6
