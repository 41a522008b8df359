"""The Triton kernels of tree_attention against the reference, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import io
import math
from unittest import mock

import pytest
import torch

from rgtg_fast.ops import tree_attention, use_backend
from rgtg_fast.ops._triton import _tickets, tickets
from tests.ops.interpreted import interpreted, missing_reason
from tests.ops.specs import SPECS, in_double, row_of
from tests.ops.support import compare

pytestmark = pytest.mark.triton
if missing_reason():
    pytest.skip(missing_reason(), allow_module_level=True)
SPAN = SPECS["tree_attention"].kernel.SPAN
NAN = math.nan


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (None, 0),
        ("tree", 0),
        ("causal", 650),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("causal", 0), (None, 650), ("tree", 3))),
    ],
)
@pytest.mark.parametrize(
    ("T", "lengths"),
    [
        pytest.param(1500, [0, 64, 300, 700, 1100, 1500], id="leaves merged by their last program"),
        pytest.param(
            2 * SPAN + 300, [2 * SPAN + 290, 700], id="leaves by a kernel, spans by their last program"
        ),
    ],
)
@interpreted
@use_backend("triton")
def test_the_cut_of_the_prefix_changes_no_bit(T, lengths, mask, window):
    """A program per leaf and a program per span are the same sums in the same order; tickets are taken back."""
    shape = {"B": len(lengths), "H": 2, "G": 1, "S": 3, "T": T, "D": 16, "mask": mask}
    if window:
        shape |= {"window": window, "softcap": 3.0, "sinks": True}
    arguments = SPECS["tree_attention"].make_inputs({**shape, "lengths": lengths}, torch.float32)
    kernel = SPECS["tree_attention"].kernel
    results = []
    for programs in (1, 1000, 1):
        split = kernel.split_prefix(programs, 6, T, 64, 132)
        assert (split[0] == 0) is (programs == 1)
        with mock.patch.object(kernel, "split_prefix", lambda *_, split=split: split):
            results.append(tree_attention(**arguments))
        assert not tickets(torch.device("cpu"), 1).any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # Nor does the length of the cache.
    row = lengths.index(700)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name][:, :, :700]
    assert torch.equal(tree_attention(**row_of(arguments, row)), results[0][row : row + 1])


@pytest.mark.parametrize("T", [300, pytest.param(SPAN + 300, marks=pytest.mark.slow)])
@interpreted
@use_backend("triton")
def test_a_slot_has_the_bits_of_a_cache_of_its_own(T):
    """With the leaves merged by their last program, and by a kernel."""
    shape = {"B": 2, "H": 2, "G": 1, "S": 3, "T": T, "D": 16, "lengths": [T, 70], "slots": 4}
    arguments = SPECS["tree_attention"].make_inputs(shape, torch.float32)
    own = {name: arguments[name][arguments["slots"]] for name in ("k_cache", "v_cache", "lengths")}
    got = tree_attention(**arguments)
    assert torch.equal(got, tree_attention(**{**arguments, **own, "slots": None}))


@interpreted
def test_a_slot_outside_the_cache_reads_nothing_there():
    """On a GPU nobody checks the slots: the kernel stays inside."""
    launch = SPECS["tree_attention"].kernel.launch
    shape = {"B": 2, "H": 2, "G": 1, "S": 1, "T": 6, "D": 16, "lengths": [6, 3]}
    arguments = SPECS["tree_attention"].make_inputs(shape, torch.float32)
    inside = launch(**{**arguments, "slots": torch.tensor([0, 1])})
    assert torch.equal(launch(**{**arguments, "slots": torch.tensor([-(2**40), 2**40])}), inside)


def test_tickets_that_graphs_have_recorded_stay_when_more_are_needed():
    few = tickets(torch.device("cpu"), 10)
    many = tickets(torch.device("cpu"), len(few) + 1)
    assert len(many) > len(few)
    assert any(held is few for held in _tickets[torch.device("cpu"), 0])
    assert tickets(torch.device("cpu"), 10) is many


@interpreted
def test_block_shapes_are_tried_and_those_that_differ_are_left_out():
    from benchmarks.ops import tune

    shape = {"B": 1, "H": 4, "G": 1, "S": 2, "T": 70, "D": 16, "lengths": [70]}
    launched = []
    calls = iter(range(100))

    def time(function, inputs):
        function(inputs[0])
        launched.append(next(calls))
        return (1.0, 10.0 - launched[-1], 20.0)

    kernel = SPECS["tree_attention"].kernel
    own = kernel.configuration
    several = list(tune.candidates(tune.own_settings(shape, torch.bfloat16)))
    assert len(several) == len({tuple(each.items()) for each in several}) > 15
    four = mock.patch.object(tune, "candidates", return_value=several[:4])
    with four:
        rows = tune.tried(shape, 100.0, "cpu", time)
    assert [row["chosen"] for row in rows] == [False, False, False, True], "the fastest first"
    assert [row["us_p50"] for row in rows] == [7.0, 8.0, 9.0, 10.0]
    # Only the launch's own settings change what is launched, and only within.
    assert {row["block_n"] for row in rows} == {32, 64}
    assert kernel.configuration is own

    told = io.StringIO()
    with four, mock.patch.object(tune, "agrees", return_value=False), contextlib.redirect_stdout(told):
        assert tune.tried(shape, 100.0, "cpu", time) == []
    assert "differs from the reference" in told.getvalue()


@interpreted
@use_backend("triton")
def test_many_rows_walk_over_the_whole_prefix():
    shape = {"B": 2, "H": 2, "G": 1, "S": 512, "T": 700, "D": 16, "mask": "causal", "lengths": [0, 600]}
    arguments = SPECS["tree_attention"].make_inputs(shape, torch.float32)
    with use_backend("reference"):
        want = tree_attention(**in_double(arguments))
    compare(tree_attention(**arguments), want, SPECS["tree_attention"].tolerances[torch.float32])


@interpreted
@use_backend("triton")
def test_a_nan_candidate_stays_alone():
    arguments = SPECS["tree_attention"].make_inputs(
        {"B": 1, "H": 4, "G": 2, "S": 8, "T": 300, "D": 16}, torch.float32
    )
    want = tree_attention(**arguments)
    for name in ("q", "k", "v"):
        arguments[name][:, :, 3] = NAN
    got = tree_attention(**arguments)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert got[:, :, 3].isnan().all()
    assert torch.equal(got[:, :, others], want[:, :, others])


@interpreted
@use_backend("triton")
def test_an_empty_prefix_and_a_token_that_sees_nothing():
    make = SPECS["tree_attention"].make_inputs
    arguments = make({"B": 1, "H": 4, "G": 2, "S": 5, "T": 0, "D": 16}, torch.float32)
    assert torch.equal(tree_attention(**arguments), arguments["v"].repeat_interleave(2, dim=1))
    blind = make(
        {"B": 1, "H": 2, "G": 1, "S": 2, "T": 4, "D": 8, "mask": "tree", "lengths": [0]}, torch.float32
    )
    got = tree_attention(**blind)
    assert (got[:, :, 1] == 0).all()
    assert got[:, :, 0].isfinite().all()


@pytest.mark.parametrize(
    ("window", "mask"), [(1, None), (64, None), (300, None), (130, "causal"), (2200, "causal")]
)
@interpreted
@use_backend("triton")
def test_a_window_is_a_prefix_that_begins_later(window, mask):
    """Bit for bit: what lies before it does not even change how the sums are split."""
    shape = {"B": 1, "H": 4, "G": 2, "S": 2, "T": 5000, "D": 16, "lengths": [4900], "mask": mask}
    arguments = SPECS["tree_attention"].make_inputs({**shape, "window": window, "sinks": True}, torch.float32)
    first = 4900 - window + 1
    later = {name: arguments[name][:, :, first:] for name in ("k_cache", "v_cache")}
    later |= {"lengths": torch.tensor([window - 1]), "window": window if mask else None}
    assert torch.equal(tree_attention(**arguments), tree_attention(**{**arguments, **later}))


@pytest.mark.parametrize("mask", [None, "causal", "tree"])
@interpreted
@use_backend("triton")
def test_a_window_that_nothing_leaves_changes_no_bit(mask):
    shape = {"B": 2, "H": 6, "G": 2, "S": 9, "T": 232, "D": 20, "mask": mask, "lengths": [232, 0]}
    arguments = SPECS["tree_attention"].make_inputs(shape, torch.float32)
    want = tree_attention(**arguments)
    for window in (241, 2**31 - 1, 2**80):
        assert torch.equal(tree_attention(**{**arguments, "window": window}), want)


@interpreted
@use_backend("triton")
def test_many_rows_leave_what_none_of_them_sees():
    """Whole leaves of the prefix, and blocks of the new tokens."""
    shape = {"B": 2, "H": 2, "G": 1, "S": 512, "T": 700, "D": 16, "mask": "causal", "lengths": [30, 700]}
    arguments = SPECS["tree_attention"].make_inputs({**shape, "window": 400, "sinks": True}, torch.float32)
    with use_backend("reference"):
        want = tree_attention(**in_double(arguments))
    compare(tree_attention(**arguments), want, SPECS["tree_attention"].tolerances[torch.float32])


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("sinks", [False, True])
@interpreted
@use_backend("triton")
def test_an_own_score_of_minus_infinity_weighs_nothing(prefix, sinks):
    shape = {"B": 1, "H": 1, "G": 1, "S": 1, "T": prefix, "D": 4, "sinks": sinks}
    arguments = SPECS["tree_attention"].make_inputs(shape, torch.float32)
    arguments["q"][...], arguments["k"][...] = 1.0, -math.inf
    with use_backend("reference"):
        want = tree_attention(**arguments)
    torch.testing.assert_close(tree_attention(**arguments), want)


@pytest.mark.parametrize("factor", [1e4, 1e-30, 0.0])
@interpreted
@use_backend("triton")
def test_extreme_scores(factor):
    arguments = SPECS["tree_attention"].make_inputs(
        {"B": 1, "H": 2, "G": 1, "S": 3, "T": 600, "D": 16}, torch.float32
    )
    arguments["scale"] = factor
    with use_backend("reference"):
        want = tree_attention(**in_double(arguments))
    torch.testing.assert_close(
        tree_attention(**arguments).double(), want, rtol=0, atol=1e-3 if factor > 1 else 4e-6
    )
