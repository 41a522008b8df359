"""The rows being decoded, in slots 0..n-1, and what a step needs of them on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields

import torch

from rgtg_fast.config import Guidance
from rgtg_fast.engine.outputs import GeneratedRow, Step
from rgtg_fast.models.transfer import to_device
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


@dataclass(frozen=True)
class SlotState:
    """What a step reads and changes of each slot, on the device at addresses that stay the same.

    Attributes:
        tokens: [slots] int64, the newest token, not yet in the base model's cache; -1 where no row is or it has ended.
        position: int64, index of the answer token that the next step decides. limit: int64, answer tokens that end a
            row. seed, k: int64, the row's own. beta, temperature, selection_beta: float32.
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
        """All of them."""
        return [getattr(self, field.name) for field in fields(self)]

    def first(self, rows: int) -> SlotState:
        """The same memory, slots 0..rows-1."""
        return SlotState(*(x[:rows] for x in self.tensors()))

    def put(self, slot: int, row: Row, limit: int) -> None:
        """A row enters a slot, before its first step."""
        g = row.guidance
        # Only rows whose support is "combined" are selected by their guidance.
        selected = g.beta if g.support == "combined" else 0.0
        # Without meaning for support="all", where it may be beyond 64 bits.
        k = 0 if g.support == "all" else g.k
        values = (row.prompt_ids[-1], 0, limit, row.seed, k, g.beta, g.temperature, selected)
        for x, value in zip(self.tensors(), values, strict=True):
            x[slot].fill_(value)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` takes slot `target`, or goes where both are the same."""
        if source != target:
            for x in self.tensors():
                x[target] = x[source]
        self.tokens[source].fill_(-1)


class Batch:
    """The active rows. What the host needs to know of their settings is worked out once per change of the rows.

    Attributes:
        rows: the row of each slot.
        now: the first `width` slots on the device. width: rows of a step, those without a row included.
        k: of the widest row. support: "all" or "top-k". combined: whether any row is selected by its guidance. ragged:
            whether rows differ in k.
        gated: whether any row has a gate. guided: for each row, whether this step guides it. closed: [n, 1] bool, the
            same as a tensor, turned round, None without a gate.
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
        """Frees a slot; the last row takes it. Returns the slot that row came from (the same: nothing moved)."""
        last = self.rows.pop()
        source = len(self.rows)
        if slot != source:
            self.rows[slot] = last
        self._state.move(source, slot)
        return source

    def refresh(self) -> None:
        """Brings the host's view of the settings up to date."""
        settings = [row.guidance for row in self.rows]
        self.width = self._bucket(len(settings))
        self.now = self._state.first(self.width)
        self._gates = [g.gate_entropy or 0.0 for g in settings]
        self.gated = any(self._gates)
        self.guided = [True] * len(settings)
        self.closed: torch.Tensor | None = None
        self.support = "all" if settings[0].support == "all" else "top-k"
        self.combined = any(g.support == "combined" for g in settings)
        widths = [g.k for g in settings]
        self.k, self.ragged = max(widths), min(widths) != max(widths)

    @property
    def shape(self) -> Hashable:
        """What a captured step depends on besides the contents of its tensors."""
        return self.width, self.k, self.support, self.combined, self.ragged

    @property
    def widths(self) -> torch.Tensor | None:
        """[width], candidates of each row, None where all have the same number."""
        return self.now.k if self.ragged and self.support != "all" else None

    @property
    def beyond(self) -> torch.Tensor | None:
        """[width, k] bool, the candidates that a row with a smaller k does not have; None where all have the same k."""
        if self.widths is None:
            return None
        return torch.arange(self.k, device=self.widths.device) >= self.widths.unsqueeze(-1)

    @property
    def beta(self) -> torch.Tensor:
        """[width], 0 where a row's gate is closed in this step."""
        return self.now.beta if self.closed is None else self.now.beta.masked_fill(self.closed.squeeze(-1), 0)

    @property
    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """β, temperature, seed and position [width], as `resample` takes them."""
        return self.beta, self.now.temperature, self.now.seed, self.now.position

    def open_gates(self, entropy: torch.Tensor) -> None:
        """Decides from the base distribution's entropy [n] which rows this step guides; the host looks at it."""
        if not self.gated:
            return
        pairs = zip(entropy.tolist(), self._gates, strict=True)
        self.guided = [value >= gate for value, gate in pairs]
        self.closed = ~to_device(self.guided, torch.bool, entropy.device).unsqueeze(-1)
