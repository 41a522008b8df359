"""Answer text while it grows: stop strings and pieces that never split a character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rgtg_fast.errors import RGTGError, shown


def as_stops(stop: str | Sequence[str] | None) -> list[str]:
    """Stop strings as a list.

    Raises:
        RGTGError: one that is empty or no string.
    """
    given = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(given, Iterable):
        raise RGTGError(f"stop={shown(stop)} is no stop string: pass a string or a list of strings")
    stops = list(given)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RGTGError(f"stop={shown(text)} is no stop string: pass non-empty strings")
    return stops


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the earliest stop string begins in the text, -1 where there is none."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=-1)


def safe_length(text: str, stops: Sequence[str]) -> int:
    """How much of a growing text can be shown: no unfinished character, no beginning of a stop string at its end."""
    end = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text.endswith(stop[:size], 0, end):
                end -= size
                break
    return end
