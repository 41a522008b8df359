"""Runs interpreted_triton.py in a process of its own, where Triton's interpreter serves tensors on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: the Triton kernels are NOT tested (pip install triton)",
)
def test_the_kernels_in_the_interpreter():
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] <= (3, 6) and versions[1] >= (2, 4):
        pytest.skip(
            "Triton 3.6's interpreter fails with numpy 2.4: the kernels are NOT interpreted; use numpy < 2.4"
        )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            Path(__file__).with_name("interpreted_triton.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Its own report, where it fails.
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
