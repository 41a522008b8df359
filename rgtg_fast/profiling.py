"""Named spans: seconds by phase always, and ranges in torch's profiler and NVTX when asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall seconds by phase; with `spans=True` every phase is also a profiler and NVTX range.

    The clock is the host's: on a GPU it measures launching, unless `synchronize` is set (then every phase waits
    for the device, which slows the run and is meant for measuring only).
    """

    def __init__(self, spans: bool = False, synchronize: bool = False):
        self.seconds: dict[str, float] = {}
        self.spans = spans
        self.synchronize = synchronize

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        if not self.spans:
            yield
        else:
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.nvtx.range_push(phase)
            with torch.profiler.record_function(f"rgtg_fast::{phase}"):
                yield
            if cuda:
                torch.cuda.nvtx.range_pop()
        if self.synchronize:
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
