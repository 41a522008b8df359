"""The shapes that an op is tried with, and one comparison for every op."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import pytest
import torch

from tests.ops.specs import Tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases_of(
    shapes: Mapping[str, Iterable[Mapping[str, Any]]], dtypes: Iterable[torch.dtype] = DTYPES
) -> list[Any]:
    """(name, shape, dtype) of every op, as pytest parameters."""
    return [
        pytest.param(
            name, shape, dtype, id=f"{name}-{'-'.join(map(str, shape.values()))}-{dtype}".replace(" ", "")
        )
        for name, of_op in shapes.items()
        for shape in of_op
        for dtype in dtypes
    ]


def shape_and_dtype(name: str, shape: Mapping[str, Any], dtype: torch.dtype) -> set[Hashable]:
    """What such a case shows: its op's shape, and its op in its dtype."""
    return {(name, str(shape)), (name, dtype)}


def compare(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance) -> None:
    """Root-mean-square and maximum of the difference are within the op's tolerances."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    # What is not finite must be the same on both sides; the rest is measured.
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    got, want = got[finite], want[finite]
    if want.numel() == 0:
        return
    assert got.isfinite().all()
    difference = got - want
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30)
    largest = difference.abs().max() / want.abs().max().clamp(min=1e-30)
    assert rms <= tolerance.rms, f"RMS ratio {rms:.3g} exceeds {tolerance.rms:.3g}"
    assert largest <= tolerance.max, f"maximum ratio {largest:.3g} exceeds {tolerance.max:.3g}"
