"""The interface between the decoder and a reward."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg_fast.deprecation import RenamedAttribute, renamed_method, warn_renamed
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.runner import Counter, ModelRunner
from rgtg_fast.ops import resample


@dataclass
class Prefix:
    """A row as a reward sees it: the prompt and the answer tokens decided so far.

    Attributes:
        prompt: as the user gave it.
        prompt_ids: its token ids under the base model.
        answer: ids of the answer tokens decided so far; grows while the row is decoded.
        weights: this request's weights of a mixture's rewards, None for the mixture's own.
    """

    prompt: Prompt
    prompt_ids: list[int]
    answer: list[int] = field(default_factory=list)
    weights: tuple[float, ...] | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and answer tokens, the prefix x ∘ y_<i."""
        return self.prompt_ids + self.answer


# Members of users' subclasses that were renamed: old -> new.
_RENAMED_ATTRIBUTES = {"wide": "scores_vocabulary", "contexts": "prompt_contexts"}
_RENAMED_METHODS = {"observe": "begin_step", "choose": "sample"}


class Reward(ABC):
    """The reward r(x, y_<i ∘ v) of candidate tokens v.

    A reward is bound once to a base model. Then, for each call of the decoder: `reserve` once, `admit` for every row
    that enters a slot, and per step `begin_step`, `guidance` (where `scores_vocabulary`), `score` for the candidates,
    then `commit`. `move` follows a row to another slot. Rows occupy the slots 0..n-1.

    A `RequestScorer` names the slots of each step (`use_slots`), and tokens follow that were not scored (`follow`).

    A reward that is given to a second decoder works there as a copy (`for_decoder`), which shares nothing but settings
    and loaded models.

    Attributes:
        bound_to: the base model of the last `bind`, None before it.

    Class attributes:
        scores_vocabulary: True where a step's rewards of the whole vocabulary are known at once, so that the support
            may be "combined" or "all": such a reward also has `guidance`.
        prompt_contexts: rows that the reward adds to the base model's batch for each prompt (contrastive prompts: 2).
        additive: True where the reward of an answer is the sum over its tokens (a log-ratio of the whole answer), False
            where it is that of its last prefix.
        parts: rewards that a mixture adds up and `Guidance(weights=...)` may weigh, 0 for anything else.
        on_device: True where a step (`begin_step`, `guidance`, `score`, `commit`) reads nothing on the host, neither a
            tensor nor a row's answer: then steps may run ahead of the host and be captured into a CUDA graph.
        gives_rewards: False for `NoReward` alone.
    """

    on_device = False
    scores_vocabulary = False
    prompt_contexts = 0
    additive = False
    parts = 0
    gives_rewards = True
    bound_to: LanguageModel | None = None
    wide = RenamedAttribute("scores_vocabulary")
    contexts = RenamedAttribute("prompt_contexts")
    # The decoder that uses it.
    _user: Callable[[], object] | None = None

    def __init__(self) -> None:
        self.counter = Counter()

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for old, new in (_RENAMED_ATTRIBUTES | _RENAMED_METHODS).items():
            if old in vars(cls):
                warn_renamed(f"{cls.__name__}.{old}", new, stacklevel=4)
                setattr(cls, new, vars(cls)[old])
                delattr(cls, old)
        _keep_old_methods(cls)
        if "bind" in vars(cls):
            cls.bind = _noting(cls.bind)  # pyright: ignore[reportAttributeAccessIssue]

    @abstractmethod
    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        """Loads the reward's model for this base model and checks that the two fit.

        Args:
            lm: the base model.
            dtype: dtype of the reward's model; None for the base model's, or a loaded model's own.
            engine: as in `RewardGuidedDecoder.from_pretrained`.
            max_length: as in `RewardGuidedDecoder.from_pretrained`.
        """

    def for_decoder(self) -> Reward:
        """This reward where no decoder uses it, else a copy to be bound anew.

        A user's subclass is never copied, since its state is not known: decoders take turns with it.
        """
        free = self._user is None or self._user() is None
        return self if free or not type(self).__module__.startswith("rgtg_fast.") else self._copy()

    def _copy(self) -> Reward:
        """Another reward with the same settings, bound to nothing."""
        made = copy.copy(self)
        made.counter, made.bound_to, made._user = Counter(), None, None
        return made

    def used_by(self, decoder: object) -> None:
        """Notes the decoder that uses the reward, for as long as that exists."""
        self._user = weakref.ref(decoder)

    def stateful(self) -> list[Reward]:
        """The reward and its components: the objects that hold the rows of a run."""
        return [self]

    def loaded(self) -> list[object]:
        """Models and tokenizers that other rewards and decoders may use too."""
        return [runner.model for runner in self.models()]

    @property
    def name(self) -> str:
        """Its name in `describe()` and tables."""
        return type(self).__name__

    @property
    def limit(self) -> int | None:
        """Tokens that its model's context holds, None where it has no model."""
        return None

    @property
    def engine(self) -> str | None:
        """The engine that executes its model, None where it has none."""
        return None

    @property
    def trunk(self) -> str | None:
        """In words: whose weights compute it, the base model's or its own; None where it has no model."""
        return None

    def row_bytes(self, length: int, undo: int = 0) -> int:
        """Bytes that a row of `length` tokens takes in its own cache; `undo` as in `reserve`."""
        # A class from before this method states bytes per token.
        per_token: int | None = getattr(self, "cache_bytes_per_token", None)
        if per_token is None:
            return 0
        warn_renamed(f"{type(self).__name__}.cache_bytes_per_token", "row_bytes(length, undo)")
        return per_token * length

    def cache_bytes(self) -> int:
        """Bytes of its own cache."""
        return 0

    @property
    def shared_forward(self) -> bool:
        """Whether the base model's own forward executes the candidates, for an adapter that scores them there."""
        return False

    def models(self) -> list[ModelRunner]:
        """Models of its own; not the base model where it shares that one's forward."""
        return []

    def step_state(self) -> list[torch.Tensor]:
        """Its own tensors that a step reads or changes, at the addresses that a captured step will use."""
        return []

    def counters(self) -> list[Counter]:
        """Counters that a step changes."""
        return [self.counter]

    def encode(self, prompt: Prompt) -> list[list[int]]:
        """The prompt's token ids in each context: first the base model's `prompt_contexts`, then its own model's."""
        return []

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        """Begins a run: allocates memory and zeroes the counter.

        Args:
            slots: rows.
            length: tokens that a row may reach in its own models.
            undo: tokens by which a row may be cut back (`roll_back`).
        """
        self.counter = Counter()

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        """A row enters a slot."""

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""

    def set_prefix(self, slot: int, prefix: Prefix) -> None:
        """The row in a slot goes on as this prefix, whose tokens are the same."""

    def use_slots(self, slots: Slots | None) -> None:
        """The rows of the steps that follow are in these slots, in their order; None: in slots 0..B-1.

        Raises:
            RGTGError: the class does not define it.
        """
        raise RGTGError(
            f"{self.name} scores slots 0..B-1 alone and requests come and go: define {type(self).__name__}.use_slots, "
            "or use RewardGuidedDecoder"
        )

    def follow(self, tokens: torch.Tensor) -> None:
        """Tokens [B] follow in the rows of the step that has begun, without being scored."""
        self.score(tokens.unsqueeze(-1))
        self.commit(torch.zeros_like(tokens))

    def begin_step(self, context_logits: torch.Tensor) -> None:
        """A step begins for slots 0..B-1, or those of `use_slots`.

        Args:
            context_logits: [B, prompt_contexts, V], the base model's logits in the reward's contexts.
        """

    def guidance(self) -> torch.Tensor:
        """Rewards [B, V] of every token in this step, any floating dtype; only where `scores_vocabulary`."""
        raise TypeError(f"{type(self).__name__} scores candidates, not the whole vocabulary")

    @abstractmethod
    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        """Rewards [B, K] of candidate tokens [B, K] in slots 0..B-1."""

    @property
    def fused(self) -> bool:
        """Whether `sample` does in one launch what `score` and `resample` do in several: then steps call it instead."""
        return False

    def sample(
        self,
        candidates: torch.Tensor,
        logprobs: torch.Tensor,
        beta: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores candidates and draws one of them.

        Args:
            candidates: [B, K] int64.
            logprobs: [B, K], their log-probabilities under the base model.
            beta: [B] float32, as all that follow an argument of `rgtg_fast.ops.resample`.
            temperature: [B] float32.
            seed: [B] int64.
            position: [B] int64.

        Returns:
            Rewards [B, K], the choice [B] and its log-probability after guidance [B].
        """
        rewards = self.score(candidates).to(logprobs.dtype)
        return rewards, *resample(logprobs, rewards, beta, temperature, seed, position)

    def commit(self, choice: torch.Tensor) -> None:
        """Candidate `choice[b]` [B] has become row b's next token; -1: none has, the row does not change."""

    def answer_reward(self, rewards: Sequence[float]) -> float:
        """The reward of a whole answer from its tokens' rewards: their sum or the last prefix's."""
        return sum(rewards) if self.additive else rewards[-1]

    @property
    def appends(self) -> bool:
        """Whether its prefixes can grow by several tokens at once and be cut back (`append`, `roll_back`)."""
        return False

    def append(self, slot: int, tokens: Sequence[int]) -> list[float]:
        """Tokens have been added to a row's answer: the reward of each prefix, from one causal forward."""
        raise RGTGError(f"{self.name} cannot append tokens: use a SequenceReward with a cache of its own")

    def roll_back(self, slot: int, count: int) -> None:
        """A row's last `count` tokens are no longer part of its answer."""
        raise RGTGError(f"{self.name} cannot be rolled back: use a SequenceReward with a cache of its own")

    @abstractmethod
    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        """Rewards of a given answer's tokens, as decoding it gives them.

        Returns:
            For i = 1..n the reward of the prefix y_{1:i}, or that of token i alone where the reward is `additive`.
        """


def _keep_old_methods(cls: type[Reward]) -> None:
    """Gives the methods that a class defines their old names too, so that `super().observe(...)` finds its parent's."""
    for old, new in _RENAMED_METHODS.items():
        if inspect.isfunction(method := vars(cls).get(new)):
            setattr(cls, old, renamed_method(f"{cls.__name__}.{old}", new, method))


_keep_old_methods(Reward)


def _noting(bind: Callable[..., None]) -> Callable[..., None]:
    """`bind` that also notes the base model."""

    @functools.wraps(bind)
    def noted(self: Reward, lm: LanguageModel, **settings: Any) -> None:
        bind(self, lm, **settings)
        self.bound_to = lm

    return noted


class PrefixReward(Reward):
    """A reward that reads the prefixes themselves, in slots, and has no cache that follows them."""

    def __init__(self) -> None:
        super().__init__()
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._rows: dict[int, Prefix] = {}
        self._slots: Slots | None = None

    def _prefixes(self, count: int) -> list[Prefix]:
        """The prefixes of a step's `count` rows."""
        slots = range(count) if self._slots is None else self._slots.host
        return [self._rows[slot] for slot in slots]

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


class NoReward(Reward):
    """Rewards of zero for every token: a decoder that was given no reward."""

    on_device = True
    scores_vocabulary = True
    gives_rewards = False

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        """Needs nothing."""

    def begin_step(self, context_logits: torch.Tensor) -> None:
        self._like = context_logits

    def guidance(self) -> torch.Tensor:
        rows, _, vocabulary = self._like.shape
        return self._like.new_zeros(rows, vocabulary)

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        return self._like.new_zeros(candidates.shape)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        return [0.0] * len(answer)


def as_rewards(
    given: Any, shape: tuple[int, ...], device: torch.device, name: str, asked: str
) -> torch.Tensor:
    """The result of a user's function as rewards in at least float32.

    Args:
        given: a tensor on any device, an array, or nested sequences of numbers.
        shape: the required one.
        device: where the rewards are needed.
        name: name of the reward, for messages.
        asked: what the function was asked to score, for messages.

    Raises:
        RGTGError: no array of numbers, or another shape.
    """
    try:
        if isinstance(given, (list, tuple)) and any(isinstance(row, torch.Tensor) for row in given):
            given = torch.stack([torch.as_tensor(row) for row in given])
        rewards = torch.as_tensor(given, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RGTGError(
            f"{name} returned {shown(given)}, which is not an array of numbers, for {asked}: return one reward each"
        ) from error
    if rewards.is_complex() or rewards.layout != torch.strided:
        raise RGTGError(f"{name} returned {rewards.dtype} ({rewards.layout}): return a dense real tensor")
    if rewards.shape != shape:
        raise RGTGError(f"{name} returned shape {tuple(rewards.shape)} for {asked}: return one reward each")
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def as_score(rewards: Any, reward: Reward) -> torch.Tensor:
    """What `score` or `guidance` of a reward has returned.

    Raises:
        RGTGError: it is not a tensor.
    """
    if not isinstance(rewards, torch.Tensor):
        raise RGTGError(f"{reward.name} gave {shown(rewards)}: score must return a tensor [B, k]")
    return rewards
