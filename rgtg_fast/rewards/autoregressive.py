"""A language model whose log-probabilities are the reward: GenARM."""

from __future__ import annotations

import torch

from rgtg_fast.rewards.causal_scorer import CausalScorer, Scores, Source, VocabularyScorer


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

    Raises:
        RGTGError: at binding: another tokenizer, a head whose width is not the vocabulary's, a model that cannot be
            cached.

    Example:
        >>> reward = AutoregressiveReward("path-or-hub-id")
        >>> decoder = RewardGuidedDecoder.from_pretrained("lm", reward=reward)  # doctest: +SKIP
        >>> decoder.generate("Hello", guidance=Guidance(beta=1.0, support="all"))  # doctest: +SKIP
    """

    additive = True

    def __init__(self, model: Source, chat_template: str | None = None, share_trunk: bool | None = None):
        super().__init__([CausalScorer(model, chat_template, share_trunk, type(self).__name__)])

    def guidance(self) -> torch.Tensor:
        scores = self._scorers[0].scores
        return scores.logits - scores.log_sum_exp

    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        return scores[0].logprobs_at(tokens)
