"""Errors that a user can cause: one line each, with the value, the limit and what to do."""

from __future__ import annotations

from typing import Any


class RGTGError(ValueError):
    """An input that cannot work; the message is one line that says what would."""

    def __init__(self, message: str = ""):
        # A quoted part, such as another library's error, may contain line breaks.
        super().__init__(message.replace("\n", " "))


class MemoryTooSmallError(RGTGError):
    """The prefix caches of a call would not fit the device's memory; raised before anything is allocated."""


class RewardNaNError(RGTGError):
    """A reward is NaN (or +inf) during a run.

    Attributes:
        row: index of the prompt in the call.
        step: index of the answer token being chosen, from 0.
        token: id of the first candidate whose reward is NaN.
        text: that token as text, empty if it is unknown.
        finished: rows (`GeneratedRow`) that had finished before, in the order in which they finished.
    """

    def __init__(self, row: int, step: int, token: int, text: str = "", finished: list[Any] | None = None):
        shown = f" ({text!r})" if text else ""
        super().__init__(
            f"the reward of prompt {row}, step {step}, candidate token {token}{shown} is NaN or +inf: "
            "check the reward model's weights and dtype (float16 overflows: try bfloat16 or float32)"
        )
        self.row, self.step, self.token, self.text = row, step, token, text
        self.finished: list[Any] = finished if finished is not None else []

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its `args`, which hold the message alone.
        return type(self), (self.row, self.step, self.token, self.text, self.finished)


def shown(value: object, limit: int = 80) -> str:
    """A value for a message: its repr in one line of at most `limit` characters, else the name of its class."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of any object
        text = ""
    if isinstance(value, (str, bytes)) and len(text) > limit:
        return f"{text[: limit - 3]}..."
    if not text or "\n" in text or len(text) > limit:
        return f"an object of class {type(value).__name__}"
    return text


def one_line(error: BaseException, limit: int | None = 160) -> str:
    """Another library's error for a message: its text in one line, cut at `limit` characters, else its class."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
