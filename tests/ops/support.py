"""One comparison for every op: root-mean-square and maximum of the difference, by the op's tolerance table."""

from __future__ import annotations

import torch

from rgtg_fast.ops import Tolerance


def compare(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance) -> None:
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
