"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rgtg_fast.config import as_weights
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.device import to_device
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.runner import Counter, ModelRunner
from rgtg_fast.rewards.base import Prefix, Reward


class MixtureReward(Reward):
    """g(v) = Σ_j w_j · g_j(v): several rewards at once, with weights that may differ between the requests of a batch.

    Any rewards mix. The support may be "combined" or "all" where all of them score the whole vocabulary at once. A step
    costs the sum of their costs. The reward of a whole answer is the sum over its tokens where all of them are
    additive, else that of the last token.

    Args:
        rewards: the reward objects, no two the same.
        weights: one finite number per reward, 1 each by default. `Guidance(weights=...)` replaces them for one request.

    Raises:
        RGTGError: no reward, the same one twice, a mixture inside a mixture, or weights that do not fit; at binding:
            rewards over other vocabularies than the base model's.

    Example:
        >>> from rgtg_fast import ContrastiveReward, FunctionReward
        >>> shorter_ids = FunctionReward(lambda prefix_ids, candidate_ids: -candidate_ids.float())
        >>> MixtureReward([ContrastiveReward(), shorter_ids], weights=[0.7, 0.01]).weights
        (0.7, 0.01)
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None):
        super().__init__()
        self.rewards = list(rewards)
        if not self.rewards:
            raise RGTGError("a mixture of no rewards: pass at least one reward object")
        for reward in self.rewards:
            if not isinstance(reward, Reward):
                raise RGTGError(
                    f"a mixture takes reward objects and got {reward!r}: wrap it, for example SequenceReward(path)"
                )
            if isinstance(reward, MixtureReward):
                raise RGTGError(
                    "a mixture inside a mixture: list its rewards in the outer one, weights multiplied"
                )
        if len({id(reward) for reward in self.rewards}) < len(self.rewards):
            raise RGTGError("a mixture has the same reward twice: add the two weights instead")
        # In a list that the copies for other decoders share: setting the weights sets those of all.
        self._weights: list[tuple[float, ...]] = []
        self.weights = [1.0] * len(self.rewards) if weights is None else weights
        self.parts = len(self.rewards)
        self.on_device = all(reward.on_device for reward in self.rewards)
        self.scores_vocabulary = all(reward.scores_vocabulary for reward in self.rewards)
        self.additive = all(reward.additive for reward in self.rewards)
        self.prompt_contexts = sum(reward.prompt_contexts for reward in self.rewards)
        self._by_slot = torch.empty(0)  # [slots, J]
        self._slots: Slots | None = None
        self._owned: list[int] = []

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of requests that name none; settable between calls."""
        return self._weights[0]

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        checked = as_weights(weights)
        if len(checked) != len(self.rewards):
            raise RGTGError(
                f"{len(checked)} weights for {len(self.rewards)} rewards: pass one weight per reward"
            )
        self._weights[:] = [checked]

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        # A part of this mixture may also be used by a decoder alone, or belong to another mixture.
        self.rewards = [reward.for_decoder() for reward in self.rewards]
        for reward in self.rewards:
            reward.bind(lm, dtype=dtype, engine=engine, max_length=max_length)
        weight_dtype = torch.promote_types(lm.runner.dtype, torch.float32)
        self._by_slot = torch.empty(0, dtype=weight_dtype, device=lm.runner.device)

    @property
    def name(self) -> str:
        terms = zip(self.weights, self.rewards, strict=True)
        return f"MixtureReward({' + '.join(f'{weight:g}*{reward.name}' for weight, reward in terms)})"

    @property
    def limit(self) -> int | None:
        return min((r.limit for r in self.rewards if r.limit is not None), default=None)

    @property
    def engine(self) -> str | None:
        return next((reward.engine for reward in self.rewards if reward.engine is not None), None)

    @property
    def trunk(self) -> str | None:
        return "; ".join(reward.trunk for reward in self.rewards if reward.trunk is not None) or None

    def row_bytes(self, length: int, undo: int = 0) -> int:
        return sum(reward.row_bytes(length, undo) for reward in self.rewards)

    def cache_bytes(self) -> int:
        return sum(reward.cache_bytes() for reward in self.rewards)

    @property
    def shared_forward(self) -> bool:
        return any(reward.shared_forward for reward in self.rewards)

    def models(self) -> list[ModelRunner]:
        return [model for reward in self.rewards for model in reward.models()]

    def loaded(self) -> list[object]:
        return [thing for reward in self.rewards for thing in reward.loaded()]

    def stateful(self) -> list[Reward]:
        return [self, *self.rewards]

    def used_by(self, decoder: object) -> None:
        super().used_by(decoder)
        for reward in self.rewards:
            reward.used_by(decoder)

    def step_state(self) -> list[torch.Tensor]:
        return [self._by_slot, *(state for reward in self.rewards for state in reward.step_state())]

    def counters(self) -> list[Counter]:
        return [self.counter, *(counter for reward in self.rewards for counter in reward.counters())]

    def encode(self, prompt: Prompt) -> list[list[int]]:
        encoded = [reward.encode(prompt) for reward in self.rewards]
        # How many contexts a reward keeps is the same for every prompt.
        self._owned = [
            len(ids) - reward.prompt_contexts for reward, ids in zip(self.rewards, encoded, strict=True)
        ]
        pairs = list(zip(self.rewards, encoded, strict=True))
        shared = [ids for reward, own in pairs for ids in own[: reward.prompt_contexts]]
        return shared + [ids for reward, own in pairs for ids in own[reward.prompt_contexts :]]

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        super().reserve(slots, length)
        self._slots = None
        for reward in self.rewards:
            # A class from before `undo` does not take it.
            reward.reserve(slots, length, *([undo] if undo else []))
        if len(self._by_slot) < slots:
            self._by_slot = self._by_slot.new_zeros(slots, len(self.rewards))

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        self._weigh(slot, prefix)
        shared, own = encoded[: self.prompt_contexts], encoded[self.prompt_contexts :]
        for reward, count in zip(self.rewards, self._owned, strict=True):
            reward.admit(slot, prefix, shared[: reward.prompt_contexts] + own[:count])
            shared, own = shared[reward.prompt_contexts :], own[count:]
        self._count()

    def move(self, source: int, target: int) -> None:
        self._by_slot[target] = self._by_slot[source]
        for reward in self.rewards:
            reward.move(source, target)

    def _weigh(self, slot: int, prefix: Prefix) -> None:
        weights = self.weights if prefix.weights is None else prefix.weights
        self._by_slot[slot] = to_device(weights, self._by_slot.dtype, self._by_slot.device)

    def set_prefix(self, slot: int, prefix: Prefix) -> None:
        self._weigh(slot, prefix)  # the mixture's own may have been set since the slot was filled
        for reward in self.rewards:
            reward.set_prefix(slot, prefix)

    def use_slots(self, slots: Slots | None) -> None:
        self._slots = slots
        for reward in self.rewards:
            reward.use_slots(slots)

    def follow(self, tokens: torch.Tensor) -> None:
        for reward in self.rewards:
            reward.follow(tokens)
        self._count()

    def begin_step(self, context_logits: torch.Tensor) -> None:
        sizes = [reward.prompt_contexts for reward in self.rewards]
        for reward, own in zip(self.rewards, context_logits.split(sizes, dim=1), strict=True):
            reward.begin_step(own)

    def guidance(self) -> torch.Tensor:
        if not self.scores_vocabulary:
            return super().guidance()
        return self._sum([reward.guidance() for reward in self.rewards])

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        return self._sum([reward.score(candidates) for reward in self.rewards])

    def commit(self, choice: torch.Tensor) -> None:
        for reward in self.rewards:
            reward.commit(choice)
        self._count()

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        weights = self.weights if prefix.weights is None else prefix.weights
        rewards = [reward.score_answer(prefix, answer) for reward in self.rewards]
        # A weight of 0 takes a reward out, infinities and NaN included.
        terms = [(w, values) for w, values in zip(weights, rewards, strict=True) if w != 0]
        return [sum(w * values[i] for w, values in terms) for i in range(len(answer))]

    def _sum(self, rewards: list[torch.Tensor]) -> torch.Tensor:
        """Σ_j w_j · rewards_j [B, n], each row with its own weights; a weight of 0 ignores infinities and NaN."""
        total = None
        weights = self._by_slot if self._slots is None else self._by_slot[self._slots.index]
        for j, values in enumerate(rewards):
            weight = weights[: len(values), j : j + 1]
            term = (values * weight).masked_fill_(weight == 0, 0)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def _count(self) -> None:
        """Adds up the counters of the parts."""
        counters = [reward.counter for reward in self.rewards]
        total = self.counter
        total.calls = sum(c.calls for c in counters)
        total.tokens = sum(c.tokens for c in counters)
        total.prompt_tokens = sum(c.prompt_tokens for c in counters)
