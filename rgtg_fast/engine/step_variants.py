"""Variants of `DecodeStep`: other supports, fused sampling, gates, and timing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from rgtg_fast.engine.batch import Batch, Row
from rgtg_fast.engine.step import DecodeStep, ThreeTensors
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.ops import topk_logprobs
from rgtg_fast.profiling import PhaseTimer
from rgtg_fast.rewards.base import Reward, as_score


class CombinedStep(DecodeStep):
    """support="combined": the candidates are the k with the highest log π + β·r (FaRMA)."""

    def select(self, batch: Batch, logits: torch.Tensor) -> ThreeTensors:
        rewards = self.reward.guidance().float()
        logprobs, candidates, entropy = topk_logprobs(
            logits, batch.k, guidance=rewards, beta=batch.now.selection_beta
        )
        return batch.mask_padding(logprobs), candidates, entropy


class VocabularyStep(DecodeStep):
    """support="all": every token is a candidate (GenARM)."""

    def select(self, batch: Batch, logits: torch.Tensor) -> ThreeTensors:
        logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        candidates = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
        return logprobs, candidates, topk_logprobs(logits, 1)[2]

    def score(self, batch: Batch, candidates: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        self.lm.run_candidates(candidates)
        return as_score(self.reward.guidance(), self.reward).to(logprobs.dtype)


class FusedStep(DecodeStep):
    """The reward scores and draws in one launch (`Reward.fused`)."""

    phases: ClassVar[dict[str, str]] = {**DecodeStep.phases, "sample": "reward"}

    def __init__(self, step: DecodeStep):
        super().__init__(step.lm, step.reward, step.eos)
        self.select = step.select

    def sample(self, batch: Batch, candidates: torch.Tensor, logprobs: torch.Tensor) -> ThreeTensors:
        return self.reward.sample(candidates, logprobs, *batch.sampling)


class GatedStep(DecodeStep):
    """`Guidance(gate_entropy=...)`: rows whose entropy is below their gate take the base model's own token."""

    def __init__(self, step: DecodeStep):
        super().__init__(step.lm, step.reward, step.eos)
        self._step = step

    def select(self, batch: Batch, logits: torch.Tensor) -> ThreeTensors:
        selected = self._step.select(batch, logits)
        batch.apply_gates(selected[2])
        return selected

    def score(self, batch: Batch, candidates: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        if not any(batch.guided):
            return torch.zeros_like(logprobs)
        for slot, row in enumerate(batch.rows):
            if row.unscored:
                self._catch_up(slot, row)
        assert batch.gated_mask is not None
        return self._step.score(batch, candidates, logprobs).masked_fill(batch.gated_mask, 0)

    def commit(self, batch: Batch, accepted: torch.Tensor) -> None:
        self.lm.commit(accepted)
        if any(batch.guided):
            self.reward.commit(accepted)

    def _catch_up(self, slot: int, row: Row) -> None:
        """Appends the tokens that were decided without the reward to its prefix, in one chunk."""
        self.reward.append(slot, row.unscored)
        counter = self.reward.counter
        counter.calls += 1
        counter.tokens += len(row.unscored)
        counter.prompt_tokens -= len(row.unscored)  # where `append` has counted them
        row.unscored = []


SUPPORTS: dict[str, type[DecodeStep]] = {"lm": DecodeStep, "combined": CombinedStep, "all": VocabularyStep}


def step_for(
    batch: Batch, lm: LanguageModel, reward: Reward, eos: torch.Tensor, timer: PhaseTimer | None = None
) -> DecodeStep:
    """The step of a batch.

    Args:
        batch: the batch whose settings decide.
        lm: as in `DecodeStep`.
        reward: as in `DecodeStep`.
        eos: as in `DecodeStep`.
        timer: times the parts.
    """
    step = SUPPORTS[batch.support](lm, reward, eos)
    if batch.gated:
        step = GatedStep(step)
    elif reward.fused and batch.support != "all":
        step = FusedStep(step)
    return step if timer is None else _timed(step, timer)


def processed(step: DecodeStep, process: Callable[[list[Row], torch.Tensor], torch.Tensor]) -> DecodeStep:
    """A step that selects from the base model's logits [B, V] after `process(rows, logits)`."""
    select = step.select
    step.select = lambda batch, logits: select(batch, process(batch.rows, logits))
    return step


def _timed(step: DecodeStep, timer: PhaseTimer) -> DecodeStep:
    """A copy of a step whose parts are those of `step`, each timed under its phase."""
    timed = copy.copy(step)
    for part, phase in step.phases.items():
        setattr(timed, part, _in_phase(getattr(step, part), timer, phase))
    return timed


def _in_phase(part: Callable[..., Any], timer: PhaseTimer, phase: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with timer(phase):
            return part(*args)

    return run
