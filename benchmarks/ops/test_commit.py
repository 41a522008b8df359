"""commit against index assignment, layer by layer and for all layers at once."""

from __future__ import annotations

import copy

import pytest
import torch

from rgtg_fast.ops import commit
from tests.ops.specs import SPECS

pytestmark = pytest.mark.usefixtures("cpp_only")


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "torch", "torch_per_layer"])
def test_commit(timed, who, dtype, B):
    case = SPECS["commit"].make_inputs({"L": 30, "B": B, "G": 3, "S": 10, "T": 512, "D": 64}, dtype)
    case["choice"] = torch.arange(B) % 10
    rows, start = torch.arange(B), case["lengths"].clone()

    def ours() -> None:
        case["lengths"].copy_(start)
        commit(**case)

    def composed() -> None:
        case["lengths"].copy_(start)
        for new, cache in (("k_new", "k_cache"), ("v_new", "v_cache")):
            case[cache][:, rows, :, case["lengths"]] = case[new][:, rows, :, case["choice"]]
        case["lengths"] += 1

    def per_layer() -> None:
        case["lengths"].copy_(start)
        for new, cache in (("k_new", "k_cache"), ("v_new", "v_cache")):
            for layer in range(30):
                case[cache][layer][rows, :, case["lengths"]] = case[new][layer][rows, :, case["choice"]]
        case["lengths"] += 1

    ours()
    want = copy.deepcopy(case)
    composed()
    for name in ("k_cache", "v_cache", "lengths"):
        torch.testing.assert_close(case[name], want[name], rtol=0, atol=0, equal_nan=True)
    timed({"ours": ours, "torch": composed, "torch_per_layer": per_layer}[who])
