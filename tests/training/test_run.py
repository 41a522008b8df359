"""The folder of a training run: one run at a time, a log that survives, settings in their ranges."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rgtg_fast import RGTGError
from rgtg_fast.files import only_writer
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.folder import LOCK_FILE, TrainingLog, no_progress, one_run

STATE: Any = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=4)
NONE: Any = None


@one_run
def train(
    output: str, work: Callable[[Path], None], *, resume: bool = False, progress: Callable = no_progress
) -> str:
    work(Path(output))
    return output


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")

    def again(path: Path) -> None:
        for resume in (False, True):
            with pytest.raises(
                RGTGError, match="being written by another process: wait for it or name another"
            ):
                train(folder, lambda path: None, resume=resume)

    assert train(folder, again) == folder
    assert not Path(folder).exists()


def test_what_a_killed_run_left_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    train(str(tmp_path), lambda path: (path / "checkpoint-2").mkdir())
    with pytest.raises(RGTGError, match="is not empty"):
        train(str(tmp_path), lambda path: None)
    train(str(tmp_path), lambda path: None, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        assert path.is_dir()
        raise RGTGError("no such model")

    with pytest.raises(RGTGError, match="no such model"):
        train(str(tmp_path / "run"), refuse)
    assert not (tmp_path / "run").exists()


def test_an_interrupt_says_what_is_safe(tmp_path: Path) -> None:
    def interrupt(path: Path) -> None:
        (path / "checkpoint-7").mkdir()
        raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(str(tmp_path / "run"), interrupt, progress=said.append)
    assert said == [
        f"interrupted: the last good checkpoint is {tmp_path / 'run' / 'checkpoint-7'}: continue with --resume"
    ]


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\udcff"])
def test_names_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(RGTGError, match=r"cannot (use|write to) .*another folder"):
        train(str(tmp_path / name), lambda path: None)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RGTGError, match="is a file"):
        train(str(tmp_path / "file"), lambda path: None)
    with pytest.raises(RGTGError, match=r"cannot write to .*: Not a directory"):
        train(str(tmp_path / "file" / "run"), lambda path: None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_is_one_line() -> None:
    with pytest.raises(
        RGTGError, match=r"cannot write /dev/full \(No space left on device\); there is no checkpoint"
    ):
        TrainingLog(Path("/dev/full"), no_progress).on_log(NONE, STATE, NONE, {"loss": 1.0})


def test_a_resumed_log_keeps_whole_lines_up_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n\n{"st\nnonsense\n{"step": 3}\n{"step": 4}\n{"step"')
    TrainingLog(path, no_progress).on_train_begin(NONE, STATE, NONE)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("held_out", value) for value in (-1, 1, float("nan"))),
        *(("head_learning_rate", value) for value in (-1, 0, float("inf"))),
        *(("weight_decay", value) for value in (-1, float("nan"))),
        *(("seed", value) for value in (-1, 2**32)),
        *(("num_train_epochs", value) for value in (0, float("nan"), 1e9)),
        ("min_answer_tokens", -1),
        ("limit", 0),
        ("gradient_accumulation_steps", 2**64),
        ("lora_rank", 2**62),
        ("lora_alpha", 0),
    ],
)
def test_settings_out_of_range(name: str, value: Any) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(RGTGError, match=f"{'LoRA rank' if name == 'lora_rank' else name}"):
        TrainConfig(**settings)


def test_a_folder_that_is_held_is_free_afterwards(tmp_path: Path) -> None:
    with only_writer(tmp_path, LOCK_FILE):
        pass
    train(str(tmp_path), lambda path: None)
