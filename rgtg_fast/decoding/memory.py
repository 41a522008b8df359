"""Whether the prefix caches of a call fit, before anything is allocated."""

from __future__ import annotations

from rgtg_fast.errors import MemoryTooSmallError


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
