"""Where an answer ends: end-of-sequence, a stop string, or its length; and that its rewards are numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rgtg_fast.engine.batch import Row
from rgtg_fast.engine.text import before_stop
from rgtg_fast.errors import RewardNaNError
from rgtg_fast.models.language_model import LanguageModel


@dataclass
class StoppingCriteria:
    """What ends the answers of a call."""

    lm: LanguageModel
    max_new_tokens: int
    stops: list[str]

    def reason(self, answer: Sequence[int]) -> str | None:
        """Why an answer ends with its last token, None where it goes on."""
        if answer[-1] in self.lm.eos_ids:
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
        """Writes down why a row ended, and its text, where it did."""
        if reason is None:
            return
        row.finish_reason = reason
        before = before_stop(self.lm, row.answer, self.stops) if reason == "stop" else None
        row.text = self.lm.text(row.answer) if before is None else before
