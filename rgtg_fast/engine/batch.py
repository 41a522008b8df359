"""The rows that are decoded, in slots 0..n-1, and their state on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields

import torch

from rgtg_fast.config import Guidance
from rgtg_fast.engine.outputs import GeneratedRow, Step
from rgtg_fast.models.device import to_device
from rgtg_fast.rewards.base import Prefix, Reward


@dataclass
class Row(Prefix):
    """A prompt and its unfinished answer.

    Attributes:
        guidance: guidance of the request.
        seed: seed of the request.
        encoded: the prompt's ids in the reward's contexts.
        logprobs: logprobs of the decisions so far, under the base model.
        rewards: rewards of the decisions so far; one more than answer tokens where end-of-sequence was decided.
        guided_logprob: summed over the decisions so far, where they are drawn token by token.
        trace: a step for each decision.
        text: text of the finished answer.
        finish_reason: None until the row ends.
        last_token: the newest decision, end-of-sequence included.
        unscored: answer tokens that a gated reward has not scored yet.
    """

    guidance: Guidance = field(default_factory=Guidance)
    seed: int = 0
    encoded: list[list[int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    guided_logprob: float | None = None
    trace: list[Step] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    last_token: int = -1
    unscored: list[int] = field(default_factory=list)

    def finished(self, reward: Reward, traced: bool) -> GeneratedRow:
        """The row as the user gets it."""
        assert self.finish_reason is not None
        count = len(self.answer)
        answer_reward = reward.answer_reward(self.rewards) if reward.gives_rewards else math.nan
        return GeneratedRow(
            index=self.prompt.index,
            prompt=self.prompt.given,
            tokens=self.answer,
            text=self.text,
            finish_reason=self.finish_reason,
            reward=None if math.isnan(answer_reward) else answer_reward,
            logprobs=self.logprobs[:count],
            rewards=self.rewards[:count],
            trace=self.trace if traced else None,
            end_token=self.last_token if self.finish_reason == "eos" else None,
            base_logprob=sum(self.logprobs),
            guided_logprob=self.guided_logprob,
        )


@dataclass(frozen=True)
class SlotState:
    """The state of each slot that a step reads and changes, on the device at fixed addresses.

    Attributes:
        tokens: [slots] int64, the newest token, not yet in the base model's cache; -1 where there is no row or it has
            ended.
        position: [slots] int64, index of the answer token that the next step decides.
        limit: [slots] int64, answer tokens that end a row.
        seed: [slots] int64.
        k: [slots] int64, number of candidates.
        beta: [slots] float32.
        temperature: [slots] float32.
        selection_beta: [slots] float32, β in the selection of candidates; 0 unless the support is "combined".
    """

    tokens: torch.Tensor
    position: torch.Tensor
    limit: torch.Tensor
    seed: torch.Tensor
    k: torch.Tensor
    beta: torch.Tensor
    temperature: torch.Tensor
    selection_beta: torch.Tensor

    @classmethod
    def empty(cls, slots: int, device: torch.device) -> SlotState:
        """No row in any slot."""
        whole = [torch.full((slots,), -1, dtype=torch.int64, device=device) for _ in range(5)]
        return cls(*whole, *(torch.zeros(slots, dtype=torch.float32, device=device) for _ in range(3)))

    def tensors(self) -> list[torch.Tensor]:
        """All tensors."""
        return [getattr(self, field.name) for field in fields(self)]

    def first(self, rows: int) -> SlotState:
        """A view of slots 0..rows-1."""
        return SlotState(*(x[:rows] for x in self.tensors()))

    def put(self, slot: int, row: Row, limit: int) -> None:
        """A row enters a slot, before its first step."""
        g = row.guidance
        selected = g.beta if g.support == "combined" else 0.0
        # Not used with support="all", where it may exceed 64 bits.
        k = 0 if g.support == "all" else g.k
        values = (row.prompt_ids[-1], 0, limit, row.seed, k, g.beta, g.temperature, selected)
        for x, value in zip(self.tensors(), values, strict=True):
            x[slot].fill_(value)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`; it leaves the batch where both are the same."""
        if source != target:
            for x in self.tensors():
                x[target] = x[source]
        self.tokens[source].fill_(-1)


