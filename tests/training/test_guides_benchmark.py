"""The sweep of recipes for guides: it trains, tells, keeps what is done, and ends in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import guides
from benchmarks.harness import read
from rgtg_fast.bench import roofline
from rgtg_fast.training.config import TrainConfig
from tests.training.support import rows, save_lm

pytest.importorskip("peft", reason="LoRA training needs peft")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two recipes on a tiny model."""
    monkeypatch.setattr(roofline, "memory_bandwidth", lambda device: 1e9)
    small = {"token_budget": 128, "learning_rate": 0.01}
    found = {
        "args-a": TrainConfig(objective="full_bt", lora_rank=2, **small),
        "pargs-b": TrainConfig(objective="partial_bt", full=True, **small),
    }
    monkeypatch.setattr(guides, "recipes", lambda: found)
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows(60))))
    lm = save_lm(tmp_path / "lm")
    return ["--data", str(data), "--lm", str(lm), "--folder", str(tmp_path / "guides"), "--device", "cpu"]


def test_recipes_become_folders_and_rows_and_are_done_once(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "guides"
    # What a killed run leaves behind does not stop the next one.
    (folder / "args-a").mkdir(parents=True)
    (folder / "args-a" / "left").touch()
    assert guides.main([*command, "--only", "args-a"]) == 0
    (first,) = read(folder / guides.TABLE)
    assert (first["name"], first["objective"], first["lora_rank"], first["full"]) == (
        "args-a",
        "full_bt",
        "2",
        "False",
    )
    assert 0 <= float(first["accuracy_1"]) <= 1
    assert int(first["steps"]) > 0
    assert (folder / "args-a" / "adapter_model.safetensors").is_file()
    assert not list((folder / "args-a").glob("checkpoint-*"))
    assert not (folder / "args-a" / "left").exists()
    assert guides.main(command) == 0
    assert "args-a: present" in capsys.readouterr().out
    table = read(folder / guides.TABLE)
    assert table[0] == first
    assert [row["name"] for row in table] == ["args-a", "pargs-b"]
    assert (folder / "pargs-b" / "model.safetensors").is_file()


def test_no_recipe_is_begun_when_the_time_is_over(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guides.main([*command, "--seconds", "-1"]) == 0
    assert capsys.readouterr().out.count("left out, -1 s are over") == 2
    assert not (tmp_path / "guides").exists()


def test_what_cannot_be_read_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command[1] = "nowhere.jsonl"
    assert guides.main(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("cannot read nowhere.jsonl")
    assert "\n" not in error


def test_every_setting_is_there_with_both_objectives() -> None:
    found = guides.recipes()
    assert len(found) == 2 * len(guides.SETTINGS)
    assert {recipe.objective for recipe in found.values()} == {"full_bt", "partial_bt"}
    assert all(recipe.held_out == 0.1 for recipe in found.values())
