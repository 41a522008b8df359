"""The part of a reward model's adapter in the forward of the base model that it shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rgtg_fast.models.runner import ModelRunner


@dataclass(frozen=True)
class Attached:
    """An adapter's part in the base model's forward.

    Attributes:
        runner: the base model.
        branch: which rows are the adapter's, 0 where they are the base model's own.
    """

    runner: ModelRunner
    branch: int

    def encoded(self, row: int) -> int:
        """Prompt tokens that a row's own context cost when it was admitted."""
        return self.runner.encoded(row * self.runner.prompt_contexts)

    def newest(self) -> torch.Tensor:
        """States [B, E] of each row's newest token under the adapter, for the step that has begun."""
        return self.runner.newest(self.branch)

    def candidates(self) -> torch.Tensor:
        """States [B, K, E] after each candidate of this step under the adapter."""
        return self.runner.candidates(self.branch)

    def hidden_uncached(self, ids: Sequence[int]) -> torch.Tensor:
        """States [T, E] of a whole text under the adapter."""
        return self.runner.hidden_uncached(ids, self.branch)
