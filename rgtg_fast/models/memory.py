"""Memory that a device has free, and the one line that a model gets which does not fit."""

from __future__ import annotations

from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

# What torch, safetensors and the system say where memory runs out; only CUDA's allocator has a class of its own.
_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on the device, None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    return min(
        (free for free in (_of_machine(), _of_container(), _of_process()) if free is not None), default=None
    )


def _of_machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_container() -> int | None:
    """What the control group (version 2) leaves; pages of files can be given back."""
    group = next((line[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "/")
    folder = Path("/sys/fs/cgroup", group.strip("/"))
    if not (folder / "memory.max").exists():
        folder = Path("/sys/fs/cgroup")
    limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not used or limit[0] == "max":
        return None
    cached = [line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
    return max(0, int(limit[0]) - int(used[0]) + int(*cached))


def _of_process() -> int | None:
    """What `ulimit -v` leaves."""
    if resource is None:
        return None
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _lines(Path("/proc/self/statm"))
    if limit == resource.RLIM_INFINITY or not used:
        return None
    return max(0, limit - int(used[0].split()[0]) * resource.getpagesize())


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


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
