"""Every op with inputs that nobody means: it refuses in one line, or every backend gives the reference's result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import RGTGError, ops
from rgtg_fast.ops import _extension, use_backend
from tests.ops.specs import SHARED, SPECS, call

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64)
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 5.0, -30.0)
WHOLE = (-1, -2, 0, 1, 3, 64, 2**31, 2**32, 2**63 - 1, -(2**63), -(2**63) + 1)
# Sizes that a spec's inputs are made for, and what else they may be like.
SIZES = {"T": 300}
OPTIONS = {
    "mask": (None, "chain", "causal"),
    "mode": ("eos", "repeat_last", "truncate"),
    "weight": ("prefix", "pair"),
}
# Dimensions of rows, so that there may be none: the first but where it is said.
ROWS = {"commit": {"k_new": 1, "v_new": 1, "k_cache": 1, "v_cache": 1}}
WITHOUT_ROWS = {*SHARED, "offsets", "normalizer"}


def _shape(name: str, data: st.DataObject) -> dict[str, Any]:
    """A small shape of an op."""
    shape = dict(data.draw(st.sampled_from(SPECS[name].shapes)))
    for key, value in shape.items():
        if type(value) is int:
            shape[key] = data.draw(st.integers(1, SIZES.get(key, 9)))
    if "H" in shape:
        shape["H"] *= shape["G"]
        shape.pop("lengths", None)
    if "slots" in shape:
        shape["slots"] += shape["B"]
    if "V" in shape:
        shape["V"] += data.draw(st.sampled_from([0, 0, 500, 9000]))
        shape["k"] = min(shape["k"], shape["V"])
    return shape


def _other_layout(x: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    """The same numbers with gaps between them, in another order of dimensions, or one row in the place of all."""
    how = data.draw(st.sampled_from(["gaps", "order", "expanded", "offset"]))
    if how == "gaps":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if how == "order":
        return x.mT.contiguous().mT if x.ndim > 1 else x
    if how == "expanded" and x.ndim and x.shape[0]:
        return x[:1].expand_as(x)
    return torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)


def _changed(x: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    """A tensor with one thing changed that may or may not be allowed."""
    how = data.draw(st.sampled_from(["values", "values", "layout", "layout", "dtype", "narrow", "dimension"]))
    if how == "layout":
        return _other_layout(x, data)
    if how == "dtype":
        return x.to(data.draw(st.sampled_from(OTHER_DTYPES)))
    if how == "dimension":
        return x.unsqueeze(0) if data.draw(st.booleans()) or not x.ndim else x[0:1].flatten()
    if how == "narrow" and x.ndim:
        at = data.draw(st.integers(0, x.ndim - 1))
        return x.narrow(at, 0, data.draw(st.integers(0, x.shape[at])))
    if not x.numel():
        return x
    flat = x.flatten()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, flat.numel() - 1))
        flat[at] = data.draw(st.sampled_from(FLOATS if x.is_floating_point() else WHOLE))
    return flat.view(x.shape)


def _arguments(name: str, data: st.DataObject) -> dict[str, Any]:
    shape = _shape(name, data)
    arguments = SPECS[name].make_inputs(
        shape, data.draw(st.sampled_from(DTYPES)), seed=data.draw(st.integers(0, 9))
    )
    tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    if data.draw(st.sampled_from([False, False, False, True])):
        for key in tensors:
            if key not in WITHOUT_ROWS:
                arguments[key] = arguments[key].narrow(ROWS.get(name, {}).get(key, 0), 0, 0)
    for key in data.draw(st.lists(st.sampled_from(tensors), max_size=2)):
        arguments[key] = _changed(arguments[key], data)
    if "k" in arguments and not isinstance(arguments["k"], torch.Tensor):
        arguments["k"] = data.draw(
            st.sampled_from([arguments["k"], arguments["k"], 0, -1, 10**6, 2**62, 2.5])
        )
    return arguments


def _outcome(name: str, arguments: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...] | str:
    """The op's results and what it has written; or its refusal, after which nothing may be written."""
    own = copy.deepcopy(arguments)
    try:
        with use_backend(backend):
            return call(name, own)
    except RGTGError as error:
        for key, value in own.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, arguments[key], rtol=0, atol=0, equal_nan=True)
        return str(error)


def _agree(got: torch.Tensor, want: torch.Tensor) -> None:
    """Close enough to be no garbage: how close is the matter of other tests."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if not want.is_floating_point():
        assert torch.equal(got, want)
        return
    got, want = got.double(), want.double()
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    if finite.any():
        assert got[finite].isfinite().all()
        limit = 0.02 * want[finite].abs().max().clamp_min(1.0)
        assert (got[finite] - want[finite]).abs().max() <= limit


def _try(name: str, data: st.DataObject) -> None:
    arguments = _arguments(name, data)
    want = _outcome(name, arguments, "reference")
    if isinstance(want, str):
        assert "\n" not in want
    first = next(iter(arguments.values()))
    if not SPECS[name].has_cpp or _extension.missing_reason() or first.dtype == torch.float64:
        return
    got = _outcome(name, arguments, "cpp")
    if isinstance(want, str) or isinstance(got, str):
        assert isinstance(want, str), f"only the C++ kernel refuses: {got}"
        assert isinstance(got, str), f"only the reference refuses: {want}"
        return
    for g, w in zip(got, want, strict=True):
        _agree(g, w)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("name", SPECS)
def test_fuzz(name: str, data: st.DataObject) -> None:
    _try(name, data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("name", SPECS)
def test_fuzz_longer(name: str, data: st.DataObject) -> None:
    _try(name, data)


@pytest.mark.usefixtures("cpp")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].has_cpp])
def test_the_extension_checks_its_arguments_itself(name: str, data: st.DataObject) -> None:
    """Called past the public function, which has looked at everything already."""
    arguments = copy.deepcopy(_arguments(name, data))
    if not isinstance(arguments.get("k", 1), (int, torch.Tensor)):
        return
    arguments = {key: 0.5 if key == "scale" and value is None else value for key, value in arguments.items()}
    try:
        with use_backend("cpp"):
            getattr(torch.ops.rgtg_fast, name)(**arguments)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError):
        pass  # torch's own refusals are none of a crash


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2**63 - 1, -(2**63), -1, 2],
        [0, -(2**63), 2],
        [0, 2**63 - 1, 2],
        [0, 1, 2**62, 2**62 + 1, 2],
        [-1, 1, 2],
        [0, 1, 3],
        [0, 2, 2],
        [1],
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_offsets_whose_differences_overflow_are_refused(offsets: list[int], backend: str) -> None:
    if backend == "cpp" and (reason := _extension.missing_reason()):
        pytest.skip(reason)
    rewards, ends, one = torch.zeros(2), torch.tensor(offsets), torch.ones(())
    for mode in ("eos", "repeat_last", "truncate"):
        with use_backend(backend), pytest.raises(RGTGError, match="partial_bt_loss: "):
            ops.partial_bt_loss(rewards, ends, mode=mode, normalizer=one)
    if len(offsets) > 1 and offsets[1:] != sorted(set(offsets[1:])):
        with pytest.raises(RGTGError, match="partial_bt_terms: "):
            ops.partial_bt_terms(ends, mode="truncate")
