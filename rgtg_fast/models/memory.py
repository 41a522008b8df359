"""Memory that a device has free, and the one line that a model gets which does not fit."""

from __future__ import annotations

from pathlib import Path

import torch

# What torch, safetensors and the system say where memory runs out; only CUDA's allocator has a class of its own.
_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on the device, None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(part in text for part in _TEXTS)


def too_large(title: str, parameters: int | None, dtype: torch.dtype, free: int | None = None) -> str:
    """One line for weights that do not fit: what they need, and what would fit.

    Args:
        title: of the model. parameters: how many numbers its weights are, None where that is not known.
        free: bytes free, None where that is not known.
    """
    name = str(dtype).removeprefix("torch.")
    smaller = "" if dtype.itemsize <= 2 else "dtype bfloat16"
    if parameters is None:
        need = f"the weights of {title} as {name} do not fit the free memory"
    else:
        need = f"the weights of {title} need {_gib(parameters * dtype.itemsize)} as {name}"
        need += f" and {_gib(free)} are free" if free is not None else ", more than is free"
        smaller += f" ({_gib(parameters * 2)})" if smaller else ""
    return f"{need}: use {' or '.join(filter(None, (smaller, 'a smaller model')))}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
