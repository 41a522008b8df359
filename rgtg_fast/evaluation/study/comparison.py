"""Methods against each other, with no advantage for the one that was tried with more settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from rgtg_fast.evaluation.study.metrics import bootstrap_mean
from rgtg_fast.evaluation.study.settings import Cell

# Rewards of a cell's answers, averaged over the samples of each prompt.
PromptRewards = Mapping[int, float]


@dataclass(frozen=True)
class Comparison:
    """The reward of one method minus that of another, on the same prompts.

    Attributes:
        judge: by name. method, other: the two. settings: how many each was tried with.
        difference: mean over prompts. low, high: its 95 % interval by the paired bootstrap. prompts: how many.
    """

    judge: str
    method: str
    other: str
    settings: int
    other_settings: int
    difference: float
    low: float
    high: float
    prompts: int


def at_setting_of_other_half(cells: Mapping[Cell, PromptRewards]) -> dict[int, float]:
    """A method's reward for every prompt, at the setting that did best on the other half of the prompts.

    The best of many settings on some prompts looks better there than it is. Here no prompt takes part in choosing the
    setting that it is counted with (two-fold cross-validation; halves are every other prompt).

    Args:
        cells: rewards by prompt of each of the method's settings; prompts that all of them have are counted.
    """
    shared = sorted(set.intersection(*(set(rewards) for rewards in cells.values())))
    found = {}
    for half in (0, 1):
        own, others = shared[half::2], shared[1 - half :: 2]
        # A single prompt has no other half.
        chosen = max(cells.values(), key=lambda rewards, on=others or own: sum(rewards[i] for i in on))
        found |= {index: chosen[index] for index in own}
    return found


def compare(judge: str, rewards: Mapping[Cell, PromptRewards]) -> list[Comparison]:
    """Every two methods, the later one of a study first.

    Args:
        judge: name. rewards: by prompt, of every cell that was judged.
    """
    methods: dict[str, dict[Cell, PromptRewards]] = {}
    for cell, of_prompts in rewards.items():
        if of_prompts:
            methods.setdefault(cell.method, {})[cell] = of_prompts
    at = {name: at_setting_of_other_half(cells) for name, cells in methods.items()}
    found = []
    for other, method in itertools.combinations(methods, 2):
        shared = sorted(set(at[method]) & set(at[other]))
        if shared:
            gap = bootstrap_mean([at[method][i] - at[other][i] for i in shared])
            tried = len(methods[method]), len(methods[other])
            found.append(Comparison(judge, method, other, *tried, gap.mean, gap.low, gap.high, len(shared)))
    return found
