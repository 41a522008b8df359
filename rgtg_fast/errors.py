"""The errors a user can cause: one line each, naming the value, the limit and the way out."""

from __future__ import annotations

from typing import Any


class RGTGError(ValueError):
    """Raised for every input that cannot work; its message is one line that says what would."""

    def __init__(self, message: str = ""):
        # What a message quotes, such as another library's error, may have lines of its own.
        super().__init__(" ".join(message.split("\n")) if "\n" in message else message)


class MemoryTooSmallError(RGTGError):
    """Raised before anything is allocated: the prefix caches of a call would not fit the device's memory."""


class RewardNaNError(RGTGError):
    """A reward is NaN (or +inf) in the middle of a run.

    Attributes:
        row: index of the prompt in the call.
        step: index of the answer token being chosen, from 0.
        token: id of the first candidate whose reward is NaN.
        finished: the rows (`GeneratedRow`) that had finished before, in the order they finished.
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
        # Another process gets the error by its arguments, not by its message.
        return type(self), (self.row, self.step, self.token, self.text, self.finished)


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it: its repr in one line of at most `most` characters, or what it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of any object
        text = ""
    if isinstance(value, (str, bytes)) and len(text) > most:
        return f"{text[: most - 3]}..."
    if not text or "\n" in text or len(text) > most:
        return f"an object of class {type(value).__name__}"
    return text
