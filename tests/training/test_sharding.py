"""Training whose processes hold the weights together (FSDP2).

accelerate leaves FSDP out on a CPU. Here it is told that there are GPUs; everything else is what runs there, over gloo.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rgtg_fast.errors import RGTGError
from tests.training.support import save_lm
from tests.training.test_trainer import HANGS, ROOT, losses, train, train_and_evaluate

pytest.importorskip("accelerate")

SHARDED = """
import sys
from pathlib import Path
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from rgtg_fast.training import launch
from tests.training import test_trainer as t

make = AcceleratorState.__init__
def on_gpus(self, *args, **kwargs):
    if not AcceleratorState._shared_state:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    make(self, *args, **kwargs)
AcceleratorState.__init__ = on_gpus
launch._check_sharding = lambda device, cached: None

class Sharded(t.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters())

base, out, full, resume = sys.argv[1:]
settings = {"full": bool(int(full)), "gradient_accumulation_steps": 2}
t.train(Path(base), Path(out), config=t.TrainConfig(**(t.QUICK.__dict__ | settings)), resume=bool(int(resume)),
    eval_data=t.rows(9, seed=1), save_steps=2, eval_steps=2, num_train_epochs=2, fsdp=True, callbacks=[Sharded()])
"""


def sharded(base: Path, out: Path, full: bool, resume: bool = False) -> None:
    script = out.parent / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    line += [str(base), str(out), str(int(full)), str(int(resume))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False], ids=["full", "adapters"])
def test_two_processes_learn_together_what_one_does(tmp_path: Path, full: bool) -> None:
    base = save_lm(tmp_path / "lm")
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    settings: dict[str, Any] = {"full": full, "gradient_accumulation_steps": 4}
    train_and_evaluate(base, one, settings)
    sharded(base, two, full)
    assert len(losses(one)) >= 4
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    found = weights(two)
    assert set(found) == set(weights(one))
    for name, weight in weights(one).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    # A run that ended after an earlier checkpoint goes on from it.
    shutil.copytree(two, resumed)
    last = max(resumed.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    shutil.rmtree(last)
    sharded(base, resumed, full, resume=True)
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, found[name], rtol=1e-6, atol=1e-7)


def test_what_sharding_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_lm(tmp_path / "lm")
    with pytest.raises(RGTGError, match="fsdp in a single process"):
        train(base, tmp_path / "out", fsdp=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RGTGError, match="fsdp on a CPU"):
        train(base, tmp_path / "out", fsdp=True)
