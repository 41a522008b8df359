"""The script of a round on a GPU, tried out without one: its parts, its limits and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import read

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
def test_the_parts_without_a_gpu_leave_rows(tmp_path: Path) -> None:
    # No part has a limit that it could reach, and one cell is enough.
    done = run(tmp_path, "decode", "profile", LIMIT="6000", DECODE="3000", PROFILE="3000", BEGIN="1")
    assert done.returncode == 0, done.stdout
    assert {row["method"] for row in read(tmp_path / "decode_gpu_tiny.csv")} >= {
        "ours",
        "args_replicated",
        "unguided",
    }
    assert [row["mode"] for row in read(tmp_path / "profile_gpu_tiny.csv")] == ["eager"]
    log = (tmp_path / "round.log").read_text()
    assert "== decode: exit 0" in log
    assert "== profile: exit 0" in log


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Stands in for Python: says how it was called; fails in the steps' tests, and sleeps in the profile."""
    path = tmp_path / "python"
    path.write_text(
        "#!/usr/bin/env bash\n"
        'echo "called: $*"\n'
        'case "$*" in *"not slow tests/gpu/test_steps_cuda"*) exit 3 ;; *profile_step*) exec sleep 60 ;; esac\n'
        'case "$*" in "- cpu") cat > /dev/null ;; esac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_failing_part_and_a_slow_one_are_told_and_the_rest_goes_on(tmp_path: Path, python: Path) -> None:
    out = tmp_path / "out"
    parts = ("ops_tests", "steps_tests", "ops", "decode", "profile", "shared")
    done = run(out, *parts, PYTHON=str(python), PROFILE="2")
    assert done.returncode == 1
    log = (out / "round.log").read_text()
    assert "== steps_tests: exit 3" in log
    assert "== profile: exit 124" in log
    for name in ("ops_tests_tree_attention", "compiled_tests", "training_tests", "ops", "decode", "shared"):
        assert f"== {name}: exit 0" in log
    assert "host_tests" not in log
    assert log.index("== ops_tests_tree_attention") < log.index("== ops: "), "correctness comes first"
    assert "called: -m pytest -o addopts= -q" in log
    assert "called: -m benchmarks.decode --gpu --shape tiny --device cpu --seconds 95" in log
    # The tests of the ops are shared out, and nothing is left out or run twice.
    shared_out = [line.partition(" -k ")[2] for line in log.splitlines() if "test_ops_cuda.py -k" in line]
    assert shared_out == ["tree_attention", "topk_logprobs", "not tree_attention and not topk_logprobs"]
    assert {path.name for path in out.iterdir()} == {"round.log"}, "nothing but results is left"


def test_without_time_parts_are_left_out_and_named(tmp_path: Path, python: Path) -> None:
    done = run(tmp_path / "out", "decode", "shared", PYTHON=str(python), LIMIT="5")
    assert done.returncode == 1
    assert "== decode: left out, no time" in done.stdout
    assert "== shared: left out, no time" in done.stdout


def test_without_a_gpu_a_real_round_ends_at_once(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU, which would be measured")
    done = run(tmp_path, "decode", DEVICE="cuda")
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stdout + done.stderr
