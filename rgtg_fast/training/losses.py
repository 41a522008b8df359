"""The objectives that a reward model can be trained with, each on the rewards of a packed batch's answer tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rgtg_fast.errors import RGTGError
from rgtg_fast.ops.partial_bt_loss import MODES, WEIGHTS, partial_bt_loss, partial_bt_terms

OBJECTIVES = ("partial_bt", "full_bt", "cd_fudge", "rad")


@dataclass(frozen=True)
class Objective:
    """What a reward model learns from preference pairs.

    - `partial_bt` (PARGS, arXiv 2406.07780): −log σ(r(x, y^w_{1:i}) − r(x, y^l_{1:i})) for every prefix length i.
    - `full_bt` (ARGS, 2402.01694, and judges): the same for the whole answers alone.
    - `cd_fudge` (2310.17022): ½ (r(x, y_{1:t}) − R)² for every prefix, R the reward of the whole answer.
    - `rad` (2310.09520): Σ_t t (r(x, y_{1:t}) − R)² / (n(n+1)/2) for every answer.

    Attributes:
        name: one of `OBJECTIVES`.
        mode: what partial_bt does past the end of the shorter answer: `eos`, `hold` or `truncate`.
        weight: `prefix` (every term counts the same; partial_bt and cd_fudge) or `pair` (every pair does).
    """

    name: str = "partial_bt"
    mode: str = "hold"
    weight: str = "prefix"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("objective", self.name, OBJECTIVES),
            ("mode", self.mode, MODES),
            ("weight", self.weight, WEIGHTS),
        ):
            if value not in known:
                raise RGTGError(f"{what}={value!r} is unknown: use one of {', '.join(known)}")

    @property
    def eos_padding(self) -> bool:
        """Whether the shorter answer of a pair is padded with EOS tokens to the longer one's length."""
        return self.name == "partial_bt" and self.mode == "eos"

    @property
    def regression(self) -> bool:
        """Whether rewards are regressed onto targets."""
        return self.name in ("cd_fudge", "rad")

    def terms(self, offsets: torch.Tensor) -> float:
        """What the loss of a batch is divided by: its terms, pairs or answers.

        Args:
            offsets: `[2N + 1]` int64, where the answers begin among the rewards, and M.
        """
        pairs = offsets.shape[0] // 2
        if self.name == "partial_bt":
            return partial_bt_terms(offsets, self.mode, self.weight)
        if self.name == "full_bt":
            return float(pairs)
        if self.name == "cd_fudge" and self.weight == "prefix":
            return float(offsets[-1])
        return float(2 * pairs)

    def loss(
        self,
        rewards: torch.Tensor,
        offsets: torch.Tensor,
        normalizer: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch's pairs, divided by the terms of the batch that the optimizer step sees.

        Args:
            rewards: `[M]` floating, of all answer tokens: chosen_0, rejected_0, chosen_1, …
            offsets: `[2N + 1]` int64, where the answers begin, and M.
            normalizer: scalar, the sum of `terms` over the whole batch; None for this part's own.
            targets: `[2N]`, the rewards of the whole answers (cd_fudge, rad); by default 1 for the chosen answer and
                0 for the rejected one.

        Returns:
            The loss, a scalar in at least float32.
        """
        if normalizer is None:
            normalizer = torch.tensor(self.terms(offsets), device=rewards.device)
        if self.name == "partial_bt":
            return partial_bt_loss(rewards, offsets, self.mode, self.weight, normalizer)
        if rewards.dtype != torch.float64:
            rewards = rewards.float()
        if self.name == "full_bt":
            last = rewards[offsets[1:] - 1]
            return F.softplus(last[1::2] - last[::2]).sum() / normalizer
        lengths = offsets.diff()
        if targets is None:
            targets = torch.tensor([1.0, 0.0], device=rewards.device).repeat(lengths.shape[0] // 2)
        answers = torch.repeat_interleave(lengths)
        error = (rewards - targets.to(rewards)[answers]).square()
        if self.name == "rad":
            place = torch.arange(1, rewards.shape[0] + 1, device=rewards.device) - offsets[answers]
            weights = (2 * place / (lengths * (lengths + 1))[answers]).to(rewards)
        elif self.weight == "prefix":
            weights = torch.full_like(rewards, 0.5)
        else:
            weights = (0.5 / lengths[answers]).to(rewards)
        return (weights * error).sum() / normalizer
