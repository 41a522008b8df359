"""Parameters of a test of which the default run takes those few that together show all there is to see."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import combinations
from typing import Any

import pytest


def pairs(*values: Any) -> set[Hashable]:
    """Every two values of two different parameters, and so each value too."""
    named = list(enumerate(map(str, values)))
    return set(combinations(named, 2)) or set(named)


def each(*values: Any) -> set[Hashable]:
    """Every value of every parameter."""
    return set(enumerate(map(str, values)))


def daily(cases: Iterable[Any], shows: Callable[..., Iterable[Hashable]] = pairs) -> list[Any]:
    """The cases as pytest parameters: a greedy few that show all that any case shows, the others marked slow.

    Args:
        cases: tuples of values, or pytest parameters.
        shows: what a case shows, given its values: `pairs`, `each` or a function of the test's own.
    """
    params = [case if hasattr(case, "marks") else pytest.param(*case) for case in cases]
    shown = [set(shows(*param.values)) for param in params]
    missing = set[Hashable]().union(*shown)
    chosen = set()
    while missing:
        best = max(range(len(params)), key=lambda i: (len(shown[i] & missing), -i))
        chosen.add(best)
        missing -= shown[best]
    return [
        param if i in chosen else param._replace(marks=(*param.marks, pytest.mark.slow))
        for i, param in enumerate(params)
    ]
