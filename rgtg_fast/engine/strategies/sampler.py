"""Samples of the base model that are drawn outside of the decode loop and can be cut back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from rgtg_fast.engine.invariance import products
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.ops import resample, topk_logprobs


def sample_seed(seed: int, sample: int) -> int:
    """The seed of sample j of a prompt: the prompt's own for the first, far from every other for the rest."""
    if sample == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class Sampler:
    """Samples of the base model in slots 0..n-1, each with noise of its own seed and count of draws.

    Args:
        lm: the base model.
        temperature: τ >= 0.
        top_k: tokens to sample from, None for the whole vocabulary.
        invariant: as `Scheduler.invariant`.
    """

    def __init__(self, lm: LanguageModel, temperature: float, top_k: int | None, invariant: bool = False):
        self.invariant = invariant
        self.lm, self.runner = lm, lm.runner
        self.temperature = temperature
        self.top_k = None if top_k is None else min(top_k, lm.vocabulary)
        self.newest: list[int] = []  # each slot's newest token, not yet in the cache
        self.seeds: list[int] = []
        self.draws: list[int] = []

    def begin(self, slot: int, ids: Sequence[int], seed: int) -> None:
        """A prompt enters the next free slot."""
        self.runner.begin(slot, ids[:-1])
        self.newest.append(ids[-1])
        self.seeds.append(seed)
        self.draws.append(0)

    def fork(self, source: int, seed: int) -> None:
        """The next free slot becomes another sample of the prefix in slot `source`, which is copied, not computed."""
        target = len(self.newest)
        self.newest.append(0)
        self.seeds.append(seed)
        self.draws.append(0)
        self.continue_as(source, target)

    def continue_as(self, source: int, target: int) -> None:
        """Slot `target` continues the text of slot `source` with its own noise."""
        self.runner.move(source, target)
        self.newest[target] = self.newest[source]

    def move(self, source: int, target: int) -> None:
        """Moves slot `source` to slot `target`, its noise included."""
        self.continue_as(source, target)
        self.seeds[target], self.draws[target] = self.seeds[source], self.draws[source]

    def drop(self, count: int) -> None:
        """The last `count` slots are free."""
        for values in (self.newest, self.seeds, self.draws):
            del values[len(values) - count :]

    def step(self) -> torch.Tensor:
        """Logits [n, V] after each slot's newest token, which enters the cache."""
        tokens = torch.tensor(self.newest, device=self.runner.device)
        with products(self.invariant):
            hidden = self.runner.step(tokens.unsqueeze(-1))
            self.runner.commit(torch.zeros_like(tokens))
            return self.runner.logits(hidden.squeeze(1))[:, : self.lm.vocabulary]

    def entropy(self, logits: torch.Tensor) -> list[float]:
        """Of each row's next-token distribution, in nats."""
        return topk_logprobs(logits, 1)[2].tolist()

    def draw(self, logits: torch.Tensor, slots: list[int]) -> list[tuple[int, float]]:
        """The next token of each of these slots from its logits [len(slots), V], and its log π."""
        if self.top_k is None:
            logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            candidates = None
        else:
            logprobs, candidates, _ = topk_logprobs(logits, self.top_k)

        def each(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([values[slot] for slot in slots], dtype=dtype, device=logits.device)

        none = torch.zeros(len(slots), dtype=torch.float32, device=logits.device)
        choice, _ = resample(
            logprobs,
            torch.zeros_like(logprobs),
            none,
            none + self.temperature,
            each(self.seeds, torch.int64),
            each(self.draws, torch.int64),
        )
        at = choice.unsqueeze(-1)
        tokens = at if candidates is None else candidates.gather(-1, at)
        drawn = zip(tokens.squeeze(-1).tolist(), logprobs.gather(-1, at).squeeze(-1).tolist(), strict=True)
        result = list(drawn)
        for slot, (token, _) in zip(slots, result, strict=True):
            self.newest[slot] = token
            self.draws[slot] += 1
        return result
