"""The protocol between the decoder and a guide."""

from __future__ import annotations

import copy
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.runner import Counter, ModelRunner
from rgtg_fast.ops import resample


@dataclass
class Prefix:
    """A row as a guide sees it: the prompt and the answer tokens decided so far.

    Attributes:
        prompt: as the user gave it. prompt_ids: its token ids under the base model.
        answer: ids of the answer tokens decided so far; grows while the row is decoded.
        weights: what this request gives the guides of a mixture, None for the mixture's own.
    """

    prompt: Prompt
    prompt_ids: list[int]
    answer: list[int] = field(default_factory=list)
    weights: tuple[float, ...] | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and answer tokens, the prefix x ∘ y_<i."""
        return self.prompt_ids + self.answer


class Reward(ABC):
    """What guides a decoder: r(x, y_<i ∘ v) for candidate tokens v.

    A guide is bound once to a base model. Then, for each call of the decoder: `reserve` once, `admit` for every row
    that enters a slot, and per step `begin_step`, `guidance` (wide guides), `score` for the candidates, then `commit`.
    `move` follows a row to another slot. Rows occupy the slots 0..n-1.

    A guide that is given to a second decoder works there as a copy (`for_decoder`), which shares nothing but settings
    and loaded models.

    Attributes:
        bound_to: the base model of the last `bind`, None before it.

    Class attributes:
        wide: True where a step's rewards of the whole vocabulary are known at once, so that the support may be
            "combined" or "all": such a guide also has `guidance`.
        contexts: rows that the guide adds to the base model's batch for each prompt (contrastive prompts: 2).
        additive: True where the reward of an answer is the sum over its tokens (a log-ratio of the whole answer), False
            where it is that of its last prefix.
        parts: guides that a mixture adds up and `Guidance(weights=...)` may weigh, 0 for anything else.
        on_device: True where a step (`begin_step`, `guidance`, `score`, `commit`) reads nothing on the host, neither a
            tensor nor a row's answer: then steps may run ahead of the host and be captured into a CUDA graph.
    """

    on_device = False
    wide = False
    contexts = 0
    additive = False
    parts = 0
    bound_to: LanguageModel | None = None
    # The decoder that uses it.
    _user: Callable[[], object] | None = None

    def __init__(self) -> None:
        self.counter = Counter()

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "bind" in vars(cls):
            cls.bind = _noting(cls.bind)  # pyright: ignore[reportAttributeAccessIssue]

    @abstractmethod
    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        """Loads what the guide needs for this base model and checks that the two fit.

        Args:
            dtype: of the guide's model; None for the base model's, or a loaded model's own.
            engine, max_length: as in `RewardGuidedDecoder.from_pretrained`.
        """

    def for_decoder(self) -> Reward:
        """This guide where no decoder uses it, else a copy to be bound anew.

        A subclass of somebody else's is never copied, since its state is not known: decoders take turns with it.
        """
        free = self._user is None or self._user() is None
        return self if free or not type(self).__module__.startswith("rgtg_fast.") else self._copy()

    def _copy(self) -> Reward:
        """Another guide with the same settings, bound to nothing."""
        made = copy.copy(self)
        made.counter, made.bound_to, made._user = Counter(), None, None
        return made

    def used_by(self, decoder: object) -> None:
        """Notes the decoder that uses the guide, for as long as that exists."""
        self._user = weakref.ref(decoder)

    def stateful(self) -> list[Reward]:
        """The guide and those that it is made of: what holds the rows of a run."""
        return [self]

    def loaded(self) -> list[object]:
        """Models and tokenizers that other guides and decoders may use too."""
        return [runner.model for runner in self.models()]

    @property
    def name(self) -> str:
        """What `describe()` and the tables call this guide."""
        return type(self).__name__

    @property
    def limit(self) -> int | None:
        """Tokens that the guide's context holds, None where it has none of its own."""
        return None

    @property
    def engine(self) -> str | None:
        """The engine that runs the guide's model, None where it has none."""
        return None

    @property
    def trunk(self) -> str | None:
        """In words: which weights run the guide, the base model's or its own; None where it has no model."""
        return None

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in the guide's own cache."""
        return 0

    def cache_bytes(self) -> int:
        """Bytes of the guide's own cache."""
        return 0

    def models(self) -> list[ModelRunner]:
        """The guide's own models; not the base model where it shares that one's forward."""
        return []

    def step_state(self) -> list[torch.Tensor]:
        """Tensors of the guide's own that a step reads or changes, at the addresses that a captured step will use."""
        return []

    def counters(self) -> list[Counter]:
        """What a step counts."""
        return [self.counter]

    def encode(self, prompt: Prompt) -> list[list[int]]:
        """The prompt's token ids in each context the guide keeps: first its `contexts` of the base's, then its own."""
        return []

    def reserve(self, slots: int, length: int) -> None:
        """Makes room for `slots` rows of `length` tokens and zeroes the counter."""
        self.counter = Counter()

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        """A row enters a slot."""

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""

    def begin_step(self, context_logits: torch.Tensor) -> None:
        """A step begins for slots 0..B-1: the base model's logits [B, contexts, V] in the guide's own contexts."""

    def guidance(self) -> torch.Tensor:
        """Rewards [B, V] of every token in this step, any floating dtype; wide guides only."""
        raise TypeError(f"{type(self).__name__} scores candidates, not the whole vocabulary")

    @abstractmethod
    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        """Rewards [B, k] of candidate tokens [B, k] in slots 0..B-1."""

    @property
    def fused(self) -> bool:
        """Whether `choose` does in one launch what `score` and `resample` do in several."""
        return False

    def choose(
        self,
        candidates: torch.Tensor,
        logprobs: torch.Tensor,
        beta: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rewards [B, k] of candidates [B, k], then choice and log-probability [B] as `resample` gives them."""
        rewards = self.score(candidates).to(logprobs.dtype)
        return rewards, *resample(logprobs, rewards, beta, temperature, seed, position)

    def commit(self, choice: torch.Tensor) -> None:
        """Candidate `choice[b]` [B] has become row b's next token; -1: the row has ended and stands still."""

    def answer_reward(self, rewards: Sequence[float]) -> float:
        """The reward of a whole answer from its tokens' rewards: their sum or the last prefix's."""
        return sum(rewards) if self.additive else rewards[-1]

    @property
    def appends(self) -> bool:
        """Whether the guide's prefix can grow by several tokens at once and be cut back (`append`, `roll_back`)."""
        return False

    def append(self, slot: int, tokens: Sequence[int]) -> list[float]:
        """Tokens have been added to a row's answer: the reward of each prefix, from one causal forward."""
        raise RGTGError(f"{self.name} cannot append tokens: use a SequenceReward with a cache of its own")

    def roll_back(self, slot: int, count: int) -> None:
        """A row's last `count` tokens are no longer part of its answer."""
        raise RGTGError(f"{self.name} cannot be rolled back: use a SequenceReward with a cache of its own")

    @abstractmethod
    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        """What decoding y gives its tokens, i = 1..n: the reward of each prefix y_{1:i}, or each token's own where the
        guide is `additive`."""


def _noting(bind: Callable[..., None]) -> Callable[..., None]:
    """`bind`, which also notes the base model."""

    @functools.wraps(bind)
    def noted(self: Reward, lm: LanguageModel, **settings: Any) -> None:
        bind(self, lm, **settings)
        self.bound_to = lm

    return noted


def as_rewards(
    given: Any, shape: tuple[int, ...], device: torch.device, name: str, asked: str
) -> torch.Tensor:
    """What a user's function returned, as rewards in at least float32.

    Args:
        given: a tensor on any device, an array, or nested sequences of numbers. shape: that it must have.
        name, asked: the guide and what it was asked to score, for messages.

    Raises:
        RGTGError: something else, or another shape.
    """
    try:
        if isinstance(given, (list, tuple)) and any(isinstance(row, torch.Tensor) for row in given):
            given = torch.stack([torch.as_tensor(row) for row in given])
        rewards = torch.as_tensor(given, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RGTGError(
            f"{name} returned {shown(given)}, which is no array of numbers, for {asked}: return one reward each"
        ) from error
    if rewards.is_complex() or rewards.layout != torch.strided:
        raise RGTGError(f"{name} returned {rewards.dtype} ({rewards.layout}): return a dense real tensor")
    if rewards.shape != shape:
        raise RGTGError(f"{name} returned shape {tuple(rewards.shape)} for {asked}: return one reward each")
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))
