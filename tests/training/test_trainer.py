"""The trainer: what it learns, that it does not matter how a batch is spread, and that nothing is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.launch import train_reward_model
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import Lora, add_adapters
from rgtg_fast.training.packing import RowBatches, cost
from rgtg_fast.training.trainer import PartialRewardTrainer
from tests.conftest import make_rm, make_tokenizer
from tests.training.support import rows, save_lm, settings_by_day, tokenized

pytest.importorskip("peft", reason="LoRA training needs peft")

ROOT = Path(__file__).parent.parent.parent
# Seconds after which a process counts as one that hangs, many times what any of them takes.
HANGS = 3000
QUICK = TrainConfig(
    token_budget=128, gradient_accumulation_steps=2, learning_rate=0.01, max_length=64, held_out=0
)


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors"
    return load_file(folder / (name if (folder / name).exists() else "model.safetensors"))


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("base") / "lm")


def train(base: Path, output: Path, **settings: Any) -> Any:
    arguments = {"config": QUICK, "logging_steps": 1, "device": "cpu", **settings}
    return train_reward_model(base, arguments.pop("data", rows(60)), output, **arguments)


@pytest.mark.parametrize(
    "settings",
    settings_by_day(
        {"objective": "partial_bt", "mode": "eos"},
        {"objective": "partial_bt", "mode": "repeat_last", "weight": "pair"},
        {"objective": "full_bt"},
        {"objective": "cd_fudge"},
        {"objective": "rad"},
        {"full": True, "learning_rate": 3e-3},
        {"fork_layer": 2},
        {"fork_layer": 1, "full": True, "learning_rate": 3e-3},
        {"fork_layer": 1, "bf16": True},
        {"full": True, "bf16": True, "fork_layer": 1, "learning_rate": 3e-3},
        {"gradient_checkpointing": True},
        {"head_learning_rate": 0.03, "lora_dropout": 0.1, "weight_decay": 0.1},
    ),
    ids=str,
)
def test_it_learns(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = train(
        base, tmp_path / "out", data=rows(150), eval_data=rows(40, seed=1), num_train_epochs=4, **settings
    )
    # Four standard deviations above chance.
    assert result.metrics["accuracy"] > 0.8
    assert result.data["train"]["kept"] == len({json.dumps(row) for row in rows(150)})
    recipe = json.loads((tmp_path / "out" / "rgtg_fast.json").read_text())
    assert recipe["recipe"]["objective"] == settings.get("objective", "partial_bt")
    assert len(recipe["base_fingerprint"]) == len(recipe["data_sha256"]) == 64
    assert recipe["metrics"]["accuracy"] == result.metrics["accuracy"]


def test_the_trunks_cache_changes_nothing(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "cached", fork_layer=2)
    train(base, tmp_path / "run", fork_layer=2, cache_trunk=False)
    for name, weight in weights(tmp_path / "cached").items():
        torch.testing.assert_close(weight, weights(tmp_path / "run")[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache_trunk", [True, False])
def test_a_head_alone_learns_in_half_precision(base: Path, tmp_path: Path, cache_trunk: bool) -> None:
    settings = {
        "objective": "full_bt",
        "fork_layer": 3,
        "bf16": True,
        "head_fit": 0.01,
        "cache_trunk": cache_trunk,
    }
    result = train(
        base, tmp_path / "out", data=rows(150), eval_data=rows(40, seed=1), num_train_epochs=4, **settings
    )
    assert result.metrics["accuracy"] > 0.65
    assert {name.rpartition("model.")[2] for name in weights(tmp_path / "out")} == {"score.weight"}


def test_a_full_model_from_a_fork_is_saved_whole(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "out", fork_layer=2, full=True)
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "out")
    for name, weight in after.items():
        frozen = "embed_tokens" in name or "layers.0." in name or "layers.1." in name
        if frozen:
            assert torch.equal(weight, before[name])
        elif "layers.2." in name:
            assert not torch.equal(weight, before[name])
    assert set(before) - {"lm_head.weight"} <= set(after)


def trainer_on(pairs: Any, output: Path, accumulation: int = 2, **settings: Any) -> PartialRewardTrainer:
    torch.manual_seed(0)
    model = add_adapters(make_rm(), 0, Lora(rank=4))
    arguments = TrainingArguments(
        output_dir=str(output),
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=settings.pop("rows", 1),
        max_steps=settings.pop("max_steps", 3),
        logging_steps=1,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **settings.pop("arguments", {}),
    )
    return PartialRewardTrainer(model, arguments, pairs, token_budget=64, **settings)


@pytest.mark.parametrize(
    "name", ["partial_bt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full_bt", "rad"))]
)
def test_the_spread_of_a_batch_does_not_matter(tmp_path: Path, name: str) -> None:
    curves = []
    for accumulation, size in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_on(
            tokenized(60), tmp_path, accumulation=accumulation, rows=size, objective=Objective(name)
        )
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(curves[0]) == 3
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_the_first_loss_is_the_mean_over_the_steps_terms(tmp_path: Path) -> None:
    pairs = tokenized(10)
    trainer = trainer_on(pairs, tmp_path, accumulation=100, max_steps=1)
    trainer.train()
    # The order of rows does not matter where one step sees them all; the rewards before it are those of a new model.
    fresh = trainer_on(pairs, tmp_path)
    scores = fresh.score(fresh.train_pairs)
    terms = [
        math.log1p(math.exp(lost[min(i, len(lost) - 1)] - won[min(i, len(won) - 1)]))
        for won, lost in scores
        for i in range(max(len(won), len(lost)))
    ]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_rates_and_evaluation_are_logged(tmp_path: Path) -> None:
    seen: list[int] = []
    pairs, held = tokenized(30), tokenized(8, seed=1)
    trainer = trainer_on(
        pairs,
        tmp_path,
        eval_pairs=held,
        metrics=lambda scores: {"pairs": len(scores)},
        arguments={"eval_strategy": "steps", "eval_steps": 2},
    )
    trainer.add_callback(_Steps(seen))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["pairs_per_second"] > 0 for row in logged)
    assert all(row["prefixes_per_second"] > row["pairs_per_second"] for row in logged)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 3]
    assert evaluations[0]["eval_pairs"] == 8
    assert seen == [2, 3]


class _Steps(TrainerCallback):
    def __init__(self, seen: list[int]):
        self.seen = seen

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


def test_regression_takes_given_rewards(tmp_path: Path) -> None:
    pairs = tokenized(20)
    targets = {pair.index: (2.0, 2.0) for pair in pairs}
    trainer = trainer_on(
        pairs, tmp_path, objective=Objective("cd_fudge"), targets=targets, max_steps=1, accumulation=100
    )
    trainer.train()
    fresh = trainer_on(pairs, tmp_path)
    errors = [0.5 * (r - 2) ** 2 for pair in fresh.score(fresh.train_pairs) for a in pair for r in a]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_datas_rewards_are_what_a_regression_learns(base: Path, tmp_path: Path) -> None:
    def rewarded(count: int, seed: int = 0) -> list[dict[str, Any]]:
        return [row | {"chosen_reward": -1.0, "rejected_reward": 3} for row in rows(count, seed)]

    result = train(
        base,
        tmp_path / "out",
        data=rewarded(150),
        eval_data=rewarded(40, 1),
        objective="cd_fudge",
        full=True,
        learning_rate=3e-3,
        num_train_epochs=4,
    )
    # Here the rejected answer has the higher reward.
    assert result.metrics["accuracy"] < 0.2
    assert result.metrics["loss"] < 1.0
    broken = rewarded(9)
    broken[4]["rejected_reward"] = "high"
    with pytest.raises(RGTGError, match=r"row 4 of the data has the rewards \[-1.0, 'high'\]"):
        train(base, tmp_path / "broken", data=broken, objective="rad")


@pytest.mark.parametrize("count", [7, 8])
def test_processes_share_the_rows_of_one(count: int) -> None:
    def batches(process: int, processes: int, size: int) -> list[list[tuple[int, bool]]]:
        return list(RowBatches(count, size, 3, lambda: 1, process, processes))

    one = [key for batch in batches(0, 1, 1) for key in batch]
    assert sorted(one) == [(row, True) for row in range(count)]
    shares = [batches(0, 2, 1), batches(1, 2, 1)]
    assert len(shares[0]) == len(shares[1]) == 4
    together = [key for pair in zip(*shares, strict=True) for batch in pair for key in batch]
    assert [key for key in together if key[1]] == one
    # What fills up the last batch does not count.
    assert together[count:] == [(one[0][0], False)] * (8 - count)
    # Another epoch has another order.
    assert list(RowBatches(count, 1, 3, lambda: 0, 0, 1)) != batches(0, 1, 1)


# ---- Checkpoints


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"fork_layer": 2, "lora_dropout": 0.2}, {"full": True}],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_weights(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    common = {"save_steps": 3, "num_train_epochs": 2, **settings}
    train(base, tmp_path / "whole", **common)
    with pytest.raises(InterruptedError):
        train(base, tmp_path / "broken", **common, callbacks=[_StopAt(5)])
    assert not (tmp_path / "broken" / "checkpoint-6").exists()
    train(base, tmp_path / "broken", **common, resume=True)
    assert same(tmp_path / "whole", tmp_path / "broken")
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    steps = [row["step"] for row in read_log(tmp_path / "broken") if "loss" in row]
    assert steps == sorted(set(steps))


class _StopAt(TrainerCallback):
    """Ends a run as an interruption would, without a last checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def test_a_resumed_run_must_be_the_same(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(base, out)
    with pytest.raises(RGTGError, match="is not empty"):
        train(base, out)
    with pytest.raises(RGTGError, match=r"learning_rate=0\.01 and this one has 0\.02"):
        train(base, out, learning_rate=0.02, resume=True)
    with pytest.raises(RGTGError, match="other pairs"):
        train(base, out, data=rows(61), resume=True)
    with pytest.raises(RGTGError, match="other model"):
        train(save_lm(tmp_path / "other", vocab_size=64, num_hidden_layers=2), out, resume=True)


CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.training.test_trainer import *
{before}
try:
    train(Path({base!r}), Path({out!r}), save_steps=2, num_train_epochs=2, resume=True)
except RGTGError as error:
    print(error)
    sys.exit(2)
"""

# The second checkpoint dies after its model is written and before its optimizer is.
KILL = """
from transformers import Trainer
save = Trainer._save_optimizer_and_scheduler
def kill(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, folder)
Trainer._save_optimizer_and_scheduler = kill
"""

# From the second checkpoint on, no file may grow beyond 4 KiB, as on a full disk.
FULL = """
import resource
from transformers import Trainer
save = PartialRewardTrainer._save_checkpoint
def fill(self, model, trial):
    if self.state.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return save(self, model, trial)
PartialRewardTrainer._save_checkpoint = fill
"""


def child(base: Path, out: Path, before: str) -> subprocess.CompletedProcess[str]:
    code = CHILD.format(root=str(ROOT), base=str(base), out=str(out), before=before)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=HANGS
    )


@pytest.fixture
def goes_on(base: Path, tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Resumes what a child left and compares it with a run that nothing has ended, with the child's one thread."""

    def check(out: Path) -> None:
        settings: dict[str, Any] = {"save_steps": 2, "num_train_epochs": 2, "resume": True}
        for folder in (out, tmp_path / "whole"):
            train(base, folder, **settings)
        assert same(out, tmp_path / "whole")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield check
    torch.set_num_threads(threads)


def test_a_kill_while_saving_loses_only_the_steps_since_the_last_checkpoint(
    base: Path, tmp_path: Path, goes_on: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    assert child(base, out, KILL).returncode == -signal.SIGKILL
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    # The half checkpoint is there, with its model, and is not taken for one.
    assert list(out.glob(".partial/checkpoint-4/adapter_model.safetensors"))
    goes_on(out)
    assert not (out / ".partial").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    base: Path, tmp_path: Path, goes_on: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    done = child(base, out, FULL)
    assert done.returncode == 2, done.stderr
    (line,) = done.stdout.splitlines()
    assert "cannot save checkpoint-4" in line
    assert f"the last good checkpoint is {out / 'checkpoint-2'}" in line
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / ".partial").exists()
    goes_on(out)


class _Break(TrainerCallback):
    """Spoils a weight before a step, so that its loss is NaN."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)


def test_a_loss_that_is_nan_stops_and_names_the_pairs(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RGTGError) as raised:
        train(base, out, save_steps=2, callbacks=[_Break(3)])
    message = str(raised.value)
    assert "\n" not in message
    assert "the loss became nan at step 4 with the pairs in rows " in message
    named = [int(n) for n in message.split("rows ")[1].split(" and ")[0].split(" of ")[0].split(", ")]
    assert named
    assert set(named) <= set(range(60))
    assert str(out / "checkpoint-2") in message
    assert all(weight.isfinite().all() for weight in weights(out / "checkpoint-2").values())


def test_weights_that_are_nan_are_not_saved(base: Path, tmp_path: Path) -> None:
    class Spoil(_Break):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, model)

    out = tmp_path / "out"
    with pytest.raises(RGTGError, match=r"the weight \S+ became nan"):
        train(base, out, save_steps=2, callbacks=[Spoil(4)])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


# ---- Several processes

DISTRIBUTED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.training.test_trainer import *
train_and_evaluate(Path({base!r}), Path({out!r}), {settings!r})
"""


def train_and_evaluate(base: Path, out: Path, settings: dict[str, Any]) -> None:
    recipe = TrainConfig(**(QUICK.__dict__ | settings))
    held = rows(9, seed=1)
    train(base, out, config=recipe, eval_data=held, save_steps=2, eval_steps=2, num_train_epochs=2)


def processes(base: Path, out: Path, count: int, settings: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = DISTRIBUTED.format(root=str(ROOT), base=str(base), out=str(out), settings=settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    environment |= {"LOCAL_WORLD_SIZE": str(count)}
    running = []
    for rank in range(count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", code]
        running.append(subprocess.Popen(command, env=environment | ranks, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors


@pytest.mark.parametrize(
    "objective", ["partial_bt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("farma", "rad"))]
)
def test_two_processes_learn_what_one_does(base: Path, tmp_path: Path, objective: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings: dict[str, Any] = {"objective": objective, "fork_layer": 2}
    if objective == "rad":
        make_rm(seed=5).save_pretrained(tmp_path / "judge")
        make_tokenizer().save_pretrained(tmp_path / "judge")
        settings["judge"] = str(tmp_path / "judge")
    train_and_evaluate(base, one, {"gradient_accumulation_steps": 4, **settings})
    processes(base, two, 2, {"gradient_accumulation_steps": 2, **settings})
    assert len(losses(one)) >= 4
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    held = [[row["eval_accuracy"] for row in read_log(out) if "eval_loss" in row] for out in (one, two)]
    assert held[0] == held[1]
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-3, atol=1e-4)


# ---- What a user can get wrong


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fork_layer": 4}, r"fork_layer=4 is not in 0\.\.3"),
        ({"fork_layer": -1}, r"fork_layer=-1 is not in 0\.\.3"),
        ({"data": rows(3), "min_answer_tokens": 50}, "no pairs are left"),
        ({"data": [{"prompt": "w1", "chosen": "w2", "rejected": "w2"}]}, "identical"),
        ({"limit": 0}, "limit=0"),
        ({"token_budget": 1}, "token_budget=1"),
        ({"token_budget": 8}, "use a token budget of at least"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"objective": "dpo"}, "objective='dpo'"),
        ({"rank": 4}, "no setting 'rank'"),
        ({"full": True, "merged": "x"}, "no adapters to merge"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(base: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RGTGError, match=said) as raised:
        train(base, tmp_path / "out", **settings)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    folder = save_lm(tmp_path / "lm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(RGTGError, match="no EOS token"):
        train(folder, tmp_path / "out")


def test_an_output_that_is_a_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RGTGError, match="is a file"):
        train(base, tmp_path / "out")


def test_adapters_below_the_fork_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="fork_layer=1 freezes layer 0"):
        trainer_on(tokenized(4), tmp_path, fork_layer=1)


def test_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="no pairs to train on"):
        trainer_on([], tmp_path)


def test_the_filled_share_counts_tokens(tmp_path: Path) -> None:
    pairs = tokenized(60)
    trainer = trainer_on(pairs, tmp_path)
    longest = max(sum(cost(pairs[i]) for i in row) for row in trainer.rows)
    assert trainer.packing_efficiency == pytest.approx(sum(map(cost, pairs)) / (longest * len(trainer.rows)))
    assert trainer.packing_efficiency > 0.9
