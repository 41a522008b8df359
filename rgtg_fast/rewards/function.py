"""Any Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.rewards.base import Prefix, PrefixReward, Reward, as_rewards

RewardFunction = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


class FunctionReward(PrefixReward):
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

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        self._device = lm.runner.device
        self._forget_rows()

    @property
    def name(self) -> str:
        return f"FunctionReward({getattr(self.function, '__name__', type(self.function).__name__)})"

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        return self._call(self._prefixes(len(candidates)), candidates)

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
