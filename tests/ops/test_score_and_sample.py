"""The reference of score_and_sample against PyTorch's own norm, and what the op refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from rgtg_fast import RGTGError
from rgtg_fast.ops import backend_of, resample, score_and_sample, use_backend
from tests.ops.specs import SPECS

SPEC = SPECS["score_and_sample"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SPEC.shapes, ids=str)
def test_is_norm_then_head_then_resample(shape: dict[str, Any], dtype: torch.dtype) -> None:
    a = SPEC.make_inputs(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm, head = a["norm"].to(wide) + a["offset"], a["head"].to(wide).unsqueeze(0)
    normed = functional.rms_norm(a["hidden"].to(wide), (shape["E"],), norm, a["eps"])
    bias = None if a["bias"] is None else a["bias"].to(wide)
    want = functional.linear(normed, head, bias).squeeze(-1)
    rewards, choice, logprob = score_and_sample(**a)
    torch.testing.assert_close(rewards, want, rtol=1e-4, atol=1e-5)
    draw = (a["beta"], a["temperature"], a["seed"], a["position"])
    for got, expected in zip((choice, logprob), resample(a["logprobs"], rewards, *draw), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    for shape in SPEC.shapes:
        a = SPEC.make_inputs(shape, torch.float32)
        whole = score_and_sample(**a)
        rows = ("hidden", "logprobs", "beta", "temperature", "seed", "position")
        for row in range(shape["B"]):
            alone = score_and_sample(**{**a, **{name: a[name][row : row + 1] for name in rows}})
            for x, y in zip(alone, whole, strict=True):
                torch.testing.assert_close(x, y[row : row + 1], rtol=0, atol=0, equal_nan=True)


def test_a_nan_state_gives_a_nan_reward_and_no_choice_where_it_counts() -> None:
    a = SPEC.make_inputs({"B": 2, "K": 4, "E": 8}, torch.float32)
    a["hidden"][:, 2] = torch.nan
    a["beta"] = torch.tensor([1.0, 0.0])
    rewards, choice, logprob = score_and_sample(**a)
    assert rewards[:, 2].isnan().all()
    assert rewards[:, [0, 1, 3]].isfinite().all()
    assert choice[0] == -1
    assert logprob[0].isnan()
    assert choice[1] >= 0


def test_the_reference_serves_on_the_cpu() -> None:
    assert backend_of("score_and_sample", "cpu") == "reference"
    assert not SPEC.has_cpp


@pytest.mark.usefixtures("cpp")
def test_a_missing_kernel_is_said() -> None:
    with use_backend("cpp"), pytest.raises(RGTGError, match="it has no C\\+\\+ kernel"):
        score_and_sample(**SPEC.make_inputs(SPEC.shapes[1], torch.float32))


BAD = [
    ({"hidden": torch.zeros(2, 3)}, r"hidden has shape \[2, 3\]: use \[B, K, E\]"),
    ({"norm": torch.ones(7)}, r"norm has shape \[7\]: use \[E\] = \[40\]"),
    ({"norm": torch.ones(40).double()}, "norm has dtype torch.float64: use torch.float32"),
    ({"bias": torch.ones(2)}, r"bias has shape \[2\]"),
    ({"logprobs": torch.zeros(3, 5).bfloat16()}, "logprobs has dtype torch.bfloat16: use torch.float32"),
    ({"temperature": torch.tensor([0.0, -1.0, 0.0])}, r"temperature\[1\]=-1.0 is not a finite number >= 0"),
    ({"seed": torch.zeros(3)}, "seed has dtype torch.float32: use torch.int64"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_line(changed: dict[str, torch.Tensor], message: str) -> None:
    arguments = SPEC.make_inputs(SPEC.shapes[1], torch.float32) | changed
    with pytest.raises(RGTGError, match=message):
        score_and_sample(**arguments)
