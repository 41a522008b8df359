"""A reward model whose vocabulary-sized head scores every next token at once: FaRMA."""

from __future__ import annotations

import torch

from rgtg_fast.rewards.causal_scorer import CausalScorer, Scores, Source, VocabularyScorer


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

    Raises:
        RGTGError: at binding: another tokenizer, a head whose width is not the vocabulary's, a model that cannot be
            cached.

    Example:
        >>> reward = VocabularyReward("path-or-hub-id")
        >>> decoder = RewardGuidedDecoder.from_pretrained("lm", reward=reward)  # doctest: +SKIP
        >>> decoder.generate("Hello", guidance=Guidance(k=10, support="combined"))  # doctest: +SKIP
    """

    def __init__(self, model: Source, chat_template: str | None = None, share_trunk: bool | None = None):
        super().__init__([CausalScorer(model, chat_template, share_trunk, type(self).__name__)])

    def guidance(self) -> torch.Tensor:
        return self._scorers[0].scores.logits

    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        return scores[0].at(tokens)
