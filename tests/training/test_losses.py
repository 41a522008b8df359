"""Every objective against its formula, written out term by term."""

from __future__ import annotations

import math

import pytest
import torch

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.losses import OBJECTIVES, Objective

LENGTHS = [3, 5, 4, 1, 2, 2]


def example() -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    """Rewards of three pairs, their offsets, and the rewards by answer."""
    rewards = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    answers = [part.tolist() for part in rewards.split(LENGTHS)]
    return rewards, offsets, answers


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_full_bt_compares_the_whole_answers() -> None:
    rewards, offsets, answers = example()
    terms = [softplus(answers[i + 1][-1] - answers[i][-1]) for i in (0, 2, 4)]
    assert Objective("full_bt").loss(rewards, offsets).item() == pytest.approx(sum(terms) / 3, rel=1e-12)


@pytest.mark.parametrize("mode", ["repeat_last", "truncate"])
def test_partial_bt_compares_every_prefix(mode: str) -> None:
    rewards, offsets, answers = example()
    terms = []
    for i in (0, 2, 4):
        chosen, rejected = answers[i], answers[i + 1]
        size = (max if mode == "repeat_last" else min)(len(chosen), len(rejected))
        terms += [
            softplus(rejected[min(t, len(rejected) - 1)] - chosen[min(t, len(chosen) - 1)])
            for t in range(size)
        ]
    objective = Objective("partial_bt", mode)
    assert objective.terms(offsets) == len(terms)
    assert objective.loss(rewards, offsets).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


@pytest.mark.parametrize("targets", [None, [0.3, -2.0, 1.5, 0.0, 0.9, 0.1]])
@pytest.mark.parametrize(
    ("name", "weight"), [("cd_fudge", "prefix"), ("cd_fudge", "pair"), ("rad", "prefix")]
)
def test_regression_follows_its_formula(name: str, weight: str, targets: list[float] | None) -> None:
    rewards, offsets, answers = example()
    total, count = 0.0, 0.0
    for answer, target in zip(answers, targets or [1.0, 0.0] * 3, strict=True):
        n = len(answer)
        if name == "rad":
            total += sum(t * (r - target) ** 2 for t, r in enumerate(answer, 1)) / (n * (n + 1) / 2)
            count += 1
        else:
            share = 1.0 if weight == "prefix" else 1.0 / n
            total += share * sum(0.5 * (r - target) ** 2 for r in answer)
            count += n if weight == "prefix" else 1
    objective = Objective(name, weight=weight)
    given = None if targets is None else torch.tensor(targets)
    assert objective.terms(offsets) == count
    # The targets came as float32.
    assert objective.loss(rewards, offsets, targets=given).item() == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("weight", ["prefix", "pair"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up_to_the_whole(name: str, weight: str) -> None:
    rewards, offsets, _ = example()
    objective = Objective(name, weight=weight)
    cut = int(offsets[2])
    normalizer = torch.tensor(objective.terms(offsets), dtype=torch.float64)
    parts = [
        objective.loss(rewards[:cut], offsets[:3], normalizer),
        objective.loss(rewards[cut:], offsets[2:] - cut, normalizer),
    ]
    assert sum(parts).item() == pytest.approx(objective.loss(rewards, offsets).item(), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    rewards, offsets, _ = example()
    torch.autograd.gradcheck(lambda r: Objective(name).loss(r, offsets), rewards.requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "dpo"}, "objective='dpo'"),
        ({"mode": "pad"}, "mode='pad'"),
        ({"weight": "token"}, "weight='token'"),
    ],
)
def test_unknown_names_are_refused(arguments: dict[str, str], said: str) -> None:
    with pytest.raises(RGTGError, match=said):
        Objective(**arguments)


def test_only_the_published_mode_pads_with_eos() -> None:
    assert Objective("partial_bt", "eos").eos_padding
    assert not Objective("partial_bt", "repeat_last").eos_padding
    assert not Objective("full_bt", "eos").eos_padding
