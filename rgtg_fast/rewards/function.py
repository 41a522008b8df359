"""Any Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.rewards.base import Prefix, Reward, as_rewards

RewardFunction = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


class FunctionReward(Reward):
    """Rewards by a function f(prefix_ids, candidate_ids) -> rewards.

    Args:
        function: called once a step with `prefix_ids`, a list of B int64 tensors [T_b] (prompt and answer so far
            under the base model), and `candidate_ids` [B, K] int64; returns [B, K] rewards (a tensor or nested
            sequence). A row's rewards must depend on its own prefix and candidates alone.

    Example:
        >>> shorter_ids = FunctionReward(lambda prefix_ids, candidate_ids: -candidate_ids.float())
    """

    def __init__(self, function: RewardFunction):
        super().__init__()
        check_function(function)
        self.function = function
        self._device = torch.device("cpu")
        self._rows: dict[int, Prefix] = {}
        self._slots: Slots | None = None

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        self._device = lm.runner.device
        self._rows, self._slots = {}, None

    @property
    def name(self) -> str:
        return f"FunctionReward({getattr(self.function, '__name__', type(self.function).__name__)})"

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        self._rows[slot] = prefix

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def set_prefix(self, slot: int, prefix: Prefix) -> None:
        self._rows[slot] = prefix

    def use_slots(self, slots: Slots | None) -> None:
        self._slots = slots

    def follow(self, tokens: torch.Tensor) -> None:
        """The prefixes hold the answers."""

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        slots = range(len(candidates)) if self._slots is None else self._slots.host
        return self._call([self._rows[slot] for slot in slots], candidates)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        grown = Prefix(prefix.prompt, prefix.prompt_ids)
        rewards = []
        for token in answer:
            candidate = torch.tensor([[token]], device=self._device)
            rewards.append(float(self._call([grown], candidate)[0, 0]))
            grown.answer.append(token)
        return rewards

    def _call(self, rows: list[Prefix], candidates: torch.Tensor) -> torch.Tensor:
        self.counter.calls += 1
        self.counter.tokens += candidates.numel()
        prefixes = [torch.tensor(row.ids, dtype=torch.int64, device=self._device) for row in rows]
        # A copy, since the function may write into its arguments.
        rewards = self.function(prefixes, candidates.clone())
        shape = tuple(candidates.shape)
        return as_rewards(rewards, shape, self._device, self.name, f"candidates of shape {shape}")


def check_function(function: object) -> None:
    """Refuses objects that are not a function of prefixes and candidates, callable ones among them.

    Raises:
        RGTGError: saying what to pass instead.
    """
    if isinstance(function, PreTrainedModel):
        raise RGTGError(f"the reward is a {type(function).__name__} alone: pass (model, tokenizer)")
    if isinstance(function, PreTrainedTokenizerBase):
        raise RGTGError(f"the reward is a {type(function).__name__}: pass (model, tokenizer)")
    if isinstance(function, type) and issubclass(function, Reward):
        raise RGTGError(
            f"the reward is the class {function.__name__}: pass an object, {function.__name__}(...)"
        )
    if not callable(function):
        raise RGTGError(
            f"reward={shown(function)} is not callable: pass f(prefix_ids, candidate_ids) -> rewards, a path or "
            "hub id, a reward object, or None"
        )
