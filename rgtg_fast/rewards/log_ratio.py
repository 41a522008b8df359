"""The log-ratio of a tuned and an untuned small model: emulated fine-tuning, proxy tuning."""

from __future__ import annotations

import torch

from rgtg_fast.rewards.causal_scorer import CausalScorer, Scores, Source, VocabularyScorer


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
    ):
        name = type(self).__name__
        super().__init__(
            [
                CausalScorer(tuned, tuned_template, None, name),
                CausalScorer(untuned, untuned_template, None, name),
            ]
        )

    def guidance(self) -> torch.Tensor:
        tuned, untuned = (scorer.scores for scorer in self._scorers)
        constant = tuned.log_sum_exp - untuned.log_sum_exp
        return (tuned.logits.to(constant.dtype) - untuned.logits).sub_(constant)

    def rewards_at(self, scores: list[Scores], tokens: torch.Tensor) -> torch.Tensor:
        return scores[0].logprobs_at(tokens) - scores[1].logprobs_at(tokens)
