"""Numbers between host and device, so that neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers as a tensor on the device; on CUDA the host goes on while they are copied."""
    # Only page-locked memory is copied without the host, and torch keeps it until the copy is through.
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class AsyncCopy:
    """Tensors on their way to the host, as they are now: later writes on the device do not reach them.

    Args:
        tensors: all on one device. On CUDA the copies follow what that device's current stream has been given so far.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._event: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self._copies = [x.clone() for x in tensors]
            return
        self._copies = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors
        ]
        self._event = torch.cuda.Event()
        # The copies run on the tensors' device, which need not be the current one.
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def get(self) -> list[torch.Tensor]:
        """The tensors on the host; waits for these copies alone, not for what the device was given after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
