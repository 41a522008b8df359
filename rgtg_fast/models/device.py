"""Devices and dtypes: which to use, free memory, host-device copies, autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from rgtg_fast.errors import RGTGError, shown

try:
    import resource
except ImportError:  # Windows
    resource = None

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DEVICE_TYPES = ("cpu", "cuda")
# Error texts of torch, safetensors and the operating system; only CUDA's allocator has an exception class of its own.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The requested device; by default CUDA where it is available.

    Raises:
        RGTGError: a device that torch does not know or does not see, or one that is neither CPU nor CUDA.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RGTGError(f"device={shown(device)} is unknown to torch: use 'cpu' or 'cuda'") from error
    if resolved.type not in DEVICE_TYPES:
        raise RGTGError(f"device={str(device)!r} is not served: use 'cpu' or 'cuda'")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise RGTGError(
            f"device={str(device)!r} was asked for and torch sees no CUDA device: use device='cpu'"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RGTGError(f"device={str(device)!r} is beyond the {torch.cuda.device_count()} that torch sees")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The requested dtype; by default float32 on a CPU (exact) and bfloat16 on a GPU.

    Raises:
        RGTGError: a dtype that is not in `DTYPES`.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise RGTGError(f"dtype={shown(dtype)} is unknown: use one of {', '.join(DTYPES)}")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disables the caller's autocast contexts in a block, or in a function decorated with `@without_autocast()`.

    A model's dtype is chosen at load time. Under autocast, torch's operations would round to bfloat16 and the fused
    kernels would not.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast():
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    with ExitStack() as stack:
        for kind in DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# ---- host-device copies ----------------------------------------------------------------------------------------------


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copies numbers from the host into a tensor on the device; on CUDA the host does not wait for the copy."""
    # Only page-locked memory is copied asynchronously; torch keeps it alive until the copy is complete.
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class AsyncCopy:
    """Asynchronous copies of tensors to the host; later writes on the device do not change them.

    Args:
        tensors: all on one device. On CUDA the copies are enqueued on that device's current stream.
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
        """The tensors on the host; waits for these copies only, not for work enqueued after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


# ---- memory ----------------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Bytes of free memory on the device; None where the system does not report it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    limits = (_free_in_machine(), _free_in_container(), _free_in_process())
    return min((free for free in limits if free is not None), default=None)


def _free_in_machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _free_in_container() -> int | None:
    """Bytes below the limit of the control group (version 2); the page cache can be reclaimed."""
    group = next((line[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "/")
    folder = Path("/sys/fs/cgroup", group.strip("/"))
    if not (folder / "memory.max").exists():
        folder = Path("/sys/fs/cgroup")
    limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not used or limit[0] == "max":
        return None
    cached = [line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
    return max(0, int(limit[0]) - int(used[0]) + int(*cached))


def _free_in_process() -> int | None:
    """Bytes below the process's limit of address space (`ulimit -v`)."""
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


@contextmanager
def fits_in_memory(title: str, parameters: int | None, dtype: torch.dtype) -> Iterator[None]:
    """Replaces any library's out-of-memory error while weights are loaded or moved.

    Args:
        title: the model's role and name.
        parameters: number of the model's parameters, None where it is unknown.
        dtype: dtype of the weights.

    Raises:
        RGTGError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        if not (isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY)):
            raise
        raise RGTGError(too_large(title, parameters, dtype)) from error


def too_large(title: str, parameters: int | None, dtype: torch.dtype, free: int | None = None) -> str:
    """The error message for weights that do not fit: how much they need, and what would fit.

    Args:
        title: the model's role and name.
        parameters: number of the model's parameters, None where it is unknown.
        dtype: dtype of the weights.
        free: bytes free, None where it is unknown.
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
