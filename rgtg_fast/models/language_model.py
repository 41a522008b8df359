"""The base language model as the decoder sees it: backbone, tokenizer, end-of-sequence ids, vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rgtg_fast.models.runner import ModelRunner


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        backbone: the model and its prefix cache.
        tokenizer: None for a model given without one; prompts are token ids then.
        vocabulary: number of tokens that may be chosen (V); a reward model with fewer embeddings lowers it.
    """

    runner: ModelRunner
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer: the generation config's, else the tokenizer's."""
        config: Any = self.runner.model.generation_config
        ids = None if config is None else config.eos_token_id
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset(map(int, ids if isinstance(ids, list) else [ids]))

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of answer tokens, with the special ones among them or without; without a tokenizer, the ids."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        if special:
            # Some tokenizers would put spaces around special tokens, which no model has written.
            return str(self.tokenizer.decode(list(tokens), spaces_between_special_tokens=False))
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """One token as it stands in the text, special tokens included."""
        return str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))
