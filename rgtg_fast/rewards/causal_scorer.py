"""Guides that know the reward of every token at once: causal language models that follow the decoder's rows."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    adapter_model,
    language_runner,
    load_vocabulary_model,
)
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.runner import Attached, Counter, ModelRunner
from rgtg_fast.ops import topk_logprobs
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.compatibility import check_same_tokenizer, guide_ids, place_adapter

Source = str | os.PathLike[str] | ModelAndTokenizer


class Scores:
    """Logits [N, V] of a vocabulary head; their log-sum-exp is computed once, and only where somebody asks for it."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits
        self._log_sum_exp: torch.Tensor | None = None

    @property
    def log_sum_exp(self) -> torch.Tensor:
        """[N, 1] in at least float32."""
        if self._log_sum_exp is None:
            # The one-pass top-k knows it: no vocabulary-sized tensor is written.
            logprob, top, _ = topk_logprobs(self.logits, 1)
            self._log_sum_exp = self.logits.gather(-1, top) - logprob
        return self._log_sum_exp

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, k] of tokens [N, k] in at least float32."""
        logits = self.logits.gather(-1, tokens)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logprobs_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, k] of tokens [N, k]."""
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
        guide: class name of the guide that it serves, for messages.
    """

    def __init__(self, source: Source, chat_template: str | None, share_trunk: bool | None, guide: str):
        self.source, self.chat_template = source, chat_template
        self.share_trunk, self.guide = share_trunk, guide
        self.scores = Scores(torch.empty(0))
        self._title, self.trunk = "", ""
        self.counter = Counter()
        # The model of its own, or its place in the base model's forward.
        self.runner: ModelRunner | None = None
        self._attached: Attached | None = None
        self._head: nn.Linear | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lm: LanguageModel | None = None
        # Each slot's newest token, not yet in the cache; -1 where there is none.
        self._tokens = torch.zeros(0, dtype=torch.int64)

    def bind(self, lm: LanguageModel, dtype: torch.dtype | None, engine: str, max_length: int | None) -> None:
        """Loads the model and checks that its tokens are the base model's.

        Raises:
            RGTGError: another tokenizer, a head whose width is not the vocabulary's, or with `share_trunk=True` an
                adapter that cannot share the base model's forward.
        """
        self._lm, self.runner, self._attached = lm, None, None
        if isinstance(self.source, (str, os.PathLike)) and is_adapter(self.source):
            model = self._bind_adapter(lm, Adapter.load(self.source), dtype)
        elif self.share_trunk:
            raise RGTGError(
                f"share_trunk=True and {self.source!r} is no adapter folder: only an adapter shares the base model"
            )
        else:
            model, self._tokenizer = load_vocabulary_model(self.source, lm.runner.model, dtype)
            check_same_tokenizer(lm.tokenizer, self._tokenizer, lm.runner.name, model.config._name_or_path)
            self.trunk = "a model of its own"
        if model is not None:
            self.runner = language_runner(model, engine, max_length)
            self._head, self._title = self.runner.head, self.runner.name
        assert self._head is not None
        self._check_width(lm, self._head.out_features)
        lm.vocabulary = min(lm.vocabulary, self._head.out_features)

    def _bind_adapter(
        self, lm: LanguageModel, adapter: Adapter, dtype: torch.dtype | None
    ) -> PreTrainedModel | None:
        """Attaches an adapter to the base model; a model of its own where it cannot share the forward."""
        self._tokenizer, why = place_adapter(adapter, lm, self.chat_template, self.share_trunk)
        self._title = adapter.name
        if why is None:
            head = adapter.head or lm.runner.head
            self._check_width(lm, head.out_features)
            self._attached = lm.runner.attach(adapter, scores_candidates=False)
            self._head = head.to(lm.runner.device, lm.runner.dtype)
            self.trunk = "the base model's"
            return None
        # Its head, whatever name it was saved under, takes the vocabulary head's place.
        causal = replace(adapter, head_name="lm_head")
        model, _ = adapter_model(causal, (lm.runner.model, lm.tokenizer), dtype)
        self.trunk = f"a model of its own, the adapter merged into a copy of its base ({why})"
        return model

    def _check_width(self, lm: LanguageModel, width: int) -> None:
        """Refuses a head that does not have one score for each of the base model's tokens."""
        base = lm.runner.head.out_features
        named = lm.tokenizer is not None and self._tokenizer is not None
        # Models over one tokenizer pad their heads differently, which is harmless only where the tokenizer is known.
        used = min(len(lm.tokenizer), base) if lm.tokenizer is not None and named else base
        if width < used or (width != base and not named):
            raise RGTGError(
                f"the head of {self.name} gives {width} scores and the base model's vocabulary has {used} tokens: "
                f"{self.guide} needs a model with one score for every token of the base model"
            )

    def copy(self) -> CausalScorer:
        """Another one with the same settings, bound to nothing."""
        return CausalScorer(self.source, self.chat_template, self.share_trunk, self.guide)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's own, where it came with one."""
        return self._tokenizer

    @property
    def name(self) -> str:
        """The model's path or hub id, or the adapter's folder."""
        return self._title or self.model.name

    @property
    def model(self) -> ModelRunner:
        """The model that runs it: its own, or the base model."""
        if self._lm is None:
            raise RGTGError(
                f"this {self.guide} belongs to no decoder yet: pass it to RewardGuidedDecoder.from_pretrained"
            )
        return self.runner or self._lm.runner

    def encode(self, prompt: Prompt) -> list[list[int]]:
        """The prompt's ids in this model's format; none where it shares the base model's."""
        assert self._lm is not None
        if self._attached is not None:
            return []
        assert self.runner is not None
        return [guide_ids(prompt, self._lm.tokenizer, self._tokenizer, self.chat_template, self.runner)]

    def reserve(self, slots: int, length: int, counter: Counter) -> None:
        """Makes room for `slots` rows of `length` tokens; `counter` counts from here on."""
        self.counter = counter
        if self.runner is not None:
            self.runner.reserve(slots, length)
            self.runner.counter = counter
            if len(self._tokens) < slots or self._tokens.device != self.runner.device:
                self._tokens = torch.zeros(slots, dtype=torch.int64, device=self.runner.device)
            self._tokens.fill_(-1)

    def admit(self, slot: int, prefix: Prefix, ids: list[int]) -> None:
        """A row enters: all but its last token are prefilled, so that every step costs one token a row."""
        if self.runner is not None:
            self.runner.begin(slot, ids[:-1])
            self._tokens[slot].fill_(ids[-1])
        elif self._attached is not None and self._own_rows:
            self.counter.prompt_tokens += self._attached.encoded(slot)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""
        if self.runner is not None:
            self.runner.move(source, target)
            self._tokens[target] = self._tokens[source]

    def step(self, rows: int) -> None:
        """The scores of every next token of slots 0..rows-1."""
        assert self._head is not None
        if self.runner is not None:
            newest = self._tokens[:rows]
            states = self.runner.step(newest.clamp_min(0).unsqueeze(-1)).squeeze(1)
            # The one token of the step, or -1: a row that has ended stands still.
            self.runner.commit(newest.clamp_max(0))
        else:
            assert self._attached is not None
            states = self._attached.newest()
            # With shared_forward, another guide's candidates are what runs: see `score`.
            self.counter.tokens += rows if self._own_rows and not self.model.shared_forward else 0
        self.scores = self._scores(states)

    def ran(self, candidates: torch.Tensor) -> None:
        """Candidates [B, k] have been scored: a forward with shared_forward ran all of them."""
        if self.runner is None and self._own_rows and self.model.shared_forward:
            self.counter.tokens += candidates.numel()

    def follow(self, tokens: torch.Tensor) -> None:
        """Tokens [B] have been decided; -1: the row has ended."""
        if self.runner is not None:
            self._tokens[: len(tokens)] = tokens

    @property
    def newest(self) -> torch.Tensor:
        """Each slot's newest token [slots], not yet in the cache; -1 where there is none."""
        return self._tokens

    def answer_scores(self, prefix: Prefix, answer: Sequence[int]) -> Scores:
        """Scores [n, V] before each token of a given answer, from one uncached forward."""
        if self.runner is not None:
            (ids,) = self.encode(prefix.prompt)
            hidden = self.runner.hidden_uncached([*ids, *answer])
        else:
            assert self._attached is not None
            ids = prefix.prompt_ids
            hidden = self._attached.hidden_uncached([*ids, *answer])
        return self._scores(hidden[len(ids) - 1 : -1])

    @property
    def _own_rows(self) -> bool:
        """Whether a forward that it shares runs rows for it: a head on the frozen base model needs none."""
        return self._attached is not None and self._attached.variant > 0

    def _scores(self, states: torch.Tensor) -> Scores:
        # Another guide of a mixture may have lowered the vocabulary after this one was bound.
        assert self._lm is not None
        assert self._head is not None
        return Scores(self.model.layers.logits(states, self._head)[:, : self._lm.vocabulary])


