"""Whether the prefix caches of a call fit, before anything is allocated."""

from __future__ import annotations

from rgtg_fast.errors import MemoryTooSmallError


def check_fits(
    bytes_per_row: int, rows: int, length: int, free: int | None, setting: str = "max_batch"
) -> None:
    """Refuses a batch whose caches would not fit.

    Args:
        bytes_per_row: of all caches, for one row of `length` tokens. free: bytes free, None to skip the check.
        setting: what has as many rows.

    Raises:
        MemoryTooSmallError: saying which batch would fit.
    """
    needed = bytes_per_row * rows
    if free is None or needed <= free:
        return
    fit = free // bytes_per_row
    way_out = (
        f"{setting}={fit} would fit" if fit else "not even one row fits: use fewer tokens or a smaller dtype"
    )
    raise MemoryTooSmallError(
        f"the KV caches of {rows} rows of {length} tokens need {needed / 2**30:.2f} GiB and "
        f"{free / 2**30:.2f} GiB are free: {way_out}"
    )


def check_candidates(bytes_of_one: int, k: int, rows: int, free: int | None) -> None:
    """Refuses more candidates than a step could score.

    Args:
        bytes_of_one: of one candidate of every row. free: bytes free, None to skip the check.

    Raises:
        MemoryTooSmallError: saying how many would fit.
    """
    # A rough figure, meant for absurd k: below a GiB nothing is refused by it.
    if free is None or bytes_of_one * k <= max(free, 2**30):
        return
    raise MemoryTooSmallError(
        f"scoring k={k} candidates of {rows} rows needs {bytes_of_one * k / 2**30:.2f} GiB and {free / 2**30:.2f} GiB "
        f"are free: k={free // bytes_of_one} would fit"
    )


# Bytes on the host of an answer: objects and lists, and of each token, its id, log-probability and reward.
_ANSWER, _TOKEN = 2500, 100


def check_samples(samples: int, prompts: int, prompt_tokens: int, new_tokens: int, free: int | None) -> None:
    """Refuses more answers to a prompt than the host's memory can keep until the best is known.

    Args:
        samples: of a prompt. prompts: whose samples are kept at once. prompt_tokens, new_tokens: of an answer at most.
        free: bytes free on the host, None to skip the check.

    Raises:
        MemoryTooSmallError: saying how many would fit.
    """
    # A short answer ends early: its tokens are counted by the first alone, so that nothing is refused that fits.
    each = prompts * (_ANSWER + 8 * prompt_tokens + _TOKEN * min(new_tokens, 1))
    if free is None or samples * each <= free:
        return
    raise MemoryTooSmallError(
        f"n={samples} answers per prompt need {samples * each / 2**30:.1f} GiB or more and {free / 2**30:.1f} GiB are "
        f"free: n={free // each} would fit"
    )
