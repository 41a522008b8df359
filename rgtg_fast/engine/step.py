"""One decoding step: the algorithm of PARGS (arXiv 2406.07780).

Shapes: B rows, C contexts of the reward in the base model's batch, V vocabulary, K candidates. `step_variants.py` holds
what differs for other supports, fused sampling and gates, and the timing of the parts.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from rgtg_fast.engine.batch import Batch
from rgtg_fast.engine.outputs import StepTensors
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.ops import finish_step, resample, topk_logprobs
from rgtg_fast.rewards.base import Reward, as_score

# What `select` and `sample` return.
ThreeTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class DecodeStep:
    """Decides one token of every row, without synchronizing with the host:

        forward → begin_reward → select → score → resample → finish → commit

    Args:
        lm: the base model π.
        reward: r, bound to it.
        eos: [Z] int64, tokens that end a row.
    """

    # The phase of `Stats.phases` that each part is timed under; writing the decision and the caches is one phase.
    phases: ClassVar[dict[str, str]] = {
        "forward": "lm",
        "begin_reward": "reward",
        "select": "topk",
        "score": "reward",
        "resample": "resample",
        "finish": "commit",
        "commit": "commit",
    }

    def __init__(self, lm: LanguageModel, reward: Reward, eos: torch.Tensor):
        self.lm, self.reward, self.eos = lm, reward, eos

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, StepTensors]:
        """The decision [5, B] and what led to it.

        The rows of the decision: token, log π, reward, log-probability after guidance, error code.
        """
        logits, context_logits = self.forward(batch)  # [B, V], [B, C, V]
        self.begin_reward(context_logits)
        logprobs, candidates, entropy = self.select(batch, logits)  # [B, K], [B, K], [B]
        rewards, choice, chosen_logprob = self.sample(batch, candidates, logprobs)  # [B, K], [B], [B]
        decision, accepted = self.finish(batch, logprobs, rewards, candidates, choice, chosen_logprob)
        self.commit(batch, accepted)
        return decision, StepTensors(logprobs, candidates, rewards, choice, entropy)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The base model's logits [B, V] for the next token, and those [B, C, V] in the reward's contexts."""
        return self.lm.next_logits(batch.now.tokens)

    def begin_reward(self, context_logits: torch.Tensor) -> None:
        """Lets the reward see its contexts before candidates are selected."""
        self.reward.begin_step(context_logits)

    def select(self, batch: Batch, logits: torch.Tensor) -> ThreeTensors:
        """The k most probable tokens: log π and ids [B, K], and the entropy of π [B]."""
        logprobs, candidates, entropy = topk_logprobs(logits, batch.k)
        return batch.mask_padding(logprobs), candidates, entropy

    def sample(self, batch: Batch, candidates: torch.Tensor, logprobs: torch.Tensor) -> ThreeTensors:
        """Rewards [B, K], the chosen candidate [B] and its log-probability after guidance [B]."""
        rewards = self.score(batch, candidates, logprobs)
        choice, chosen_logprob = self.resample(batch, logprobs, rewards)
        return rewards, choice, chosen_logprob

    def score(self, batch: Batch, candidates: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """r [B, K] of the candidates.

        A reward that shares the base model's forward reads its states there, so the candidates run first.
        """
        self.lm.run_candidates(candidates)  # nothing where no reward shares the forward
        return as_score(self.reward.score(candidates), self.reward).to(logprobs.dtype)

    def resample(
        self, batch: Batch, logprobs: torch.Tensor, rewards: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A draw from softmax((log π + β·r)/τ), by each row's own seed and position."""
        return resample(logprobs, rewards, *batch.sampling)

    def finish(
        self,
        batch: Batch,
        logprobs: torch.Tensor,
        rewards: torch.Tensor,
        candidates: torch.Tensor,
        choice: torch.Tensor,
        chosen_logprob: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the chosen tokens into the slots.

        Returns the decision [5, B] and the accepted candidates [B], -1 where the row has ended.
        """
        slots = batch.now.tokens, batch.now.position, batch.now.limit
        return finish_step(
            logprobs, rewards, candidates, choice, chosen_logprob, *slots, batch.widths, self.eos
        )

    def commit(self, batch: Batch, accepted: torch.Tensor) -> None:
        """Appends the accepted candidates to the prefixes of the models that ran them.

        A base model that ran none appends its new token in the next step's forward.
        """
        self.lm.commit(accepted)
        self.reward.commit(accepted)
