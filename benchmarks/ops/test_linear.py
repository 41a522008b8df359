"""The language model's head, [49152, 576], against torch's linear."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rgtg_fast.models.cpp_layers import linear

pytestmark = pytest.mark.usefixtures("cpp_only")


@pytest.mark.parametrize("rows", [1, 8, 10, 40, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_linear(timed, benchmark, who, dtype, rows):
    torch.manual_seed(0)
    weight = torch.randn(49152, 576).to(dtype)
    hidden = torch.randn(rows, 576)

    def composed(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.to(weight.dtype), weight).float()

    want = hidden.to(dtype).double() @ weight.double().T
    torch.testing.assert_close(linear(hidden, weight).double(), want, rtol=0, atol=1e-3)
    benchmark.extra_info["bytes"] = weight.nbytes
    timed(linear if who == "ours" else composed, hidden, weight)
