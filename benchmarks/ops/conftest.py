"""What the benchmarks of the ops share. Run: pytest benchmarks/ops --benchmark-enable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rgtg_fast.ops import backend_of


@pytest.fixture
def cpp_only() -> None:
    """A reference timed by mistake would be a wrong number under the kernel's name."""
    if backend_of("tree_attention", "cpu") != "cpp":
        pytest.skip("the C++ kernels are not installed: there is nothing to compare")


@pytest.fixture
def timed(benchmark) -> Callable:
    """Times the kernel or its rival and notes machine facts beside the numbers."""

    def run(function: Callable, *arguments: object) -> None:
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        with torch.inference_mode():
            benchmark.pedantic(function, args=arguments, rounds=20, iterations=5, warmup_rounds=3)

    return run
