"""Counts of the rows of preference data: kept, dropped by reason, and where the kept answers end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rgtg_fast.training.data.chats import UnusableError


@dataclass
class DataReport:
    """Counts of rows read and pairs kept, and why the others were dropped.

    `earlier + later` is the report of two stages after one another (loading, then tokenizing).

    Attributes:
        read: rows of the input.
        kept: pairs of the output.
        malformed: rows without the fields of their layout.
        different_prompts: dialogues that differ before the last answer, or from the row's own prompt.
        empty: a prompt or an answer without text.
        identical: both answers the same.
        duplicates: the same prompt and answers as an earlier row.
        short: an answer below the least number of tokens.
        too_long: pairs over the length limit.
        end_inside: an end-of-sequence token inside an answer, where decoding would have stopped.
        refused: prompts that the chat template refuses.
        truncated: kept pairs whose prompt's beginning was cut off.
        end_texts: answers of kept pairs from whose end the text of an end token was removed.
        prompts_removed: kept pairs from whose answers the prompt was removed.
        prompts_repeated: kept pairs whose answers begin with the prompt, which stays, since in most rows they do not.
        lower_score: kept pairs whose chosen answer has the lower score in the data.
        cut: answers of kept pairs that did not end and have no end token; known after tokenizing.
        unstated: answers of kept pairs for which the data do not say whether they ended, which counts as ended; known
            after tokenizing.
        first_malformed, first_refused: the first such row and what is wrong with it.
        unread: columns of the first row that are not used.
    """

    read: int = 0
    kept: int = 0
    malformed: int = 0
    different_prompts: int = 0
    empty: int = 0
    identical: int = 0
    duplicates: int = 0
    short: int = 0
    too_long: int = 0
    end_inside: int = 0
    refused: int = 0
    truncated: int = 0
    end_texts: int = 0
    prompts_removed: int = 0
    prompts_repeated: int = 0
    lower_score: int = 0
    cut: int = 0
    unstated: int = field(default=0, compare=False)
    first_malformed: str = field(default="", compare=False)
    first_refused: str = field(default="", compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def dropped(self) -> int:
        """Number of dropped rows or pairs."""
        return sum(getattr(self, name) for name in _DROPS)

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter."""
        setattr(self, name, getattr(self, name) + by)

    def drop(self, reason: UnusableError, row: int) -> None:
        """Counts a row that gives no pair."""
        self.count(reason.reason)
        first = f"first_{reason.reason}"
        if getattr(self, first, None) == "":
            setattr(self, first, f"row {row}: {reason}")

    def __add__(self, later: DataReport) -> DataReport:
        counts = {name: getattr(self, name) + getattr(later, name) for name in (*_DROPS, *_NOTES)}
        return DataReport(
            read=self.read,
            kept=later.kept,
            **counts,
            cut=later.cut,
            unstated=later.unstated,
            first_malformed=self.first_malformed or later.first_malformed,
            first_refused=self.first_refused or later.first_refused,
            unread=self.unread,
        )

    def as_dict(self) -> dict[str, Any]:
        """The counts by name."""
        values = asdict(self) | {"unread": list(self.unread)}
        for name in ("first_malformed", "first_refused", "unread"):
            if not values[name]:
                del values[name]
        return values

    def lines(self) -> list[str]:
        """The counts as text, without zeros."""
        lines = [f"{self.kept} of {self.read} pairs kept"]
        for name in _DROPS:
            count = getattr(self, name)
            if count:
                first = getattr(self, f"first_{name}", "")
                lines.append(f"{count} dropped: {_REASONS[name]}{f' (first: {first})' if first else ''}")
        if self.unread:
            lines.append(f"columns that are not read: {', '.join(map(repr, self.unread))}")
        lines += [f"{getattr(self, name)} {text}" for name, text in _NOTES.items() if getattr(self, name)]
        return lines

    def end_line(self) -> str:
        """At which token whole answers are read, in words; known after tokenizing."""
        return ends_text(2 * self.kept - self.cut, self.cut, self.unstated)


def ends_text(ended: int, cut: int, unstated: int = 0) -> str:
    """At which token whole answers are read, in words.

    Args:
        ended: number of answers that ended.
        cut: number of answers that were cut off.
        unstated: number of those that ended for which the data do not say so.
    """
    said = "" if not unstated else f" ({unstated} of them without a finish_reason, taken to have ended)"
    if not cut:
        return f"whole answers are read at the end token, which follows all {ended}{said}"
    if not ended:
        return f"whole answers are read at their last text token: all {cut} were cut"
    return (
        f"whole answers are read at the end token of {ended} that ended{said} and at the last text token of {cut} that "
        "were cut"
    )


_REASONS = {
    "malformed": "not in the layout",
    "different_prompts": "the dialogues differ before the last answer, or from the prompt",
    "empty": "empty prompt or answer",
    "identical": "identical answers",
    "duplicates": "seen before",
    "short": "answer too short",
    "too_long": "too long",
    "end_inside": "an end token inside an answer",
    "refused": "the chat template refuses the prompt",
}
_NOTES = {
    "end_texts": "answers ended with the text of an end token, which was taken off",
    "prompts_removed": "kept with answers that began with the prompt, which was taken off",
    "prompts_repeated": "kept with answers that begin with the prompt",
    "lower_score": "kept with a chosen answer of the lower score",
    "truncated": "kept with the beginning of their prompt cut off",
}
_DROPS = tuple(_REASONS)
assert {*_DROPS, *_NOTES} <= {f.name for f in fields(DataReport)}
