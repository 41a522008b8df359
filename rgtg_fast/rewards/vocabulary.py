"""Rewards of every token at once, from the vocabulary heads of causal language models: FaRMA, GenARM, EFT."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    adapter_model,
    language_runner,
    load_vocabulary_model,
)
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.quantized import round_weights
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.ops import topk_logprobs
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.compatibility import (
    check_rounding,
    check_same_tokenizer,
    place_adapter,
    unbound,
)
from rgtg_fast.rewards.runtime import RewardRuntime, SharedForward, own_model

Source = str | os.PathLike[str] | ModelAndTokenizer


class Scores:
    """Logits [N, V] of a vocabulary head; their log-sum-exp is computed once, at its first use."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits
        self._log_sum_exp: torch.Tensor | None = None

    @property
    def log_sum_exp(self) -> torch.Tensor:
        """[N, 1] in at least float32."""
        if self._log_sum_exp is None:
            # The one-pass top-k computes it: no vocabulary-sized tensor is written.
            logprob, top, _ = topk_logprobs(self.logits, 1)
            self._log_sum_exp = self.logits.gather(-1, top) - logprob
        return self._log_sum_exp

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] of tokens [N, K] in at least float32."""
        logits = self.logits.gather(-1, tokens)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logprobs_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, K] of tokens [N, K]."""
        return self.at(tokens) - self.log_sum_exp


