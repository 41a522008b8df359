"""A causal reward model with a scalar head: PARGS, ARGS and RAD."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from rgtg_fast.bundled import resolve
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.heads import linear_part, scores_of
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    adapter_model,
    load_sequence_classifier,
    reward_runner,
)
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.quantized import round_weights
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.ops import score_and_sample
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.compatibility import (
    check_rounding,
    check_same_tokenizer,
    place_adapter,
    unbound,
)
from rgtg_fast.rewards.runtime import RewardRuntime, SharedForward, own_model


class SequenceReward(Reward):
    """r(x, y_<i ∘ v): a causal model's scalar head at the candidate's own position, the candidate being the last token.

    PARGS (arXiv 2406.07780) with a model trained on partial sequences, ARGS (arXiv 2402.01694) with one trained on
    full sequences: the same call. A step costs one forward of B·K tokens over one shared prefix cache. Where the reward
    model is an adapter on the base model itself, that forward is the base model's too: one forward a token for both.

    Args:
        model: path or hub id of a causal reward model with one score (transformers' `score`, or another head that
            docs/rewards.md lists), a folder with a LoRA adapter and its score head in PEFT's format, `bundled:NAME`,
            a loaded `Adapter`, or a (model, tokenizer) pair.
        chat_template: Jinja chat template for the reward model's prompts; by default its own tokenizer's, and
            where that has none the base model's prompt ids. Answer ids are shared with the base model.
        share_trunk: whether an adapter runs in the base model's own forward. None: where its base is this model and
            its prompts read the same; True: refuse otherwise; False: a copy of the base model with the adapter merged.
        label: name or index of the label whose score is the reward, where the model has several.
        trust_remote_code: whether code that comes with this model may run; never that of an adapter's base.
        weights: "int8" or "int4" rounds the weights of the model's decoder layers to 8 or 4 bits once it is loaded: a
            half or a quarter of bfloat16's bytes, and other rewards (docs/performance.md). "int8" runs on the native
            engine in bfloat16. An adapter is merged into a copy of the base model first. None: as they are.

    Raises:
        RGTGError: at binding: several labels and none chosen, no trained head, another tokenizer, a model that cannot
            be cached, an adapter that cannot be served or, with `share_trunk=True`, not be shared, or weights that
            cannot be rounded.

    Example:
        >>> SequenceReward("adapter-folder", share_trunk=False).share_trunk
        False
    """

    on_device = True

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelAndTokenizer | Adapter,
        chat_template: str | None = None,
        share_trunk: bool | None = None,
        label: str | int | None = None,
        trust_remote_code: bool = False,
        weights: str | None = None,
    ):
        super().__init__()
        check_rounding(weights, model, share_trunk)
        self.trust_remote_code = trust_remote_code
        self.source, self.chat_template, self.share_trunk = model, chat_template, share_trunk
        self.label, self.weights = label, weights
        self._bound: RewardRuntime | None = None

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        self._bound = None
        source: Any = resolve(self.source) if isinstance(self.source, str) else self.source
        if not isinstance(source, (Adapter, tuple)) and is_adapter(source):
            source = Adapter.load(source)
        if isinstance(source, Adapter):
            head = source.reward_head()
            if self.label is not None:
                raise RGTGError(
                    f"label={self.label!r} and {source.name} is an adapter, which has one label: leave it out"
                )
            tokenizer, why = place_adapter(source, lm, self.chat_template, self.share_trunk, self.weights)
            if why is None:
                self._bound = self._shared(source, head, lm, tokenizer)
                return
            model, _ = adapter_model(source, lm.pair(), dtype, lm.reward_device)
            trunk = f"a model of its own, the adapter merged into a copy of its base ({why})"
            whole_chats = False  # the trainer of this package encodes prompt and answer apart
        elif self.share_trunk:
            raise RGTGError(
                f"share_trunk=True and {self.source!r} is not an adapter folder: only an adapter shares the base model"
            )
        else:
            model, tokenizer = load_sequence_classifier(
                source, lm.runner, dtype, self.label, self.trust_remote_code, lm.reward_device
            )
            check_same_tokenizer(lm.tokenizer, tokenizer, lm.runner.name, model.config._name_or_path)
            trunk, whole_chats = "a model of its own", True
        round_weights(model, self.weights, engine)
        runner = reward_runner(model, engine, max_length)
        self._bound = own_model(runner, lm, tokenizer, self.chat_template, trunk, whole_chats)
        used = lm.vocabulary if lm.tokenizer is None else min(len(lm.tokenizer), lm.vocabulary)
        if runner.embeddings < used:
            raise RGTGError(
                f"the reward model {self.name} has embeddings for {runner.embeddings} tokens and the base "
                f"model uses {used}: "
                "use a reward model with the same vocabulary, or TextReward(...)"
            )
        lm.vocabulary = min(lm.vocabulary, runner.embeddings)

    def _shared(
        self, adapter: Adapter, head: torch.nn.Linear, lm: LanguageModel, tokenizer: Any
    ) -> SharedForward:
        rows = "no rows of its own"
        if adapter.fork is not None:
            rows = f"rows of its own from layer {adapter.fork} on"
        head = head.to(lm.runner.device, torch.promote_types(lm.runner.dtype, torch.float32))
        return SharedForward(lm, adapter, head, tokenizer, f"the base model's, {rows}")

    @property
    def _runtime(self) -> RewardRuntime:
        if self._bound is None:
            raise unbound("SequenceReward")
        return self._bound

    @property
    def runner(self) -> ModelRunner | None:
        """The model of its own, None where the base model's forward executes it or it is not bound."""
        return next(iter(self.models()), None)

    @property
    def name(self) -> str:
        return f"SequenceReward({self._runtime.name})"

    @property
    def trunk(self) -> str | None:
        return None if self._bound is None else self._bound.trunk

    @property
    def limit(self) -> int | None:
        return self._runtime.runner.limit

    @property
    def engine(self) -> str | None:
        return self._runtime.runner.engine

    @property
    def shared_forward(self) -> bool:
        return self._runtime.shared

    def row_bytes(self, length: int, undo: int = 0) -> int:
        return sum(model.cache.row_bytes(length, undo) for model in self.models())

    def cache_bytes(self) -> int:
        return sum(model.cache.nbytes() for model in self.models())

    def models(self) -> list[ModelRunner]:
        return [] if self._bound is None else self._bound.models()

    def loaded(self) -> list[object]:
        tokenizer = None if self._bound is None else self._bound.tokenizer
        # Models that differ in their heads alone may share a trunk.
        trunks = [model.model.base_model for model in self.models()]
        return [*super().loaded(), *trunks, *([] if tokenizer is None else [tokenizer])]

    def _copy(self) -> Reward:
        made: Any = super()._copy()
        made._bound = None
        return made

    def encode(self, prompt: Prompt) -> list[list[int]]:
        return self._runtime.encode(prompt)

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        super().reserve(slots, length)
        self._runtime.reserve(slots, length, self.counter, undo)

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        self._runtime.admit(slot, encoded)

    def move(self, source: int, target: int) -> None:
        self._runtime.move(source, target)

    def use_slots(self, slots: Slots | None) -> None:
        self._runtime.slots = slots

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        runtime = self._runtime
        return scores_of(runtime.candidate_states(candidates), runtime.head).to(candidates.device)

    @property
    def fused(self) -> bool:
        # On a CPU the native engine computes the final norm within its one call.
        runtime = self._runtime
        on_gpu = runtime.final_norm is not None and runtime.runner.device.type == "cuda"
        return on_gpu and linear_part(runtime.head) is not None

    def sample(
        self,
        candidates: torch.Tensor,
        logprobs: torch.Tensor,
        beta: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm, head = self._runtime.final_norm, linear_part(self._runtime.head)
        if norm is None or head is None:
            return super().sample(candidates, logprobs, beta, temperature, seed, position)
        return score_and_sample(
            self._runtime.candidate_states(candidates, normed=False),
            norm.weight,
            *head,
            logprobs,
            beta,
            temperature,
            seed,
            position,
            norm.eps,
            norm.offset,
        )

    def commit(self, choice: torch.Tensor) -> None:
        self._runtime.commit(choice)

    @property
    def appends(self) -> bool:
        return not self._runtime.shared

    def append(self, slot: int, tokens: Sequence[int]) -> list[float]:
        runner = self._runtime.runner
        return runner.scores(runner.prefill(slot, tokens)).tolist()

    def roll_back(self, slot: int, count: int) -> None:
        runner = self._runtime.runner
        runner.roll_back(slot, runner.length(slot) - count)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        states, prompt = self._runtime.states(prefix, answer)
        return scores_of(states[prompt:], self._runtime.head).tolist()


class RADReward(SequenceReward):
    """g(v) = clamp(r(x, y_<i ∘ v), 0, 1), or 1 − that where the model scores what is unwanted.

    RAD (arXiv 2310.09520): a unidirectional reward model trained to give every prefix the final reward, and the top k
    as support. Costs what a `SequenceReward` costs.

    Args:
        model: as in `SequenceReward`.
        invert: rewards texts with a low score (of toxicity, for instance): 1 − clamp(r, 0, 1).
        settings: further arguments of `SequenceReward`.

    Example:
        >>> RADReward("path-or-hub-id", invert=True).invert
        True
    """

    def __init__(self, model: Any | ModelAndTokenizer, *, invert: bool = False, **settings: Any):
        super().__init__(model, **settings)
        self.invert = invert

    @property
    def name(self) -> str:
        return super().name.replace("SequenceReward", "RADReward", 1)

    @property
    def fused(self) -> bool:
        return False  # the reward is clamped before the draw

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        return self._clamped(super().score(candidates))

    def append(self, slot: int, tokens: Sequence[int]) -> list[float]:
        return self._clamped(torch.tensor(super().append(slot, tokens), dtype=torch.float64)).tolist()

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        return self._clamped(torch.tensor(super().score_answer(prefix, answer), dtype=torch.float64)).tolist()

    def _clamped(self, rewards: torch.Tensor) -> torch.Tensor:
        clamped = rewards.clamp(0, 1)
        return 1 - clamped if self.invert else clamped
