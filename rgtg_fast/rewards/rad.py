"""A clamped reward: RAD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rgtg_fast.models.loading import ModelAndTokenizer
from rgtg_fast.rewards.base import Prefix
from rgtg_fast.rewards.sequence import SequenceReward


class RADReward(SequenceReward):
    """g(v) = clamp(r(x, y_<i ∘ v), 0, 1), or 1 − that where the model scores what is unwanted.

    RAD (arXiv 2310.09520): a unidirectional reward model trained to give every prefix the final reward, and the top k
    as support. Costs what a `SequenceReward` costs.

    Args:
        model: as in `SequenceReward`.
        invert: rewards texts with a low score (of toxicity, for instance): 1 − clamp(r, 0, 1).
        settings: further arguments of `SequenceReward`.

    Example:
        >>> RADReward("path-or-hub-id", invert=True).invert
        True
    """

    def __init__(self, model: Any | ModelAndTokenizer, *, invert: bool = False, **settings: Any):
        super().__init__(model, **settings)
        self.invert = invert

    @property
    def name(self) -> str:
        return super().name.replace("SequenceReward", "RADReward", 1)

    @property
    def fused(self) -> bool:
        return False  # the reward is clamped before the draw

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        return self._clamped(super().score(candidates))

    def append(self, slot: int, tokens: Sequence[int]) -> list[float]:
        return self._clamped(torch.tensor(super().append(slot, tokens), dtype=torch.float64)).tolist()

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        return self._clamped(torch.tensor(super().score_answer(prefix, answer), dtype=torch.float64)).tolist()

    def _clamped(self, rewards: torch.Tensor) -> torch.Tensor:
        clamped = rewards.clamp(0, 1)
        return 1 - clamped if self.invert else clamped
