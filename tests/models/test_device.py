"""Asynchronous copies to the host, with mocks in place of a CUDA device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rgtg_fast.models import device
from rgtg_fast.models.device import AsyncCopy


def test_a_copy_keeps_the_values_at_its_start() -> None:
    x = torch.arange(4)
    copy = AsyncCopy([x])
    x.zero_()
    assert copy.get()[0].tolist() == [0, 1, 2, 3]


def test_the_event_waits_for_the_stream_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is another one: an event on its stream could complete before the copy."""
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

    monkeypatch.setattr(device.torch, "empty", unpinned)
    monkeypatch.setattr(device.torch.cuda, "Event", Event)
    monkeypatch.setattr(device.torch.cuda, "current_stream", lambda where: f"stream of {where}")
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), shape=(2,), dtype=torch.float64)
    copy = AsyncCopy([tensor])  # type: ignore[list-item]
    assert recorded == ["stream of cuda:1"]
    copy.get()
    assert recorded == ["stream of cuda:1", "waited"]
