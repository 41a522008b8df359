"""A causal reward model with a scalar head: PARGS and ARGS."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.backbone import Backbone
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, load_sequence_classifier, reward_backbone
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.rewards.base import Prefix, Reward

# Tokenised under both tokenizers to see that they split text alike, which equal vocabularies do not promise.
_PROBE = "Human: Is 1,234.5 °C hot?\n\nAssistant: Yes — it's  HOT, naïve friend! 你好 🙂"


class SequenceReward(Reward):
    """r(x, y_<i ∘ v): a causal model's scalar head at the candidate's own position, the candidate being the last token.

    PARGS (arXiv 2406.07780) with a model trained on partial sequences, ARGS (arXiv 2402.01694) with one trained on
    full sequences: the same call. A step costs one forward of B·k tokens over one shared prefix cache.

    Args:
        model: path or hub id of an `AutoModelForSequenceClassification` with one label, or a (model, tokenizer) pair.
        chat_template: Jinja chat template for the reward model's prompts; by default its own tokenizer's, and
            where that has none the base model's prompt ids. Answer ids are shared with the base model.

    Raises:
        RGTGError: at binding: several labels, no trained head, another tokenizer, a model that cannot be cached.
    """

    def __init__(self, model: str | os.PathLike[str] | ModelAndTokenizer, chat_template: str | None = None):
        super().__init__()
        self.source = model
        self.chat_template = chat_template
        self.backbone: Backbone | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lm: LanguageModel | None = None

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        model, tokenizer = load_sequence_classifier(self.source, lm.backbone.model, dtype)
        check_same_tokenizer(lm.tokenizer, tokenizer, lm.backbone.name, model.config._name_or_path)
        self.backbone = reward_backbone(model, engine, max_length)
        self._tokenizer, self._lm = tokenizer, lm
        embeddings = self.backbone.embeddings
        used = lm.vocabulary if lm.tokenizer is None else min(len(lm.tokenizer), lm.vocabulary)
        if embeddings < used:
            raise RGTGError(
                f"the reward model {self.name} embeds {embeddings} tokens and the base model uses {used}: "
                "use a reward model with the same vocabulary, or TextReward(...)"
            )
        lm.vocabulary = min(lm.vocabulary, embeddings)

    @property
    def _bound(self) -> Backbone:
        if self.backbone is None:
            raise RGTGError(
                "this SequenceReward belongs to no decoder yet: pass it to RewardGuidedDecoder.from_pretrained"
            )
        return self.backbone

    @property
    def name(self) -> str:
        return f"SequenceReward({self._bound.name})"

    @property
    def limit(self) -> int | None:
        return self._bound.limit

    @property
    def engine(self) -> str | None:
        return self._bound.engine

    @property
    def cache_bytes_per_token(self) -> int:
        return self._bound.cache_bytes_per_token

    def cache_bytes(self) -> int:
        return self._bound.cache.nbytes()

    def encode(self, prompt: Prompt) -> list[list[int]]:
        assert self._lm is not None
        own = self._tokenizer
        if prompt.messages is not None and (own is None or not (self.chat_template or own.chat_template)):
            own = self._lm.tokenizer
        return [prompt.ids(own or self._lm.tokenizer, self.chat_template)]

    def reserve(self, slots: int, length: int) -> None:
        self._bound.reserve(slots, length)
        self.counter = self._bound.counter

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        self._bound.clear(slot)
        self._bound.prefill(slot, encoded[0])

    def move(self, source: int, target: int) -> None:
        self._bound.move(source, target)

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        backbone = self._bound
        return backbone.scores(backbone.step(candidates))

    def commit(self, choice: torch.Tensor) -> None:
        self._bound.commit(choice)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        prompt_ids = self.encode(prefix.prompt)[0]
        hidden = self._bound.hidden_uncached([*prompt_ids, *answer])
        return self._bound.scores(hidden[len(prompt_ids) :]).tolist()


def check_same_tokenizer(
    lm: PreTrainedTokenizerBase | None, rm: PreTrainedTokenizerBase | None, lm_name: str, rm_name: str
) -> None:
    """Refuses a reward model whose tokenizer gives the base model's tokens other ids.

    Raises:
        RGTGError: naming the first difference.
    """
    if lm is None or rm is None or lm is rm:
        return
    way_out = "use a reward model over the same tokenizer, or reward=TextReward(...)"
    theirs = rm.get_vocab()
    for token, index in sorted(lm.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            raise RGTGError(
                f"the tokenizers of {lm_name} and {rm_name} differ: token {index} is {token!r} in the first and "
                f"{token!r} has id {theirs.get(token)} in the second; {way_out}"
            )
    if lm(_PROBE, add_special_tokens=False)["input_ids"] != rm(_PROBE, add_special_tokens=False)["input_ids"]:
        raise RGTGError(
            f"the tokenizers of {lm_name} and {rm_name} split the same text differently; {way_out}"
        )
