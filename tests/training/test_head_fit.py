"""The score head's fit on the frozen model: its optimum, its features, and what training makes of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.head_fit import POINTS, compared_prefixes, differences, fit
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import Lora, add_adapters, load_base
from rgtg_fast.training.packing import answer_positions, collate, pack, packed_hidden, pretrained
from rgtg_fast.training.trainer import PartialRewardTrainer
from tests.training.support import save_lm, tokenized

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="LoRA training needs peft")


def test_the_fit_is_the_minimum():
    torch.manual_seed(0)
    truth = torch.randn(5)
    features = torch.randn(400, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0])
    features[(features @ truth) < torch.randn(400)] *= -1
    weights = torch.rand(400)
    found = fit(features, weights, 0.1)

    def loss(w: torch.Tensor) -> torch.Tensor:
        d = features.double()
        share = weights.double() / weights.double().sum()
        penalty = 0.05 * ((d.std(0) + 1e-6) * w).square().sum()
        return (share * F.softplus(-(d @ w))).sum() + penalty

    w = found.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(w), w)
    assert (gradient / features.std(0)).abs().max() < 1e-5
    assert loss(w) < loss(torch.zeros(5).double()) - 0.05


@pytest.mark.parametrize(
    ("objective", "chosen", "rejected", "mine", "theirs"),
    [
        (Objective("full_bt"), 7, 3, [6], [2]),
        (Objective("partial_bt", "repeat_last"), 2, 4, [0, 1, 1, 1], [0, 1, 2, 3]),
        (Objective("partial_bt", "truncate"), 2, 4, [0, 1], [0, 1]),
    ],
)
def test_the_prefixes_that_are_compared(objective, chosen, rejected, mine, theirs):
    assert compared_prefixes(chosen, rejected, objective) == (mine, theirs)


def test_long_answers_are_looked_at_in_a_few_places():
    mine, theirs = compared_prefixes(300, 200, Objective("partial_bt", "repeat_last"))
    assert len(mine) == len(theirs) == POINTS
    assert (mine[0], mine[-1], theirs[-1]) == (0, 299, 199)


@needs_peft
@pytest.mark.parametrize("name", ["partial_bt", "full_bt"])
@pytest.mark.parametrize("fork", [0, 2])
def test_the_head_is_fitted_on_the_models_own_states(tmp_path: Path, name: str, fork: int):
    base = save_lm(tmp_path / "base")
    pairs = tokenized(24)
    objective = Objective(name, "repeat_last", "pair")
    model, _ = load_base(base)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=1, use_cpu=True, report_to="none"
    )
    trainer = PartialRewardTrainer(
        add_adapters(model, fork, Lora(2, 4.0)),
        arguments,
        pairs,
        objective=objective,
        token_budget=64,
        fork_layer=fork,
        trunk_cache=tmp_path / "trunk" if fork else None,
    )
    trainer.fit_head(0.1)
    if trainer.lower is not None:
        trainer.lower.restore()
    found, weights = [], []
    with torch.no_grad():
        for row in pack(pairs, 64):
            batch = collate(pairs, [row], 0)
            rows, columns, offsets = answer_positions(batch)
            hidden = packed_hidden(trainer.model, batch)[rows, columns]
            features, shares = differences(hidden, offsets, objective)
            found.append(features)
            weights.append(shares)
    expected = fit(torch.cat(found), torch.cat(weights), 0.1)
    state = pretrained(trainer.model).state_dict()
    head = next(value for key, value in state.items() if key.startswith("score.modules_to_save"))
    torch.testing.assert_close(head.flatten(), expected, rtol=1e-3, atol=1e-4)
    # The other copy of the head, which PEFT keeps for adapters that are off, stays what it was.
    original = next(value for key, value in state.items() if key.startswith("score.original"))
    assert not original.any()
    scores = trainer.score(trainer.train_pairs)
    right = sum(chosen[-1] > rejected[-1] for chosen, rejected in scores)
    assert right > 0.8 * len(pairs)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_fit": 0.0}, "head_fit=0.0 is not above 0"),
        ({"head_fit": float("nan")}, "head_fit=nan is not above 0"),
        ({"head_fit": 0.3, "objective": "cd_fudge"}, "the objective is cd_fudge"),
    ],
)
def test_bad_settings_are_one_line(settings, said):
    with pytest.raises(RGTGError, match=said) as caught:
        TrainConfig(**settings)
    assert "\n" not in str(caught.value)


@needs_peft
def test_a_fit_under_bfloat16(tmp_path: Path):
    base = save_lm(tmp_path / "base")
    pairs = tokenized(24)
    heads = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_base(base, dtype)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), bf16=dtype == torch.bfloat16, use_cpu=True, report_to="none"
        )
        trainer = PartialRewardTrainer(add_adapters(model, 1, Lora(2, 4.0)), arguments, pairs)
        trainer.fit_head(0.3)
        state = trainer.model.state_dict()
        heads.append(next(v.flatten() for k, v in state.items() if "score.modules_to_save" in k))
    assert heads[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(heads[0], heads[1], dim=0) > 0.99
