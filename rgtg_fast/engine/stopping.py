"""Where an answer ends: end-of-sequence, a stop string, or its length; and the text that it shows until then."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence

from rgtg_fast.engine.batch import Row
from rgtg_fast.errors import RewardNaNError, RGTGError, shown
from rgtg_fast.models.language_model import LanguageModel


class StoppingCriteria:
    """Ends the answers of a call.

    Args:
        lm: the base model.
        max_new_tokens: tokens of an answer, end-of-sequence included.
        stops: strings that end an answer.
    """

    def __init__(self, lm: LanguageModel, max_new_tokens: int, stops: list[str]):
        self.lm, self.max_new_tokens, self.stops = lm, max_new_tokens, stops
        self.eos_ids = lm.eos_ids

    def reason(self, answer: Sequence[int]) -> str | None:
        """Why an answer ends with its last token, None where it continues."""
        if answer[-1] in self.eos_ids:
            return "eos"
        if before_stop(self.lm, answer, self.stops) is not None:
            return "stop"
        return "length" if len(answer) >= self.max_new_tokens else None

    def check(self, row: Row, tokens: Sequence[int], rewards: Sequence[float]) -> None:
        """Refuses rewards of a row's next tokens that cannot be compared.

        Raises:
            RewardNaNError: naming the first that is NaN or +inf.
        """
        for i, reward in enumerate(rewards):
            if not reward < math.inf:
                text = self.lm.token_text(tokens[i])
                raise RewardNaNError(row.prompt.index, len(row.answer) + i, tokens[i], text)

    def finish(self, row: Row, reason: str | None) -> None:
        """Records why a row has ended, where it has, and its text."""
        if reason is None:
            return
        row.finish_reason = reason
        before = before_stop(self.lm, row.answer, self.stops) if reason == "stop" else None
        row.text = self.lm.text(row.answer) if before is None else before


def as_stops(stop: str | Sequence[str] | None) -> list[str]:
    """Stop strings as a list.

    Raises:
        RGTGError: an empty one, or one that is not a string.
    """
    given = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(given, Iterable):
        raise RGTGError(f"stop={shown(stop)} is not a valid stop string: pass a string or a list of strings")
    stops = list(given)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RGTGError(f"stop={shown(text)} is not a valid stop string: pass non-empty strings")
    return stops


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the earliest stop string begins in the text, -1 if there is none."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=-1)


def before_stop(lm: LanguageModel, answer: Sequence[int], stops: Sequence[str]) -> str | None:
    """An answer's text before its earliest stop string, None where it has none.

    Stop strings are looked for in the text with its special tokens, which a stop string may name, hold or be.
    """
    if not stops:
        return None
    full = lm.text(answer, special=True)
    at = find_stop(full, stops)
    return None if at < 0 else _before(lm, answer, full, at)


def shown_text(lm: LanguageModel, answer: Sequence[int], stops: Sequence[str]) -> str:
    """The part of a growing text that can be shown: without an unfinished character or the beginning of a stop string
    at its end."""
    text = lm.text(answer).rstrip("\N{REPLACEMENT CHARACTER}")
    if not stops:
        return text
    full = lm.text(answer, special=True)
    return min(text, _before(lm, answer, full, _settled(full, stops)), key=len)


def _settled(text: str, stops: Sequence[str]) -> int:
    """Characters of a text that no stop string can contain which begins in it and ends in what follows."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    sizes = [len(text)]
    for stop in stops:
        begun = (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size]))
        sizes.append(len(text) - next(begun, 0))
    return min(sizes)


def _before(lm: LanguageModel, answer: Sequence[int], full: str, at: int) -> str:
    """The text that an answer shows before character `at` of its text with special tokens, `full`."""
    if lm.text(answer) == full:
        return full[:at]

    # Tokens that end before the character, then what the next one shows of it: nothing where it is special.
    def reach(count: int) -> int:
        return len(lm.text(answer[:count], special=True))

    whole = bisect.bisect_right(range(1, len(answer) + 1), at, key=reach)
    shown, cut = lm.text(answer[:whole]), lm.text(answer[: whole + 1])
    return shown if cut == shown else cut[: len(cut) - (reach(whole + 1) - at)]
