"""Seconds by phase, and on demand ranges of torch's profiler and NVTX."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall seconds by phase.

    Args:
        spans: whether every phase is a profiler and NVTX range too.
        synchronize: whether every phase waits for the device, which slows the run. Otherwise a GPU's phases are
            the time of launching alone.

    Attributes:
        seconds: by phase.
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
