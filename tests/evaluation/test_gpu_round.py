"""The script of a round on a GPU, tried out without one: its parts, its limits and what it leaves behind."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import read
from benchmarks.ops import gpu_ops
from tests.ops.specs import SPECS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def run(out: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"OUT": str(out), "DEVICE": "cpu", "SHAPE": "tiny", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", SCRIPT, *parts],
        env=os.environ | known | environment,
        capture_output=True,
        text=True,
        timeout=6000,  # against a run that hangs; nothing here takes a hundredth of it
        check=False,
    )


@pytest.mark.slow
def test_the_whole_round_without_a_gpu_leaves_rows(tmp_path: Path) -> None:
    """Everything but what only a GPU has: the gate, decoding with every cell, a profile."""
    parts = ("gate", "8b", "8b-shared", "8b-rows", "profile", "8b-again")
    done = run(tmp_path, *parts, PATIENCE="30")
    assert done.returncode == 0, done.stdout
    rows = read(tmp_path / "decode_gpu.csv")
    assert {(row["batch"], row["method"]) for row in rows} == {
        *(("1", name) for name in ("ours", "args_replicated", "unguided", "ours_unguided")),
        ("1", "ours_transformers"),
        *(("1", name) for name in ("shared_trunk", "two_models")),
        *(("32", name) for name in ("ours", "args_replicated")),
    }
    assert [row["mode"] for row in read(tmp_path / "profile_gpu.csv")] == ["eager"]
    log = (tmp_path / "round.log").read_text()
    for part in parts:
        assert f"== {part}: exit 0" in log
    assert f"{len(SPECS)} of {len(SPECS)} ops right" in log
    assert {path.name for path in tmp_path.iterdir()} == {"round.log", "decode_gpu.csv", "profile_gpu.csv"}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Stands in for Python: says how it was called; fails in the steps' tests, and sleeps in the profile."""
    path = tmp_path / "python"
    path.write_text(
        "#!/usr/bin/env bash\n"
        'echo "called: $*"\n'
        'case "$*" in *"not slow tests/gpu/test_steps_cuda"*) exit 3 ;; *profile_step*) exec sleep 60 ;; esac\n'
        'case "$*" in *ops.gate*) exit "${GATE:-0}" ;; "- cpu") cat > /dev/null ;; esac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_failing_part_and_a_slow_one_are_told_and_the_rest_goes_on(tmp_path: Path, python: Path) -> None:
    out = tmp_path / "out"
    done = run(out, PYTHON=str(python), PROFILE="2", PATIENCE="1", LIMIT="5000")
    assert done.returncode == 1
    log = (out / "round.log").read_text()
    assert "== steps: exit 3" in log
    assert "== profile: exit 124" in log
    for name in ("gate", "ops_float32_tree_attention", "ops_others", "training", "8b", "8b-shared", "1b"):
        assert f"== {name}: exit 0" in log
    assert log.index("== ops_others") < log.index("== 8b: "), "correctness comes first"
    assert "called: -m pytest -o addopts= -q" in log
    assert "called: -m benchmarks.decode --round 8b-shared --shape tiny --device cpu --output" in log
    assert "tune" not in log, "the second call's"
    # The tests of the ops are shared out, and nothing is left out or run twice.
    shared_out = [line.partition(" -k ")[2] for line in log.splitlines() if "test_ops_cuda.py -k" in line]
    dtypes = ("float32", "bfloat16", "float16 and not bfloat16")
    of_dtype = [f"{dtype} and {op}" for dtype in dtypes for op in ("tree_attention", "not tree_attention")]
    assert shared_out == [*of_dtype, "not float32 and not float16"]
    assert {path.name for path in out.iterdir()} == {"round.log"}, "nothing but results is left"


def test_the_ops_that_are_timed_exist() -> None:
    lines = re.findall(r"--ops ((?:\w+ ?)+)", SCRIPT.read_text(encoding="utf-8"))
    assert len(lines) == 2
    assert {op for line in lines for op in line.split()} <= {case.op for case in gpu_ops.cases()}


def test_where_the_gate_fails_nothing_else_is_run(tmp_path: Path, python: Path) -> None:
    done = run(tmp_path / "out", PYTHON=str(python), GATE="1")
    assert done.returncode == 1
    log = (tmp_path / "out" / "round.log").read_text()
    assert "== gate: exit 1" in log
    assert "the gate is shut: nothing else is run" in log
    assert "called: -m pytest" not in log
    assert "called: -m benchmarks.decode" not in log


def test_without_time_parts_are_left_out_and_named(tmp_path: Path, python: Path) -> None:
    done = run(tmp_path / "out", "8b", "1b", PYTHON=str(python), LIMIT="5")
    assert done.returncode == 1
    assert "== 8b: left out, no time" in done.stdout
    assert "== 1b: left out, no time" in done.stdout


def test_a_part_that_is_not_there_is_refused(tmp_path: Path, python: Path) -> None:
    done = run(tmp_path / "out", "decode", PYTHON=str(python))
    assert done.returncode == 2
    assert "there is no part decode: choose of gate tests" in done.stderr


def test_without_a_gpu_a_real_round_ends_at_once(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU, which would be measured")
    done = run(tmp_path, "8b", DEVICE="cuda")
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stdout + done.stderr
