"""What the Triton kernels share: whether Triton is installed, the device, and counters for the last program."""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import AbstractContextManager, nullcontext

import torch


@functools.cache
def missing_reason() -> str:
    """Why Triton is missing, in one clause; empty where it is not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}): pip install triton"
    return ""


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels, on tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not missing_reason()


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launches kernels on the tensor's device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; in the interpreter, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability of a device, 10 · major + minor; in the interpreter, 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# By device and stream. Buffers are kept when a launch needs a larger one, because captured graphs still use them.
_tickets: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros, shared by the launches of the current stream; each launch leaves them at 0."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _tickets.setdefault((device, stream), [])
    if not held or len(held[-1]) < count:
        held.append(torch.zeros(max(4096, power_of_two(count)), dtype=torch.int32, device=device))
    return held[-1]


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two >= `n` and >= `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())
