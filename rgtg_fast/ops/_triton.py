"""Finds Triton when a kernel is first needed, and says why there is none."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

# How Triton's own compiler writes the dtypes.
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}

# Arguments of a launch that are no arguments of the kernel.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@functools.cache
def missing_reason() -> str:
    """Why there is no Triton, in one clause; empty where there is one."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}): pip install triton"
    return ""


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which serves tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not missing_reason()


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launches go to the device of the tensor, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; of an H200 where there is only the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability of a device, ten times the major plus the minor; 90 where there is only the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# By device and stream. What graphs have recorded is kept when a launch needs more: it goes on being used by them.
_tickets: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros that the launches of the current stream share, each leaving them at 0."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _tickets.setdefault((device, stream), [])
    if not held or len(held[-1]) < count:
        held.append(torch.zeros(max(4096, power_of_two(count)), dtype=torch.int32, device=device))
    return held[-1]


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is not below `n` nor `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def signature(arguments: Mapping[str, str], configuration: Mapping[str, object]) -> dict[str, str]:
    """A compile signature: the types of the arguments, then the values of constants and options."""
    return {**arguments, **{name: str(value) for name, value in configuration.items()}}
