"""What every op promises, checked for every spec."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from rgtg_fast import ops
from rgtg_fast.ops import use_backend
from tests.covering import daily
from tests.ops.specs import SPECS, call, in_double, row_of
from tests.ops.support import cases_of, shape_and_dtype

CASES = daily(cases_of({name: spec.shapes for name, spec in SPECS.items() if spec.has_cpp}), shape_and_dtype)


def small(dtypes: tuple[torch.dtype, ...], names: Iterable[str] = SPECS) -> list[Any]:
    """The first shapes of every op in these dtypes, and those with a window or slots."""
    others = {
        name: [shape for shape in SPECS[name].shapes[6:] if {"window", "slots"} & set(shape)]
        for name in names
    }
    cases = cases_of({name: (*SPECS[name].shapes[:6], *others[name]) for name in names}, dtypes)
    return daily(cases, shape_and_dtype)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_cpp_equals_the_float64_reference(name, shape, dtype, compare, monkeypatch):
    """The kernels' own outputs start as NaN, so that nothing is left unwritten."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        x = empty(*size, **options)
        return x.fill_(float("nan") if x.is_floating_point() else -(1 << 40))

    spec = SPECS[name]
    arguments = spec.make_inputs(shape, dtype)
    with use_backend("reference"):
        want = call(name, in_double(arguments))
    monkeypatch.setattr(torch, "empty", poisoned)
    with use_backend("cpp"):
        got = call(name, arguments)
    for g, w in zip(got, want, strict=True):
        if not w.is_floating_point():
            assert torch.equal(g, w)
        else:
            compare(g, w, spec.tolerances[dtype])


@pytest.mark.parametrize(("name", "shape", "dtype"), small((torch.float32, torch.float64)))
def test_opcheck(name, shape, dtype):
    arguments = SPECS[name].make_inputs(shape, dtype)
    torch.library.opcheck(getattr(torch.ops.rgtg_fast, name).default, tuple(arguments.values()))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(("name", "shape", "dtype"), small((torch.float32, torch.bfloat16)))
def test_number_of_threads_changes_no_bit(name, shape, dtype, threads):
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(call(name, SPECS[name].make_inputs(shape, dtype)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(
                a.nan_to_num(7.0) if a.is_floating_point() else a,
                b.nan_to_num(7.0) if b.is_floating_point() else b,
            )


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    small((torch.float32, torch.bfloat16), ("resample", "topk_logprobs", "tree_attention")),
)
def test_a_row_has_the_same_bits_in_any_batch(name, shape, dtype):
    arguments = SPECS[name].make_inputs(shape, dtype)
    whole = call(name, arguments)
    for row in range(shape["B"]):
        for a, b in zip(call(name, row_of(arguments, row)), whole, strict=True):
            torch.testing.assert_close(a, b[row : row + 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("name", SPECS)
def test_strided_views_give_the_same(name):
    """Every tensor is a view with gaps in each dimension but the last."""
    arguments = SPECS[name].make_inputs(SPECS[name].shapes[1], torch.float32)

    def spread(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.ndim < 2 or not x.is_floating_point():
            return x
        buffer = torch.full([2 * n for n in x.shape[:-1]] + [x.shape[-1] + 3], float("nan"))
        view = buffer[tuple(slice(None, None, 2) for _ in x.shape[:-1])][..., : x.shape[-1]]
        return view.copy_(x)

    views = {key: spread(copy.deepcopy(x)) for key, x in arguments.items()}
    for backend in ("reference", "cpp") if SPECS[name].has_cpp else ("reference",):
        with use_backend(backend):
            a, b = call(name, copy.deepcopy(arguments)), call(name, dict(views))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        # commit has written into the views: start from fresh ones.
        views = {key: spread(copy.deepcopy(x)) for key, x in arguments.items()}


def test_every_spec_is_complete():
    for name, spec in SPECS.items():
        assert spec.name == name
        assert set(spec.tolerances) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
        assert hasattr(torch.ops.rgtg_fast, name)
        assert getattr(ops, name).__doc__
