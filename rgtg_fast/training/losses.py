"""The objectives of reward models, each a loss of the rewards of a packed batch's answer tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rgtg_fast.errors import RGTGError
from rgtg_fast.ops.partial_bt_loss import WEIGHTS, partial_bt_loss, partial_bt_terms
from rgtg_fast.training.config import current_mode
from rgtg_fast.training.data import TokenizedPair

OBJECTIVES = ("partial_bt", "full_bt", "cd_fudge", "rad", "farma", "genarm")
MODES = ("eos", "repeat_last", "truncate")


@dataclass(frozen=True)
class Objective:
    """What a reward model learns from preference pairs.

    - `partial_bt` (PARGS, arXiv 2406.07780): −log σ(r(x, y^w_{1:i}) − r(x, y^l_{1:i})) for every prefix length i.
    - `full_bt` (ARGS, 2402.01694, and judges): the same for whole answers only, read at the end token of an answer that
      ended and at the last text token of one that was cut.
    - `cd_fudge` (2310.17022): ½ (r(x, y_{1:t}) − R)² for every prefix, R the reward of the whole answer.
    - `rad` (2310.09520): Σ_t t (r(x, y_{1:t}) − R)² / (n(n+1)/2) for every answer.
    - `farma` (2502.04517), with V(y_{1:i}) = head(h(x, y_<i))[y_i]: two kinds of passes over the data alternate. The
      first trains full_bt on V of the whole answers; the second, the constraint, (V(y_{1:i}) − max_v V(y_{1:i} ∘ v))²
      for every prefix but the whole answer.
    - `genarm` (2410.08193): −log σ(β_r (log π_r(y^w | x) − log π_r(y^l | x))).

    Attributes:
        name: one of `OBJECTIVES`.
        mode: what partial_bt does past the end of the shorter answer: `eos`, `repeat_last` or `truncate`.
        weight: `prefix` gives every term the same weight, `pair` every pair (partial_bt, cd_fudge, farma's constraint).
        beta_r: β_r of genarm.
        stop_gradient: treat farma's maximum as a target without gradient; the published constraint trains both sides.
    """

    name: str = "partial_bt"
    mode: str = "repeat_last"
    weight: str = "prefix"
    beta_r: float = 0.05
    stop_gradient: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", current_mode(self.mode, stacklevel=5))
        for what, value, known in (
            ("objective", self.name, OBJECTIVES),
            ("mode", self.mode, MODES),
            ("weight", self.weight, WEIGHTS),
        ):
            if value not in known:
                raise RGTGError(f"{what}={value!r} is unknown: use one of {', '.join(known)}")
        if not (self.beta_r > 0 and math.isfinite(self.beta_r)):
            raise RGTGError(f"beta_r={self.beta_r} is not above 0: use for example 0.05")

    @property
    def eos_padding(self) -> bool:
        """Whether the shorter answer of a pair is padded with EOS tokens to the longer one's length."""
        return self.name == "partial_bt" and self.mode == "eos"

    @property
    def regression(self) -> bool:
        """Whether rewards are regressed onto targets."""
        return self.name in ("cd_fudge", "rad")

    @property
    def by_token(self) -> bool:
        """Whether the rewards come from a language model's vocabulary head."""
        return self.name in ("farma", "genarm")

    @property
    def additive(self) -> bool:
        """Whether rewards are per token, and a prefix's reward is their sum."""
        return self.name == "genarm"

    @property
    def passes(self) -> int:
        """Passes over the data per epoch: farma alternates two kinds."""
        return 2 if self.name == "farma" else 1

    def check_ends(self, pairs: Sequence[TokenizedPair], head_fit: bool = False) -> None:
        """Checks that answers which were cut, and have no end token, do not need one for this objective.

        Args:
            pairs: the pairs to train or to evaluate on.
            head_fit: whether the head is fitted first (see `head_fit`).

        Raises:
            RGTGError: naming the first pair that lacks an end token.
        """
        for pair in pairs:
            if all(pair.ended):
                continue
            if head_fit and self.name == "farma":
                raise RGTGError(
                    f"farma's head_fit fits the row of the end token, and an answer of row {pair.index} was cut: leave "
                    "out head_fit"
                )
            lengths = len(pair.chosen_ids), len(pair.rejected_ids)
            if self.eos_padding and lengths[0] != lengths[1] and not pair.ended[lengths.index(min(lengths))]:
                raise RGTGError(
                    f"mode='eos' appends end tokens to the shorter answer, and that of row {pair.index} was cut: use "
                    "mode='repeat_last' or mode='truncate'"
                )

    def check_head_fit(self, strength: float) -> None:
        """Checks that the head can be fitted before training (see `head_fit`).

        Raises:
            RGTGError: a strength that is not above 0, or an objective that is not a Bradley-Terry loss.
        """
        if not 0 < strength < math.inf:
            raise RGTGError(f"head_fit={strength} is not above 0: use for example 0.3, or leave it out")
        if self.regression or self.additive:
            raise RGTGError(
                f"head_fit fits a head by a Bradley-Terry loss and the objective is {self.name}: leave it out"
            )

    def terms(self, offsets: torch.Tensor, constraint: bool = False) -> float:
        """The number that the loss of a batch is divided by: its terms, pairs or answers.

        Args:
            offsets: [2N + 1] int64, where the answers begin among the rewards, and M.
            constraint: whether the loss is farma's constraint.
        """
        pairs = offsets.shape[0] // 2
        if constraint:
            return float(offsets[-1] - 2 * pairs) if self.weight == "prefix" else float(2 * pairs)
        if self.name == "partial_bt":
            return partial_bt_terms(offsets, self.mode, self.weight)
        if self.name in ("full_bt", "farma", "genarm"):
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
        best: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch's pairs, divided by the terms of the whole optimizer step.

        Args:
            rewards: [M] floating, of all answer tokens: chosen_0, rejected_0, chosen_1, … For genarm they are rewards
                of tokens, otherwise of the prefixes that end there.
            offsets: [2N + 1] int64, where the answers begin, and M.
            normalizer: scalar, the sum of `terms` over the optimizer step; None for this batch's own.
            targets: [2N], the rewards of the whole answers (cd_fudge, rad); None for 1 (chosen) and 0 (rejected).
            best: [M], the largest reward of any token at the same position; selects farma's constraint as the loss.

        Returns:
            Scalar in at least float32.
        """
        if normalizer is None:
            normalizer = torch.tensor(self.terms(offsets, best is not None), device=rewards.device)
        if self.name == "partial_bt":
            return partial_bt_loss(rewards, offsets, self.mode, self.weight, normalizer)
        if rewards.dtype != torch.float64:
            rewards = rewards.float()
        lengths = offsets.diff()
        if best is not None:
            return self._constraint(rewards, lengths, best.to(rewards)).sum() / normalizer
        if self.name in ("full_bt", "farma", "genarm"):
            if self.additive:
                whole = self.beta_r * torch.segment_reduce(rewards, "sum", lengths=lengths)
            else:
                whole = rewards[offsets[1:] - 1]
            return -F.logsigmoid(whole[::2] - whole[1::2]).sum() / normalizer
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

    def _constraint(self, rewards: torch.Tensor, lengths: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """Farma's constraint [M − 2N]: each prefix's reward against the best reward of one more token."""
        ends = lengths.cumsum(0)
        last = torch.zeros(len(rewards), dtype=torch.bool, device=rewards.device)
        last[ends - 1] = True
        first = last.roll(1)
        target = best[~first].detach() if self.stop_gradient else best[~first]
        errors = (rewards[~last] - target).square()
        if self.weight == "prefix":
            return errors
        # An answer of one token has no term, but counts in the number of answers.
        shares = 1 / (lengths - 1).clamp_min(1).to(rewards)
        return errors * shares.repeat_interleave(lengths - 1)
