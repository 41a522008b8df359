"""The reference of finish_step case by case, and what the op refuses; kernels: see the other files."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from rgtg_fast import RGTGError, ops
from rgtg_fast.ops import backend_of, finish_step
from rgtg_fast.ops.finish_step import NO_CANDIDATE, OK
from tests.ops.specs import SPECS

SPEC = SPECS["finish_step"]
NAN, INF = math.nan, math.inf


def row(**changed: Any) -> dict[str, torch.Tensor | None]:
    """One row with three candidates that decides its sixth token and goes on."""
    given = {
        "logprobs": [[-1.0, -2.0, -3.0]],
        "rewards": [[0.5, 0.25, -INF]],
        "candidates": [[10, 11, 2**40]],
        "choice": [1],
        "chosen_logprob": [-0.5],
        "tokens": [7],
        "position": [5],
        "limit": [9],
        "widths": None,
        "eos": [2, 3],
        **changed,
    }
    return {name: None if x is None else torch.tensor(x) for name, x in given.items()}


@pytest.mark.parametrize(
    ("changed", "decision", "accepted", "token"),
    [
        ({}, [11, -2, 0.25, -0.5, OK], 1, 11),
        ({"choice": [2]}, [2**40, -3, -INF, -0.5, OK], 2, 2**40),
        # The row ends: at a token, at its limit, or it had ended before.
        ({"eos": [2, 11]}, [11, -2, 0.25, -0.5, OK], 1, -1),
        ({"limit": [6]}, [11, -2, 0.25, -0.5, OK], 1, -1),
        ({"limit": [7]}, [11, -2, 0.25, -0.5, OK], 1, 11),
        ({"tokens": [-1]}, [11, -2, 0.25, -0.5, OK], -1, -1),
        ({"eos": []}, [11, -2, 0.25, -0.5, OK], 1, 11),
        # Nothing can be chosen.
        ({"choice": [-1]}, [10, -1, 0.5, -0.5, NO_CANDIDATE], -1, 10),
        # The first candidate whose reward cannot be told, of those that the row has.
        ({"rewards": [[0.5, NAN, INF]]}, [11, -2, NAN, -0.5, 11], 1, 11),
        ({"rewards": [[0.5, 0.25, INF]]}, [11, -2, 0.25, -0.5, 2**40], 1, 11),
        ({"rewards": [[0.5, 0.25, INF]], "widths": [2]}, [11, -2, 0.25, -0.5, OK], 1, 11),
        ({"rewards": [[INF, 0.25, NAN]], "choice": [-1]}, [10, -1, INF, -0.5, 10], -1, 10),
    ],
)
def test_a_row(changed: dict[str, Any], decision: list[float], accepted: int, token: int) -> None:
    arguments = row(**changed)
    if "eos" in changed and not changed["eos"]:
        arguments["eos"] = torch.zeros(0, dtype=torch.int64)
    got = finish_step(**arguments)  # pyright: ignore[reportArgumentType]
    assert got[0].dtype == torch.float64
    torch.testing.assert_close(
        got[0][:, 0].tolist(), [float(x) for x in decision], rtol=0, atol=0, equal_nan=True
    )
    assert (got[1].tolist(), arguments["tokens"].tolist()) == ([accepted], [token])  # pyright: ignore[reportOptionalMemberAccess]
    assert arguments["position"].tolist() == [6]  # pyright: ignore[reportOptionalMemberAccess]


def test_rows_do_not_know_of_each_other() -> None:
    whole, (decision, accepted) = (a := SPEC.make_inputs(SPEC.shapes[2], torch.float32)), finish_step(**a)
    parts = SPEC.make_inputs(SPEC.shapes[2], torch.float32)
    for b in range(len(accepted)):
        alone = {name: x if name == "eos" else x[b : b + 1] for name, x in parts.items()}
        one, accepted_one = finish_step(**alone)
        torch.testing.assert_close(one[:, 0], decision[:, b], rtol=0, atol=0, equal_nan=True)
        assert accepted_one == accepted[b]
    assert torch.equal(parts["tokens"], whole["tokens"]), "written in place"
    assert (accepted == -1).any()
    assert ((whole["tokens"] >= 0) & (decision[4] >= 0)).any()


def test_the_reference_serves_on_the_cpu() -> None:
    assert backend_of("finish_step", "cpu") == "reference"


def test_the_old_names_work_and_warn() -> None:
    arguments = row()
    with pytest.warns(DeprecationWarning, match=r"ops\.advance is now ops\.finish_step"):
        advance = ops.advance
    old = {"drawn" if name == "chosen_logprob" else name: x for name, x in copy.deepcopy(arguments).items()}
    with pytest.warns(DeprecationWarning, match="drawn= is now chosen_logprob="):
        decision, accepted = advance(**old)
    want = finish_step(**arguments)  # pyright: ignore[reportArgumentType]
    assert torch.equal(decision, want[0])
    assert torch.equal(accepted, want[1])
    with pytest.warns(DeprecationWarning, match=r"ops\.reward_tail is now ops\.score_and_sample"):
        assert ops.reward_tail is ops.score_and_sample


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logprobs", torch.zeros(9, 0), r"logprobs has shape \[9, 0\]: use \[B, K\] with K >= 1"),
        ("rewards", torch.zeros(9, 4), r"rewards has shape \[9, 4\]: use \[B, K\] = \[9, 5\]"),
        (
            "rewards",
            torch.zeros(9, 5, dtype=torch.float64),
            "rewards has dtype torch.float64: use torch.float32",
        ),
        ("choice", torch.zeros(9), "choice has dtype torch.float32: use torch.int64"),
        ("limit", torch.zeros(8, dtype=torch.int64), r"limit has shape \[8\]: use \[B\] = \[9\]"),
        (
            "chosen_logprob",
            torch.zeros(9, dtype=torch.int64),
            "chosen_logprob has dtype torch.int64: use a floating-point dtype",
        ),
        ("eos", torch.zeros(2, 1, dtype=torch.int64), r"eos has shape \[2, 1\]: use \[Z\]"),
        (
            "tokens",
            torch.zeros(18, dtype=torch.int64)[::2],
            "tokens is written in place: it must be contiguous",
        ),
        (
            "candidates",
            torch.zeros(9, 5, dtype=torch.int64, device="meta"),
            "candidates is on meta: move it to cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(RGTGError, match=message):
        finish_step(**(SPEC.make_inputs(SPEC.shapes[1], torch.float32) | {name: value}))
