"""Copies between host and device, on a device that is played by stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rgtg_fast.models import transfer
from rgtg_fast.models.transfer import AsyncCopy


def test_a_copy_on_the_host_keeps_what_was_there() -> None:
    x = torch.arange(4)
    arrival = AsyncCopy([x])
    x.zero_()
    assert arrival.get()[0].tolist() == [0, 1, 2, 3]


def test_the_event_waits_for_the_stream_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is another one: an event on its stream would be over before the copy."""
    recorded: list[str] = []

    class Event:
        def record(self, stream: str = "stream of cuda:0, the current device") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("waited")

    empty = torch.empty

    def unpinned(shape: Any, dtype: torch.dtype, pin_memory: bool) -> Any:
        assert pin_memory
        return SimpleNamespace(copy_=lambda x, non_blocking: empty(shape, dtype=dtype))

    monkeypatch.setattr(transfer.torch, "empty", unpinned)
    monkeypatch.setattr(transfer.torch.cuda, "Event", Event)
    monkeypatch.setattr(transfer.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), shape=(2,), dtype=torch.float64)
    arrival = AsyncCopy([tensor])  # type: ignore[list-item]
    assert recorded == ["stream of cuda:1"]
    arrival.get()
    assert recorded == ["stream of cuda:1", "waited"]
