"""Products of a small model, and its head [49152, 576], against torch's linear.

Smaller matrices are as many as hold the head's number of weights, so that each is read from memory. For the table of
one machine: pytest benchmarks/ops/test_linear.py --benchmark-enable --benchmark-group-by=param:shape,param:rows
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rgtg_fast.models.cpp_layers import linear

pytestmark = pytest.mark.usefixtures("cpp_only")

HEAD = (49152, 576)


@pytest.mark.parametrize("rows", [1, 8, 10, 16, 32, 40, 80, 512])
@pytest.mark.parametrize(
    "shape", [HEAD, (1536, 576), (576, 1536)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_linear(timed, benchmark, who, dtype, shape, rows):
    torch.manual_seed(0)
    outer, inner = shape
    weights = [torch.randn(outer, inner).to(dtype) for _ in range(HEAD[0] * HEAD[1] // (outer * inner))]
    hidden = torch.randn(rows, inner)

    def ours() -> None:
        for weight in weights:
            linear(hidden, weight)

    def composed() -> None:
        for weight in weights:
            functional.linear(hidden.to(weight.dtype), weight).float()

    want = hidden.to(dtype).double() @ weights[0].double().T
    torch.testing.assert_close(linear(hidden, weights[0]).double(), want, rtol=0, atol=1e-3)
    benchmark.extra_info["bytes"] = sum(weight.nbytes for weight in weights)
    benchmark.extra_info["operations"] = 2 * rows * outer * inner * len(weights)
    timed(ours if who == "ours" else composed)
