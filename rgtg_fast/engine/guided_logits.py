"""The base model's logits and rewards of candidates, as the logits that the next token is sampled from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rgtg_fast.config import Guidance
from rgtg_fast.models.device import to_device
from rgtg_fast.ops import topk_logprobs


class GuidedLogits:
    """The tokens of each row that may be chosen, and what decides between them.

    Args:
        logits: [B, V] of the base model.
        settings: one per row.

    Attributes:
        candidates: [B, K] int64.
        rewards: [B, K] of the candidates, 0 where a gate is closed.
    """

    def __init__(self, logits: torch.Tensor, settings: Sequence[Guidance]):
        self._logits, self._settings = logits, settings
        self.candidates = self.rewards = self._logprobs = torch.empty(0)
        self._beta = self._column([g.beta for g in settings], torch.float32)

    def _column(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return to_device(list(values), dtype, self._logits.device).unsqueeze(1)

    def _mask_padding(self, widths: Sequence[int]) -> None:
        """Rows with fewer candidates than the batch has do not have the rest."""
        if min(widths) < max(widths):
            padding = torch.arange(max(widths), device=self._logits.device) >= self._column(
                widths, torch.int64
            )
            self._logprobs = self._logprobs.masked_fill(padding, -torch.inf)

    def select(self) -> list[int]:
        """Selects the k most probable tokens; returns the rows whose gates let the reward in."""
        widths = [g.k for g in self._settings]
        self._logprobs, self.candidates, entropy = topk_logprobs(self._logits, max(widths))
        self._mask_padding(widths)
        self.rewards = torch.zeros_like(self._logprobs)
        gates = [g.gate_entropy for g in self._settings]
        if not any(gates):
            return list(range(len(gates)))
        pairs = zip(gates, entropy.tolist(), strict=True)
        return [row for row, (gate, value) in enumerate(pairs) if not gate or value >= gate]

    def select_with(self, rewards: torch.Tensor) -> None:
        """Selects candidates by rewards [B, V] of the whole vocabulary."""
        vocabulary = self._logits.shape[1]
        if any(g.support == "all" for g in self._settings):
            self._select_all(rewards)
            return
        widths = [g.k for g in self._settings]
        combined = any(g.support == "combined" for g in self._settings)
        beta = to_device(
            [g.beta if g.support == "combined" else 0.0 for g in self._settings],
            torch.float32,
            self._logits.device,
        )
        chosen = {"guidance": rewards.float(), "beta": beta} if combined else {}
        self._logprobs, self.candidates, _ = topk_logprobs(
            self._logits, min(max(widths), vocabulary), **chosen
        )
        self._mask_padding(widths)
        self.rewards = rewards.gather(1, self.candidates).to(self._logprobs.dtype)

    def _select_all(self, rewards: torch.Tensor) -> None:
        """The whole vocabulary; for rows with another support, all but their k candidates are masked."""
        wide = torch.promote_types(self._logits.dtype, torch.float32)
        logprobs = self._logits.log_softmax(-1, dtype=wide)
        narrow = [row for row, g in enumerate(self._settings) if g.support != "all"]
        if narrow:
            part = GuidedLogits(self._logits[narrow], [self._settings[row] for row in narrow])
            part.select_with(rewards[narrow])
            masked = torch.full_like(logprobs[narrow], -torch.inf)
            logprobs[narrow] = masked.scatter(1, part.candidates, part._logprobs.to(wide))
        rows, vocabulary = self._logits.shape
        self.candidates = torch.arange(vocabulary, device=self._logits.device).expand(rows, -1)
        self._logprobs, self.rewards = logprobs, rewards.to(wide)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log π + β·r [B, K], -inf for tokens that a row does not have; and where a reward is NaN or +inf."""
        present = self._logprobs != -torch.inf
        scores = torch.where(present, self._logprobs + self._beta * self.rewards, self._logprobs)
        return scores, present & (self.rewards.isnan() | (self.rewards == torch.inf))
