"""Contrastive prompts: the base model under a better instruction against itself under a worse one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.kv_cache import Slots
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.ops import topk_logprobs
from rgtg_fast.rewards.base import Prefix, Reward

BETTER = (
    "You are a thoughtful expert. Answer helpfully, correctly and politely, with concrete and well-ordered advice, "
    "and never suggest anything harmful."
)
WORSE = (
    "You are careless and rude. Answer unhelpfully, wrongly and vaguely, and ignore what the person needs."
)


class ContrastiveReward(Reward):
    """g(v) = log π(v | x_better, y_<i) − log π(v | x_worse, y_<i), from the base model itself and no training.

    x_better and x_worse are the prompt under two system instructions (token-level contrastive prompting as in T-REG,
    arXiv 2412.02685, with our own wording). Two more rows per prompt in the base model's batch, no second model. The
    answer's reward is the sum over its tokens: the log-ratio of the whole answer.

    Args:
        better: the first instruction. In a chat it replaces the system message; before a plain text it is a paragraph
            of its own.
        worse: the second, in the same place.
    """

    on_device = True
    scores_vocabulary = True
    prompt_contexts = 2
    additive = True

    def __init__(self, better: str = BETTER, worse: str = WORSE):
        super().__init__()
        for name, value in (("better", better), ("worse", worse)):
            if not isinstance(value, str) or not value.strip():
                raise RGTGError(f"{name}={value!r} is not an instruction: pass a sentence")
        self.better, self.worse = better, worse
        self._lm: LanguageModel | None = None
        self._logits = self._log_sum_exp = torch.empty(0)

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        if lm.tokenizer is None:
            raise RGTGError(
                "ContrastiveReward writes instructions and the model came without a tokenizer: pass one"
            )
        self._lm = lm

    @property
    def limit(self) -> int | None:
        return None if self._lm is None else self._lm.runner.limit

    def encode(self, prompt: Prompt) -> list[list[int]]:
        return [self._under(prompt, self.better), self._under(prompt, self.worse)]

    def use_slots(self, slots: Slots | None) -> None:
        """The base model holds its rows."""

    def follow(self, tokens: torch.Tensor) -> None:
        """The base model holds its rows."""

    def begin_step(self, context_logits: torch.Tensor) -> None:
        # The one-pass top-k also computes the log-sum-exp: no vocabulary-sized tensor is written.
        flat = context_logits.flatten(0, 1)
        logprob, top, _ = topk_logprobs(flat, 1)
        self._logits = context_logits
        self._log_sum_exp = (flat.gather(-1, top) - logprob).view(*context_logits.shape[:2], 1)

    def guidance(self) -> torch.Tensor:
        logprobs = self._logits - self._log_sum_exp
        return logprobs[:, 0] - logprobs[:, 1]

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        at = candidates.unsqueeze(1).expand(-1, self.prompt_contexts, -1)
        logprobs = self._logits.gather(-1, at) - self._log_sum_exp
        return logprobs[:, 0] - logprobs[:, 1]

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        assert self._lm is not None
        runner = self._lm.runner
        chosen = torch.tensor(list(answer), device=runner.device).unsqueeze(-1)
        logprobs = []
        for ids in self.encode(prefix.prompt):
            hidden = runner.hidden_uncached([*ids, *answer])[len(ids) - 1 : -1]
            logits = runner.logits(hidden)[:, : self._lm.vocabulary]
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logprobs.append(logits.log_softmax(-1, dtype=dtype).gather(-1, chosen).squeeze(-1))
        return (logprobs[0] - logprobs[1]).tolist()

    def _under(self, prompt: Prompt, instruction: str) -> list[int]:
        assert self._lm is not None
        tokenizer = self._lm.tokenizer
        messages = prompt.messages
        if messages is not None:
            rest = [message for message in messages if message.get("role") != "system"]
            changed: Any = [{"role": "system", "content": instruction}, *rest]
            try:
                return Prompt(changed, prompt.index).ids(tokenizer)
            except RGTGError as error:
                raise RGTGError(
                    f"{error}; ContrastiveReward gives its instructions as system messages: use another reward, or none"
                ) from error
        paragraph = f"{instruction}\n\n"
        if isinstance(prompt.given, str):
            return Prompt(paragraph + prompt.given, prompt.index).ids(tokenizer)
        begun, ids = Prompt(paragraph, prompt.index).ids(tokenizer), prompt.ids(tokenizer)
        bos = None if tokenizer is None else tokenizer.bos_token_id
        # The beginning-of-text token must occur only once, at the start.
        return begun + (ids[1:] if bos is not None and begun[:1] == ids[:1] == [bos] else ids)
