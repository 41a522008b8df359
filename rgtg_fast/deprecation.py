"""Names that users may have typed and that have changed: accepted for one release, with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[_T], _T]:
    """Decorates a function or a dataclass some of whose keyword arguments have new names.

    Args:
        names: the new name by the old one. A dataclass also answers to the old names of its fields when they are read.

    Example:
        >>> @renamed(length="max_tokens")
        ... def generate(max_tokens=8):
        ...     return max_tokens
        >>> generate(length=3)
        3
    """

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            cls: Any = target
            cls.__init__ = decorate(cls.__init__)
            cls.__getattr__ = _old_field(names)
            return cls

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            return target(*args, **current_names(kwargs, names))

        return call

    return decorate


def current_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments under their new names; an old name's value takes precedence over the new one's.

    Args:
        values: arguments by old or new name. names: the new name by the old one.
    """
    old = {name: value for name, value in values.items() if name in names}
    for name in old:
        _warn(name, names[name])
    new = {name: value for name, value in values.items() if name not in names}
    return new | {names[name]: value for name, value in old.items()}


def current_value(value: str, values: Mapping[str, str]) -> str:
    """A value under its new name.

    Args:
        values: the new value by the old one.
    """
    if value not in values:
        return value
    _warn(repr(value), repr(values[value]))
    return values[value]


def _old_field(names: Mapping[str, str]) -> Callable[[Any, str], Any]:
    def read(self: Any, name: str) -> Any:
        if name not in names:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        _warn(name, names[name])
        return getattr(self, names[name])

    return read


def _warn(old: str, new: str) -> None:
    # Three frames up: this function's caller, the wrapper, and the code that uses the old name.
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release: use {new}",
        DeprecationWarning,
        stacklevel=4,
    )