class Batch:
    """The active rows, with their settings as a step needs them, which are computed whenever the rows change.

    Attributes:
        rows: the row of each slot.
        width: rows of a step, those without a row included.
        now: the first `width` slots on the device.
        k: k of the row with most candidates.
        support: "all"; "combined" where any row has that; else "lm".
        ragged: whether rows differ in k.
        gated: whether any row has a gate.
        guided: for each row, whether this step uses its reward; all True without a gate.
        gated_mask: [n, 1] bool, rows whose gate keeps the reward out of this step, None without a gate.
    """

    def __init__(self, state: SlotState, bucket: Callable[[int], int]):
        self.rows: list[Row] = []
        self._state, self._bucket = state, bucket
        state.tokens.fill_(-1)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Row, limit: int) -> int:
        """Puts a row into the next slot, which is returned; it ends after `limit` tokens."""
        slot = len(self.rows)
        self.rows.append(row)
        self._state.put(slot, row, limit)
        return slot

    def remove(self, slot: int) -> int:
        """Frees a slot; the last row moves there. Returns the slot that row came from (the same: nothing moved)."""
        last = self.rows.pop()
        source = len(self.rows)
        if slot != source:
            self.rows[slot] = last
        self._state.move(source, slot)
        return source

    def refresh(self) -> None:
        """Updates the settings after the rows have changed."""
        settings = [row.guidance for row in self.rows]
        self.width = self._bucket(len(settings))
        self.now = self._state.first(self.width)
        self._gates = [g.gate_entropy or 0.0 for g in settings]
        self.gated = any(self._gates)
        self.guided = [True] * len(settings)
        self.gated_mask: torch.Tensor | None = None
        # Rows of "lm" and "combined" share a step: the former are selected with a β of 0.
        supports = {g.support for g in settings}
        self.support = next(support for support in ("all", "combined", "lm") if support in supports)
        widths = [g.k for g in settings]
        self.k, self.ragged = max(widths), min(widths) != max(widths)

    @property
    def shape(self) -> Hashable:
        """What a captured step depends on besides the contents of its tensors."""
        return self.width, self.k, self.support, self.ragged

    @property
    def widths(self) -> torch.Tensor | None:
        """[width] int64, number of candidates of each row; None where all have the same."""
        return self.now.k if self.ragged and self.support != "all" else None

    @property
    def padding_mask(self) -> torch.Tensor:
        """[width, k] bool, candidates that a row with a smaller k does not have."""
        return torch.arange(self.k, device=self.now.k.device) >= self.now.k.unsqueeze(-1)

    def mask_padding(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [width, k] with -inf for candidates that a row does not have."""
        return logprobs.masked_fill(self.padding_mask, -torch.inf) if self.ragged else logprobs

    @property
    def beta(self) -> torch.Tensor:
        """[width] float32, 0 where a gate keeps the reward out of this step."""
        return (
            self.now.beta
            if self.gated_mask is None
            else self.now.beta.masked_fill(self.gated_mask.squeeze(-1), 0)
        )

    @property
    def sampling(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """β, temperature, seed and position [width], the last arguments of `resample`."""
        return self.beta, self.now.temperature, self.now.seed, self.now.position

    def apply_gates(self, entropy: torch.Tensor) -> None:
        """Decides from the base distribution's entropy [n], which the host reads, which rows this step guides."""
        pairs = zip(entropy.tolist(), self._gates, strict=True)
        self.guided = [value >= gate for value, gate in pairs]
        self.gated_mask = ~to_device(self.guided, torch.bool, entropy.device).unsqueeze(-1)
