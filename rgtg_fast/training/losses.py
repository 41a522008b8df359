"""The objectives that a reward model can be trained with, each on the rewards of a packed batch's answer tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rgtg_fast.errors import RGTGError
from rgtg_fast.ops.partial_bt_loss import WEIGHTS, partial_bt_loss, partial_bt_terms
from rgtg_fast.training.data import TokenizedPair

OBJECTIVES = ("partial_bt", "full_bt", "cd_fudge", "rad", "farma", "genarm")
MODES = ("eos", "hold", "truncate")
# What the op calls these modes.
_OP_MODES = {"eos": "eos", "hold": "repeat_last", "truncate": "truncate"}


@dataclass(frozen=True)
class Objective:
    """What a reward model learns from preference pairs.

    - `partial_bt` (PARGS, arXiv 2406.07780): −log σ(r(x, y^w_{1:i}) − r(x, y^l_{1:i})) for every prefix length i.
    - `full_bt` (ARGS, 2402.01694, and judges): the same for the whole answers alone, read at the end token of an answer
      that ended and at the last text token of one that was cut.
    - `cd_fudge` (2310.17022): ½ (r(x, y_{1:t}) − R)² for every prefix, R the reward of the whole answer.
    - `rad` (2310.09520): Σ_t t (r(x, y_{1:t}) − R)² / (n(n+1)/2) for every answer.
    - `farma` (2502.04517), with V(y_{1:i}) = head(h(x, y_<i))[y_i]: two passes over the data take turns. The first is
      full_bt on V of the whole answers; the second, the constraint, is (V(y_{1:i}) − max_v V(y_{1:i} ∘ v))² for every
      prefix but the whole answer.
    - `genarm` (2410.08193): −log σ(β_r (log π_r(y^w | x) − log π_r(y^l | x))).

    Attributes:
        name: one of `OBJECTIVES`.
        mode: what partial_bt does past the end of the shorter answer: `eos`, `hold` or `truncate`.
        weight: `prefix` (every term counts the same; partial_bt, cd_fudge, farma's constraint) or `pair` (every pair
            does).
        beta_r: β_r of genarm.
        stop_gradient: farma's maximum is a target and gets no gradient; the published constraint moves both sides.
    """

    name: str = "partial_bt"
    mode: str = "hold"
    weight: str = "prefix"
    beta_r: float = 0.05
    stop_gradient: bool = False

    def __post_init__(self) -> None:
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
        """Whether the model is a language model whose vocabulary-sized head gives the rewards."""
        return self.name in ("farma", "genarm")

    @property
    def additive(self) -> bool:
        """Whether rewards are those of tokens, and a prefix's reward is their sum."""
        return self.name == "genarm"

    @property
    def passes(self) -> int:
        """Passes over the data that belong together: two of farma's make a round, the second is the constraint."""
        return 2 if self.name == "farma" else 1

    def check_ends(self, pairs: Sequence[TokenizedPair], head_fit: bool = False) -> None:
        """Refuses what an objective would have to learn from end tokens that answers which were cut do not have.

        Args:
            head_fit: the head is fitted first (see `probe`).

        Raises:
            RGTGError: naming the first such pair.
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
                    f"mode='eos' puts end tokens behind the shorter answer, and that of row {pair.index} was cut: use "
                    "mode='hold' or mode='truncate'"
                )

    def terms(self, offsets: torch.Tensor, constraint: bool = False) -> float:
        """What the loss of a batch is divided by: its terms, pairs or answers.

        Args:
            offsets: `[2N + 1]` int64, where the answers begin among the rewards, and M.
            constraint: of farma's second pass.
        """
        pairs = offsets.shape[0] // 2
        if constraint:
            return float(offsets[-1] - 2 * pairs) if self.weight == "prefix" else float(2 * pairs)
        if self.name == "partial_bt":
            return partial_bt_terms(offsets, _OP_MODES[self.mode], self.weight)
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
        """The loss of a batch's pairs, divided by the terms of the batch that the optimizer step sees.

        Args:
            rewards: `[M]` floating, of all answer tokens: chosen_0, rejected_0, chosen_1, … Those of genarm are the
                tokens' own, all others are of the prefix that ends there.
            offsets: `[2N + 1]` int64, where the answers begin, and M.
            normalizer: scalar, the sum of `terms` over the whole batch; None for this part's own.
            targets: `[2N]`, the rewards of the whole answers (cd_fudge, rad); by default 1 for the chosen answer and
                0 for the rejected one.
            best: `[M]`, the largest reward that any token in this one's place would have; makes the loss that of
                farma's constraint.

        Returns:
            The loss, a scalar in at least float32.
        """
        if normalizer is None:
            normalizer = torch.tensor(self.terms(offsets, best is not None), device=rewards.device)
        if self.name == "partial_bt":
            return partial_bt_loss(rewards, offsets, _OP_MODES[self.mode], self.weight, normalizer)
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
        """Farma's second loss of every prefix [M − 2N]: its reward against the best that one more token can have."""
        ends = lengths.cumsum(0)
        last = torch.zeros(len(rewards), dtype=torch.bool, device=rewards.device)
        last[ends - 1] = True
        first = last.roll(1)
        target = best[~first].detach() if self.stop_gradient else best[~first]
        errors = (rewards[~last] - target).square()
        if self.weight == "prefix":
            return errors
        # An answer of one token has no term; it counts as an answer nonetheless.
        shares = 1 / (lengths - 1).clamp_min(1).to(rewards)
        return errors * shares.repeat_interleave(lengths - 1)
