"""The rows being decoded, in slots 0..n-1, and their settings as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rgtg_fast.config import Guidance
from rgtg_fast.decoding.results import GeneratedRow, Step
from rgtg_fast.rewards.base import Prefix


@dataclass
class Row(Prefix):
    """A prompt on its way to an answer."""

    guidance: Guidance = field(default_factory=Guidance)
    seed: int = 0
    encoded: list[list[int]] = field(default_factory=list)  # the prompt's ids in the guide's contexts
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    guided_logprob: float | None = (
        None  # summed over the decisions so far, where they are drawn token by token
    )
    trace: list[Step] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    last_token: int = -1  # the newest decision, end-of-sequence included
    unseen: list[int] = field(default_factory=list)  # answer tokens that a gated guide has not seen yet

    def finished(self, answer_reward: Callable[[list[float]], float] | None, traced: bool) -> GeneratedRow:
        """The row as the user gets it; `rewards` may hold one more entry, the end-of-sequence token's."""
        assert self.finish_reason is not None
        count = len(self.answer)
        return GeneratedRow(
            index=self.prompt.index,
            prompt=self.prompt.given,
            tokens=self.answer,
            text=self.text,
            finish_reason=self.finish_reason,
            reward=self._reward(answer_reward),
            logprobs=self.logprobs[:count],
            rewards=self.rewards[:count],
            trace=self.trace if traced else None,
            end_token=self.last_token if self.finish_reason == "eos" else None,
            base_logprob=sum(self.logprobs),
            guided_logprob=self.guided_logprob,
        )

    def _reward(self, answer_reward: Callable[[list[float]], float] | None) -> float | None:
        if answer_reward is None:
            return None
        reward = answer_reward(self.rewards)
        return None if math.isnan(reward) else reward


class Batch:
    """The active rows. Their settings become tensors once per change of the rows, not once per step.

    Attributes:
        rows: the row of each slot.
        tokens: [n] int64, each row's newest token, not yet in the base model's cache.
        position: [n] int64, index of the answer token that the next step decides.
        beta, temperature: [n]; beta is 0 where a row's gate is closed in this step. seed: [n] int64.
        k: of the widest row. beyond: [n, k] bool, the candidates that a row with a smaller k does not have, None where
            all rows have the same k.
        gated: whether any row has a gate. guided: for each row, whether this step guides it. closed: [n, 1] bool, the
            same as a tensor, turned round.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Row) -> int:
        """Puts a row into the next slot, which is returned."""
        self.rows.append(row)
        return len(self.rows) - 1

    def remove(self, slot: int) -> int:
        """Frees a slot; the last row takes it. Returns the slot that row came from (the same: nothing moved)."""
        last = self.rows.pop()
        source = len(self.rows)
        if slot != source:
            self.rows[slot] = last
        return source

    def refresh(self) -> None:
        """Writes the settings of the rows into tensors."""

        def tensor(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        settings = [row.guidance for row in self.rows]
        self.tokens = tensor([(row.answer or row.prompt_ids)[-1] for row in self.rows], torch.int64)
        self.position = tensor([len(row.answer) for row in self.rows], torch.int64)
        self.seed = tensor([row.seed for row in self.rows], torch.int64)
        self.beta = self._beta = tensor([g.beta for g in settings], torch.float32)
        self._gates = [g.gate_entropy or 0.0 for g in settings]
        self.gated = any(self._gates)
        self.guided = [True] * len(settings)
        self.closed = torch.zeros(len(settings), 1, dtype=torch.bool, device=self.device)
        self.temperature = tensor([g.temperature for g in settings], torch.float32)
        # Only rows whose support is "combined" are selected by their guidance.
        self.selection_beta = tensor(
            [g.beta if g.support == "combined" else 0.0 for g in settings], torch.float32
        )
        self.support = "all" if settings[0].support == "all" else "top-k"
        self.combined = any(g.support == "combined" for g in settings)
        widths = [g.k for g in settings]
        self.k = max(widths)
        self.beyond: torch.Tensor | None = None
        if min(widths) != self.k:
            rank = torch.arange(self.k, device=self.device)
            self.beyond = rank >= tensor(widths, torch.int64).unsqueeze(-1)

    def open_gates(self, entropy: torch.Tensor) -> None:
        """Decides from the base distribution's entropy [n] which rows this step guides."""
        if not self.gated:
            return
        pairs = zip(entropy.tolist(), self._gates, strict=True)
        self.guided = [value >= gate for value, gate in pairs]
        self.closed = ~torch.tensor(self.guided, device=self.device).unsqueeze(-1)
        self.beta = self._beta.masked_fill(self.closed.squeeze(-1), 0)