class CausalScorer:
    """A causal language model that follows the decoder's rows: with a prefix cache of its own, at one forward of B
    tokens a step, or, as an adapter on the base model, within the base model's own forward.

    It may have its own prompt format; the answer's tokens are the base model's.

    Args:
        source: path or hub id of an `AutoModelForCausalLM`, a folder with a LoRA adapter in PEFT's format, or a
            (model, tokenizer) pair.
        chat_template: Jinja chat template for its prompts; by default its own tokenizer's, and where that has none
            the base model's prompt ids.
        share_trunk: as in `SequenceReward`.
        reward: class name of the reward that it belongs to, for messages.
        trust_remote_code: whether code that comes with this model may run.
        weights: as in `SequenceReward`.

    Attributes:
        scores: scores of the step that has begun.
    """

    def __init__(
        self,
        source: Source,
        chat_template: str | None,
        share_trunk: bool | None,
        reward: str,
        trust_remote_code: bool = False,
        weights: str | None = None,
    ):
        check_rounding(weights, source, share_trunk)
        self.weights = weights
        self.source, self.chat_template, self.trust_remote_code = source, chat_template, trust_remote_code
        self.share_trunk, self.reward = share_trunk, reward
        self.scores = Scores(torch.empty(0))
        self._bound: tuple[LanguageModel, RewardRuntime] | None = None

    def bind(self, lm: LanguageModel, dtype: torch.dtype | None, engine: str, max_length: int | None) -> None:
        """Loads the model and checks that its tokens are the base model's.

        Raises:
            RGTGError: another tokenizer, a head whose width is not the vocabulary's, or with `share_trunk=True` an
                adapter that cannot share the base model's forward.
        """
        self._bound = None
        runtime = self._loaded(lm, dtype, engine, max_length)
        lm.vocabulary = min(lm.vocabulary, runtime.head.out_features)
        self._bound = lm, runtime

    def _loaded(
        self, lm: LanguageModel, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> RewardRuntime:
        if isinstance(self.source, (str, os.PathLike)) and is_adapter(self.source):
            adapter = Adapter.load(self.source)
            tokenizer, why = place_adapter(adapter, lm, self.chat_template, self.share_trunk, self.weights)
            if why is None:
                head = adapter.head or lm.runner.head
                self._check_width(lm, tokenizer, head, adapter.name)
                head = head.to(lm.runner.device, lm.runner.dtype)
                return SharedForward(lm, adapter, head, tokenizer, "the base model's")
            # Its head, whatever name it was saved under, takes the vocabulary head's place.
            causal = replace(adapter, head_name="lm_head")
            model, _ = adapter_model(causal, lm.pair(), dtype, lm.reward_device)
            trunk = f"a model of its own, the adapter merged into a copy of its base ({why})"
        elif self.share_trunk:
            raise RGTGError(
                f"share_trunk=True and {self.source!r} is not an adapter folder: only an adapter shares the base model"
            )
        else:
            model, tokenizer = load_vocabulary_model(
                self.source, lm.runner, dtype, self.trust_remote_code, lm.reward_device
            )
            check_same_tokenizer(lm.tokenizer, tokenizer, lm.runner.name, model.config._name_or_path)
            trunk = "a model of its own"
        round_weights(model, self.weights, engine)
        runtime = own_model(
            language_runner(model, engine, max_length), lm, tokenizer, self.chat_template, trunk
        )
        self._check_width(lm, tokenizer, runtime.head, runtime.name)
        return runtime

    def _check_width(
        self, lm: LanguageModel, tokenizer: PreTrainedTokenizerBase | None, head: nn.Linear, name: str
    ) -> None:
        """Refuses a head that does not have one score for each of the base model's tokens."""
        base, width = lm.runner.head.out_features, head.out_features
        named = lm.tokenizer is not None and tokenizer is not None
        # Models over one tokenizer pad their heads differently, which is harmless only where the tokenizer is known.
        used = min(len(lm.tokenizer), base) if lm.tokenizer is not None and named else base
        if width < used or (width != base and not named):
            raise RGTGError(
                f"the head of {name} gives {width} scores and the base model's vocabulary has {used} tokens: "
                f"{self.reward} needs a model with one score for every token of the base model"
            )

    def copy(self) -> CausalScorer:
        """An unbound copy with the same settings."""
        return CausalScorer(
            self.source,
            self.chat_template,
            self.share_trunk,
            self.reward,
            self.trust_remote_code,
            self.weights,
        )

    @property
    def runtime(self) -> RewardRuntime:
        """Where it is executed."""
        if self._bound is None:
            raise unbound(self.reward)
        return self._bound[1]

    def models(self) -> list[ModelRunner]:
        """The model of its own, where it has one."""
        return [] if self._bound is None else self.runtime.models()

    def step(self, rows: int) -> None:
        """Computes `scores` of every next token of slots 0..rows-1."""
        self.scores = self._scores(self.runtime.next_states(rows))

    def answer_scores(self, prefix: Prefix, answer: Sequence[int]) -> Scores:
        """Scores [n, V] before each token of a given answer, from one uncached forward."""
        states, prompt = self.runtime.states(prefix, answer)
        return self._scores(states[prompt - 1 : -1])

    def _scores(self, states: torch.Tensor) -> Scores:
        assert self._bound is not None
        lm, runtime = self._bound
        # Another part of a mixture may have lowered the vocabulary after this one was bound.
        logits = runtime.runner.logits(states, runtime.head)[:, : lm.vocabulary]
        return Scores(logits.to(lm.runner.device))


class VocabularyScorer(Reward):
    """A reward made of the vocabulary heads of one or several causal language models; a subclass says how.

    A step costs one forward of B tokens through each model, or none of its own where it is an adapter that shares the
    base model's. The support may be "lm", "combined" or "all".
    """

    on_device = True
    scores_vocabulary = True

    def __init__(self, scorers: Sequence[CausalScorer]):
        super().__init__()
        self._scorers = list(scorers)
        self._candidates: torch.Tensor | None = None

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with its models may run; settable before it is bound."""
        return all(scorer.trust_remote_code for scorer in self._scorers)

    @trust_remote_code.setter
    def trust_remote_code(self, value: bool) -> None:
        for scorer in self._scorers:
            scorer.trust_remote_code = value

    @property
    def weights(self) -> str | None:
        """As in `SequenceReward`, for all its models; settable before it is bound."""
        return self._scorers[0].weights

    @weights.setter
    def weights(self, value: str | None) -> None:
        for scorer in self._scorers:
            scorer.weights = value

    @abstractmethod
    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        """Rewards [N, K] of tokens [N, K] from each model's scores."""

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        for scorer in self._scorers:
            scorer.bind(lm, dtype, engine, max_length)

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({', '.join(scorer.runtime.name for scorer in self._scorers)})"

    @property
    def limit(self) -> int | None:
        return min(scorer.runtime.runner.limit for scorer in self._scorers)

    @property
    def engine(self) -> str | None:
        return self._scorers[0].runtime.runner.engine

    @property
    def trunk(self) -> str | None:
        return "; ".join(scorer.runtime.trunk for scorer in self._scorers)

    def row_bytes(self, length: int, undo: int = 0) -> int:
        return sum(runner.cache.row_bytes(length, undo) for runner in self.models())

    def cache_bytes(self) -> int:
        return sum(runner.cache.nbytes() for runner in self.models())

    def models(self) -> list[ModelRunner]:
        return [model for scorer in self._scorers for model in scorer.models()]

    def loaded(self) -> list[object]:
        tokenizers = [scorer.runtime.tokenizer for scorer in self._scorers]
        return [*super().loaded(), *(each for each in tokenizers if each is not None)]

    def _copy(self) -> Reward:
        made: Any = super()._copy()
        made._scorers = [scorer.copy() for scorer in self._scorers]
        return made

    def step_state(self) -> list[torch.Tensor]:
        return [state for scorer in self._scorers for state in scorer.runtime.step_state()]

    def encode(self, prompt: Prompt) -> list[list[int]]:
        return [ids for scorer in self._scorers for ids in scorer.runtime.encode(prompt)]

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        super().reserve(slots, length)
        for scorer in self._scorers:
            scorer.runtime.reserve(slots, length, self.counter, undo)

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        first = 0
        for scorer in self._scorers:
            last = first + scorer.runtime.prompt_contexts
            scorer.runtime.admit_for_next(slot, encoded[first:last])
            first = last

    def move(self, source: int, target: int) -> None:
        for scorer in self._scorers:
            scorer.runtime.move(source, target)

    def use_slots(self, slots: Slots | None) -> None:
        for scorer in self._scorers:
            scorer.runtime.slots = slots

    def follow(self, tokens: torch.Tensor) -> None:
        self.commit(tokens)

    def begin_step(self, context_logits: torch.Tensor) -> None:
        # Until candidates are scored, a choice is a token id: the support is the whole vocabulary.
        self._candidates = None
        for scorer in self._scorers:
            scorer.step(len(context_logits))

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        self._candidates = candidates
        for scorer in self._scorers:
            scorer.runtime.count_candidates(candidates)
        return self.rewards_at([scorer.scores for scorer in self._scorers], candidates)

    def commit(self, choice: torch.Tensor) -> None:
        tokens = choice
        if self._candidates is not None:
            tokens = self._candidates.gather(-1, choice.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            tokens = tokens.masked_fill(choice < 0, -1)
        for scorer in self._scorers:
            scorer.runtime.accept(tokens)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        scores = [scorer.answer_scores(prefix, answer) for scorer in self._scorers]
        device = scores[0].logits.device
        tokens = torch.tensor(list(answer), dtype=torch.int64, device=device).unsqueeze(-1)
        return self.rewards_at(scores, tokens).squeeze(-1).tolist()


class VocabularyReward(VocabularyScorer):
    """g(v) = head(h(x, y_<i))[v]: a causal model whose head gives the reward of every next token at once.

    FaRMA (arXiv 2502.04517). A step costs one forward of B tokens instead of the B·K of a `SequenceReward`. The
    published decoders are `Guidance(k=10, beta=1, support="combined")` and `Guidance(beta=1.8, support="all")`. The
    reward of a whole answer is that of its last token, head(h(x, y_<n))[y_n].

    Args:
        model: path or hub id of an `AutoModelForCausalLM` whose head was trained as a reward, a folder with a LoRA
            adapter and its vocabulary-sized head in PEFT's format, or a (model, tokenizer) pair.
        chat_template: Jinja chat template for the reward model's prompts; by default its own tokenizer's, and
            where that has none the base model's prompt ids.
        share_trunk: whether an adapter runs in the base model's own forward, as in `SequenceReward`.
        trust_remote_code: whether code that comes with this model may run; never that of an adapter's base.
        weights: as in `SequenceReward`.

    Raises:
        RGTGError: at binding: another tokenizer, a head whose width is not the vocabulary's, a model that cannot be
            cached.

    Example:
        >>> reward = VocabularyReward("path-or-hub-id")
        >>> decoder = RewardGuidedDecoder.from_pretrained("lm", reward=reward)  # doctest: +SKIP
        >>> decoder.generate("Hello", guidance=Guidance(k=10, support="combined"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Source,
        chat_template: str | None = None,
        share_trunk: bool | None = None,
        trust_remote_code: bool = False,
        weights: str | None = None,
    ):
        name = type(self).__name__
        super().__init__([CausalScorer(model, chat_template, share_trunk, name, trust_remote_code, weights)])

    def guidance(self) -> torch.Tensor:
        return self._scorers[0].scores.logits

    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        return scores[0].at(tokens)


class AutoregressiveReward(VocabularyScorer):
    """g(v) = log π_r(v | x, y_<i): the log-probability of an autoregressive reward model.

    GenARM (arXiv 2410.08193), there with the whole vocabulary as support: `Guidance(beta=1/β_r, support="all")`.
    Several reward models with weights α_i are a `MixtureReward` of these. A step costs one forward of B tokens. The
    reward of a whole answer is the sum over its tokens, log π_r(y | x).

    Args:
        model: path or hub id of an `AutoModelForCausalLM`, a folder with a LoRA adapter in PEFT's format, or a
            (model, tokenizer) pair.
        chat_template: Jinja chat template for the reward model's prompts; by default its own tokenizer's, and
            where that has none the base model's prompt ids.
        share_trunk: whether an adapter runs in the base model's own forward, as in `SequenceReward`.
        trust_remote_code: whether code that comes with this model may run; never that of an adapter's base.
        weights: as in `SequenceReward`.

    Raises:
        RGTGError: at binding: another tokenizer, a head whose width is not the vocabulary's, a model that cannot be
            cached.

    Example:
        >>> reward = AutoregressiveReward("path-or-hub-id")
        >>> decoder = RewardGuidedDecoder.from_pretrained("lm", reward=reward)  # doctest: +SKIP
        >>> decoder.generate("Hello", guidance=Guidance(beta=1.0, support="all"))  # doctest: +SKIP
    """

    additive = True

    def __init__(
        self,
        model: Source,
        chat_template: str | None = None,
        share_trunk: bool | None = None,
        trust_remote_code: bool = False,
        weights: str | None = None,
    ):
        name = type(self).__name__
        super().__init__([CausalScorer(model, chat_template, share_trunk, name, trust_remote_code, weights)])

    def guidance(self) -> torch.Tensor:
        scores = self._scorers[0].scores
        return scores.logits - scores.log_sum_exp

    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        return scores[0].logprobs_at(tokens)


class LogRatioReward(VocabularyScorer):
    """g(v) = log π_tuned(v | x, y_<i) − log π_untuned(v | x, y_<i): what tuning changed in a small model.

    Emulated fine-tuning (arXiv 2310.12962) and proxy tuning (arXiv 2401.08565): with β = 1 and the whole vocabulary as
    support, the base model behaves as if it had been tuned too. A step costs one forward of B tokens through each of
    the two. The reward of a whole answer is the sum over its tokens, the log-ratio of the answer.

    Args:
        tuned: path or hub id of an `AutoModelForCausalLM`, a folder with a LoRA adapter in PEFT's format, or a
            (model, tokenizer) pair.
        untuned: the same.
        tuned_template: Jinja chat template for its prompts; by default its own tokenizer's, and where that has none
            the base model's prompt ids.
        untuned_template: the same.
        trust_remote_code: whether code that comes with the two models may run; never that of an adapter's base.
        weights: as in `SequenceReward`, for both.

    Raises:
        RGTGError: at binding: another tokenizer, a head whose width is not the vocabulary's, a model that cannot be
            cached.

    Example:
        >>> reward = LogRatioReward("tuned", "untuned")
        >>> decoder = RewardGuidedDecoder.from_pretrained("lm", reward=reward)  # doctest: +SKIP
        >>> decoder.generate("Hello", guidance=Guidance(beta=1.0, support="all"))  # doctest: +SKIP
    """

    additive = True

    def __init__(
        self,
        tuned: Source,
        untuned: Source,
        tuned_template: str | None = None,
        untuned_template: str | None = None,
        trust_remote_code: bool = False,
        weights: str | None = None,
    ):
        name = type(self).__name__
        super().__init__(
            [
                CausalScorer(tuned, tuned_template, None, name, trust_remote_code, weights),
                CausalScorer(untuned, untuned_template, None, name, trust_remote_code, weights),
            ]
        )

    def guidance(self) -> torch.Tensor:
        tuned, untuned = (scorer.scores for scorer in self._scorers)
        constant = tuned.log_sum_exp - untuned.log_sum_exp
        return (tuned.logits.to(constant.dtype) - untuned.logits).sub_(constant)

    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        return scores[0].logprobs_at(tokens) - scores[1].logprobs_at(tokens)
