"""Guides that know the reward of every token at once: causal language models that follow the decoder's rows."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.backbone import Backbone, Counter
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, language_backbone, load_vocabulary_model
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.ops import topk_logprobs
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.sequence import check_same_tokenizer

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


class Follower:
    """A causal language model with its own prefix cache that follows the decoder's rows.

    A step costs one forward of B tokens. It may have its own prompt format; the answer's tokens are the base model's.

    Args:
        source: path or hub id of an `AutoModelForCausalLM`, or a (model, tokenizer) pair.
        chat_template: Jinja chat template for its prompts; by default its own tokenizer's, and where that has none
            the base model's prompt ids.
        guide: class name of the guide that it serves, for messages.
    """

    def __init__(self, source: Source, chat_template: str | None, guide: str):
        self.source, self.chat_template, self.guide = source, chat_template, guide
        self.scores = Scores(torch.empty(0))
        self._backbone: Backbone | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lm: LanguageModel | None = None
        # Each slot's newest token, not yet in the cache.
        self._tokens = torch.zeros(0, dtype=torch.int64)

    def bind(self, lm: LanguageModel, dtype: torch.dtype | None, engine: str, max_length: int | None) -> None:
        """Loads the model and checks that its tokens are the base model's.

        Raises:
            RGTGError: another tokenizer, or a head whose width is not the vocabulary's.
        """
        model, tokenizer = load_vocabulary_model(self.source, lm.backbone.model, dtype)
        check_same_tokenizer(lm.tokenizer, tokenizer, lm.backbone.name, model.config._name_or_path)
        backbone = language_backbone(model, engine, max_length)
        width, base = backbone.head.out_features, lm.backbone.head.out_features
        named = lm.tokenizer is not None and tokenizer is not None
        # Models over one tokenizer pad their heads differently, which is harmless only where the tokenizer is known.
        used = min(len(lm.tokenizer), base) if lm.tokenizer is not None and named else base
        if width < used or (width != base and not named):
            raise RGTGError(
                f"the head of {backbone.name} gives {width} scores and the base model's vocabulary has {used} tokens: "
                f"{self.guide} needs a model with one score for every token of the base model"
            )
        lm.vocabulary = min(lm.vocabulary, width)
        self._backbone, self._tokenizer, self._lm = backbone, tokenizer, lm

    @property
    def backbone(self) -> Backbone:
        """The model and its cache."""
        if self._backbone is None:
            raise RGTGError(
                f"this {self.guide} belongs to no decoder yet: pass it to RewardGuidedDecoder.from_pretrained"
            )
        return self._backbone

    @property
    def vocabulary(self) -> int:
        """Tokens that may be chosen; another guide of a mixture may lower it after this one was bound."""
        assert self._lm is not None
        return self._lm.vocabulary

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's ids in this model's format."""
        assert self._lm is not None
        own = self._tokenizer
        if prompt.messages is not None and (own is None or not (self.chat_template or own.chat_template)):
            own = self._lm.tokenizer
        return prompt.ids(own or self._lm.tokenizer, self.chat_template)

    def reserve(self, slots: int, length: int, counter: Counter) -> None:
        """Makes room for `slots` rows of `length` tokens; `counter` counts from here on."""
        self.backbone.reserve(slots, length)
        self.backbone.counter = counter
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=self.backbone.device)

    def admit(self, slot: int, ids: list[int]) -> None:
        """A row enters: all but its last token are prefilled, so that every step costs one token a row."""
        self.backbone.clear(slot)
        self.backbone.prefill(slot, ids[:-1])
        self._tokens[slot] = ids[-1]

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""
        self.backbone.move(source, target)
        self._tokens[target] = self._tokens[source]

    def step(self, rows: int) -> None:
        """The scores of every next token of slots 0..rows-1."""
        newest = self._tokens[:rows]
        hidden = self.backbone.step(newest.unsqueeze(-1))
        self.backbone.commit(torch.zeros_like(newest))
        self.scores = Scores(self.backbone.logits(hidden.squeeze(1))[:, : self.vocabulary])

    def follow(self, tokens: torch.Tensor) -> None:
        """Tokens [B] have been decided."""
        self._tokens[: len(tokens)] = tokens

    def answer_scores(self, prompt: Prompt, answer: Sequence[int]) -> Scores:
        """Scores [n, V] before each token of a given answer, from one uncached forward."""
        ids = self.encode(prompt)
        hidden = self.backbone.hidden_uncached([*ids, *answer])[len(ids) - 1 : -1]
        return Scores(self.backbone.logits(hidden)[:, : self.vocabulary])


class WideReward(Reward):
    """A guide made of the vocabulary heads of one or several causal language models; a subclass says how.

    A step costs one forward of B tokens through each model, and the support may be "lm", "combined" or "all".
    """

    wide = True

    def __init__(self, followers: Sequence[Follower]):
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
        return f"{type(self).__name__}({', '.join(f.backbone.name for f in self._followers)})"

    @property
    def limit(self) -> int | None:
        return min(follower.backbone.limit for follower in self._followers)

    @property
    def engine(self) -> str | None:
        return self._followers[0].backbone.engine

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(follower.backbone.cache_bytes_per_token for follower in self._followers)

    def cache_bytes(self) -> int:
        return sum(follower.backbone.cache.nbytes() for follower in self._followers)

    def encode(self, prompt: Prompt) -> list[list[int]]:
        return [follower.encode(prompt) for follower in self._followers]

    def reserve(self, slots: int, length: int) -> None:
        super().reserve(slots, length)
        for follower in self._followers:
            follower.reserve(slots, length, self.counter)

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        for follower, ids in zip(self._followers, encoded, strict=True):
            follower.admit(slot, ids)

    def move(self, source: int, target: int) -> None:
        for follower in self._followers:
            follower.move(source, target)

    def observe(self, context_logits: torch.Tensor) -> None:
        # Until candidates are scored, a choice is a token id: the support is the whole vocabulary.
        self._candidates = None
        for follower in self._followers:
            follower.step(len(context_logits))

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        self._candidates = candidates
        return self.rewards_at([follower.scores for follower in self._followers], candidates)

    def commit(self, choice: torch.Tensor) -> None:
        tokens = choice
        if self._candidates is not None:
            tokens = self._candidates.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        for follower in self._followers:
            follower.follow(tokens)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        device = self._followers[0].backbone.device
        tokens = torch.tensor(list(answer), dtype=torch.int64, device=device).unsqueeze(-1)
        scores = [follower.answer_scores(prefix.prompt, answer) for follower in self._followers]
        return self.rewards_at(scores, tokens).squeeze(-1).tolist()