class VocabularyScorer(Reward):
    """A guide made of the vocabulary heads of one or several causal language models; a subclass says how.

    A step costs one forward of B tokens through each model, or none of its own where it is an adapter that shares the
    base model's. The support may be "lm", "combined" or "all".
    """

    on_device = True
    wide = True

    def __init__(self, followers: Sequence[CausalScorer]):
        super().__init__()
        self._followers = list(followers)
        self._candidates: torch.Tensor | None = None

    @abstractmethod
    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        """Rewards [N, k] of tokens [N, k] from each model's scores."""

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        for follower in self._followers:
            follower.bind(lm, dtype, engine, max_length)

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({', '.join(follower.name for follower in self._followers)})"

    @property
    def limit(self) -> int | None:
        return min(follower.model.limit for follower in self._followers)

    @property
    def engine(self) -> str | None:
        return self._followers[0].model.engine

    @property
    def trunk(self) -> str | None:
        return "; ".join(follower.trunk for follower in self._followers)

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(runner.cache_bytes_per_token for runner in self.models())

    def cache_bytes(self) -> int:
        return sum(runner.cache.nbytes() for runner in self.models())

    def models(self) -> list[ModelRunner]:
        return [follower.runner for follower in self._followers if follower.runner is not None]

    def loaded(self) -> list[object]:
        tokenizers = [follower.tokenizer for follower in self._followers if follower.tokenizer is not None]
        return [*super().loaded(), *tokenizers]

    def _copy(self) -> Reward:
        made: Any = super()._copy()
        made._followers = [follower.copy() for follower in self._followers]
        return made

    def step_state(self) -> list[torch.Tensor]:
        return [follower.newest for follower in self._followers if follower.runner is not None]

    def encode(self, prompt: Prompt) -> list[list[int]]:
        return [ids for follower in self._followers for ids in follower.encode(prompt)]

    def reserve(self, slots: int, length: int) -> None:
        super().reserve(slots, length)
        for follower in self._followers:
            follower.reserve(slots, length, self.counter)

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        own = iter(encoded)
        for follower in self._followers:
            follower.admit(slot, prefix, [] if follower.runner is None else next(own))

    def move(self, source: int, target: int) -> None:
        for follower in self._followers:
            follower.move(source, target)

    def begin_step(self, context_logits: torch.Tensor) -> None:
        # Until candidates are scored, a choice is a token id: the support is the whole vocabulary.
        self._candidates = None
        for follower in self._followers:
            follower.step(len(context_logits))

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        self._candidates = candidates
        for follower in self._followers:
            follower.ran(candidates)
        return self.rewards_at([follower.scores for follower in self._followers], candidates)

    def commit(self, choice: torch.Tensor) -> None:
        tokens = choice
        if self._candidates is not None:
            tokens = self._candidates.gather(-1, choice.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            tokens = tokens.masked_fill(choice < 0, -1)
        for follower in self._followers:
            follower.follow(tokens)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        device = self._followers[0].model.device
        tokens = torch.tensor(list(answer), dtype=torch.int64, device=device).unsqueeze(-1)
        scores = [follower.answer_scores(prefix, answer) for follower in self._followers]
        return self.rewards_at(scores, tokens).squeeze(-1).tolist()
