"""Fixtures of the op benchmarks. Run: pytest benchmarks/ops --benchmark-enable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rgtg_fast.ops import backend_of


@pytest.fixture
def cpp_only() -> None:
    """Skips where the reference would be timed in place of the kernel."""
    if backend_of("tree_attention", "cpu") != "cpp":
        pytest.skip("the C++ kernels are not installed: there is nothing to compare")


@pytest.fixture
def timed(benchmark) -> Callable:
    """Times an implementation and records threads and torch version with the times."""

    def run(function: Callable, *arguments: object) -> None:
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        with torch.inference_mode():
            benchmark.pedantic(function, args=arguments, rounds=20, iterations=5, warmup_rounds=3)

    return run
