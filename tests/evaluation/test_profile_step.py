"""The profile of one step: what it counts, and that the command runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import profile_step
from benchmarks.harness import read


def events(name: str, kind: str, count: int, us: float = 0.0) -> list[SimpleNamespace]:
    one = SimpleNamespace(name=name, device_type=f"DeviceType.{kind}", self_device_time_total=us / count)
    return [one] * count


def test_kernels_and_waits_are_counted() -> None:
    found = [
        *events("gemm", "CUDA", 64, 3000.0),
        *events("tree_attention_kernel", "CUDA", 32, 500.0),
        *events("aten::mm", "CPU", 64, 3000.0),
        *events("cudaStreamSynchronize", "CPU", 2),
        *events("cudaEventSynchronize", "CPU", 9),
        *events("cudaDeviceSynchronize", "CPU", 1),
    ]
    # Waiting for an event of the step before lets the device go on.
    assert profile_step.counted(found) == (pytest.approx(3.5), 96, 3)


def test_a_step_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.csv"
    command = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--modes",
        "eager",
        "--kernels",
        "3",
    ]
    command += ["--prompt-length", "9", "--new-tokens", "5", "--output", str(output)]
    assert profile_step.main(command) == 0
    (row,) = read(output)
    assert row["mode"] == "eager"
    assert float(row["ms_per_step"]) > 0
    assert float(row["reward_ms_per_step"]) > 0
    # What only a device has is left empty, never 0.
    assert row["kernels_per_step"] == row["synchronizations_per_step"] == row["peak_bytes"] == ""
    assert "Self CPU time total" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    assert profile_step.main(["--output", str(tmp_path / "profile.csv")]) == 2
    assert list(tmp_path.iterdir()) == []
