"""Names that have changed: the old ones give the same settings, with a warning; saved files keep theirs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rgtg_fast import RGTGError
from rgtg_fast.training.config import CommonConfig, TrainConfig
from rgtg_fast.training.launch import TrainResult, train_reward_model
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.policy.config import PolicyTrainConfig
from tests.training.support import rows, save_lm

CONFIGS: list[type[CommonConfig]] = [TrainConfig, PolicyTrainConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_fields(config: type[CommonConfig]) -> None:
    for old, new in config.RENAMED.items():
        value: Any = 0.5 if old == "warmup" else 8
        with pytest.warns(DeprecationWarning, match=f"{old}= is now {new}="):
            made = config(**{old: value})
        assert getattr(made, new) == value
        assert made.saved()[old] == value
        assert new not in made.saved()


def test_both_names_of_a_field() -> None:
    arguments: dict[str, Any] = {"epochs": 1, "num_train_epochs": 2}
    with (
        pytest.warns(DeprecationWarning, match="epochs= is now"),
        pytest.raises(RGTGError, match="old name of num_train_epochs"),
    ):
        TrainConfig(**arguments)


@pytest.mark.parametrize("make", [lambda mode: TrainConfig(mode=mode), lambda mode: Objective(mode=mode)])
def test_a_mode(make: Any) -> None:
    with pytest.warns(DeprecationWarning, match="mode='hold' is now mode='repeat_last'") as caught:
        made = make("hold")
    assert made == make("repeat_last")
    assert caught[0].filename == __file__


def test_saved_settings_have_the_old_names_and_values() -> None:
    saved = TrainConfig(num_train_epochs=3).saved()
    assert (saved["epochs"], saved["mode"]) == (3, "hold")
    assert {"warmup", "accumulation"} <= set(saved)


def test_arguments_of_the_launchers(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA training needs peft")
    base = save_lm(tmp_path / "lm")
    said: list[str] = []
    old: Any = {"recipe": TrainConfig(max_length=64, held_out=0), "say": said.append, "epochs": 0.1}
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        result = train_reward_model(base, rows(4), tmp_path / "out", device="cpu", **old)
    told = {str(warning.message) for warning in caught}
    names = {"recipe": "config", "say": "progress", "epochs": "num_train_epochs"}
    assert {f"{a}= is now {b}=: use the new name" for a, b in names.items()} <= told
    assert said
    with pytest.warns(DeprecationWarning, match="packing_efficiency"):
        assert result.filled == result.packing_efficiency
    assert "filled" not in {field.name for field in fields(TrainResult)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipe.Recipe", "config.TrainConfig"),
        ("recipe.train_reward_model", "launch.train_reward_model"),
        ("policy.PolicyRecipe", "policy.config.PolicyTrainConfig"),
        ("policy.train_policy", "policy.launch.train_policy"),
        ("policy_trainer.TRegTrainer", "policy.trainer.TRegTrainer"),
    ],
)
def test_import_paths(old: str, new: str) -> None:
    if "policy" in old:
        pytest.importorskip("trl", reason="policies are trained by trl")
    module, _, name = f"rgtg_fast.training.{old}".rpartition(".")
    home, _, new_name = f"rgtg_fast.training.{new}".rpartition(".")
    expected = getattr(importlib.import_module(home), new_name)
    if not old.startswith("policy."):
        sys.modules.pop(module, None)
    with pytest.warns(DeprecationWarning, match=home):
        assert getattr(importlib.import_module(module), name) is expected
