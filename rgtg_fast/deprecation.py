"""Names that were changed and keep working for one release, each with a DeprecationWarning that gives the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from rgtg_fast.errors import RGTGError

Function = TypeVar("Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns the caller's caller that a name has changed."""
    warnings.warn(f"{old} is now {new}: use the new name", DeprecationWarning, stacklevel=stacklevel)


def renamed_keywords(**names: str) -> Callable[[Function], Function]:
    """Decorates a function so that it takes keyword parameters by their old names too.

    Args:
        names: old name=new name.

    Raises:
        RGTGError: at a call: a parameter by both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for old in names.keys() & given.keys():
                warn_renamed(f"{old}=", f"{names[old]}=")
                if names[old] in given:
                    raise RGTGError(f"{old}= is the old name of {names[old]}=: pass one of them")
                given[names[old]] = given.pop(old)
            return function(*args, **given)

        return call  # pyright: ignore[reportReturnType]

    return decorate


def renamed_method(old: str, new: str, method: Function) -> Function:
    """A method under its old name, which calls that very method and not what a subclass puts in its place."""

    @functools.wraps(method)
    def call(*args: Any, **given: Any) -> Any:
        warn_renamed(old, new)
        return method(*args, **given)

    return call  # pyright: ignore[reportReturnType]


class RenamedAttribute:
    """The old name of an attribute: reads and writes the new one.

    Example:
        >>> class Engine:
        ...     steps = 1
        ...     ahead = RenamedAttribute("steps")
    """

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old, self.owner = name, owner.__name__

    def _warn(self) -> None:
        warn_renamed(f"{self.owner}.{self.old}", self.new, stacklevel=4)

    def __get__(self, thing: Any, owner: type) -> Any:
        self._warn()
        return getattr(owner if thing is None else thing, self.new)

    def __set__(self, thing: Any, value: Any) -> None:
        self._warn()
        setattr(thing, self.new, value)
