"""Whether the prefix caches of a call fit, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import torch

from rgtg_fast.errors import MemoryTooSmallError


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


def check_fits(bytes_per_row: int, rows: int, length: int, free: int | None) -> None:
    """Refuses a batch whose caches would not fit.

    Args:
        bytes_per_row: of all caches, for one row of `length` tokens. free: bytes free, None to skip the check.

    Raises:
        MemoryTooSmallError: saying which batch would fit.
    """
    needed = bytes_per_row * rows
    if free is None or needed <= free:
        return
    fit = free // bytes_per_row
    way_out = (
        f"max_batch={fit} would fit" if fit else "not even one row fits: use fewer tokens or a smaller dtype"
    )
    raise MemoryTooSmallError(
        f"the KV caches of {rows} rows of {length} tokens need {needed / 2**30:.2f} GiB and "
        f"{free / 2**30:.2f} GiB are free: {way_out}"
    )
