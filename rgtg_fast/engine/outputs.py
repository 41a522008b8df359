"""The results of a run: rows, their traces and the run's cost; and the tensors of a step that they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.prompts import PromptLike
from rgtg_fast.ops import resample

if TYPE_CHECKING:
    from rgtg_fast.engine.batch import Batch, Row


@dataclass(frozen=True)
class Candidate:
    """One candidate of a step.

    Attributes:
        token: id.
        text: text of the token.
        logprob: log π(token | prefix) under the base model, natural log.
        reward: None without a reward.
        probability: after guidance; 1 for greedy's choice.
        chosen: whether this one became the next token.
    """

    token: int
    text: str
    logprob: float
    reward: float | None
    probability: float
    chosen: bool


@dataclass(frozen=True)
class Step:
    """Why one token was chosen.

    Attributes:
        position: index of the answer token, from 0.
        token: id of the chosen token.
        text: text of the chosen token.
        entropy: entropy of the base model's next-token distribution, in nats.
        base_token: what beta = 0 picks among the same candidates with the same noise.
        candidates: in the order of the top-k; `support="all"` shows the k most probable after guidance.
    """

    position: int
    token: int
    text: str
    entropy: float
    base_token: int
    candidates: list[Candidate]


@dataclass
class GeneratedRow:
    """One finished answer.

    Attributes:
        index: index of the prompt in the call.
        prompt: as given.
        tokens: answer ids, without the end-of-sequence token.
        text: the answer, cut before a stop string.
        finish_reason: "eos", "stop" or "length".
        reward: reward of the whole answer, including the end-of-sequence token if it ended the answer; None without
            a reward.
        logprobs: per answer token, log-probability under the base model.
        rewards: per answer token (NaN where a gate left the token to the base model; `reward` is None where that is the
            last one).
        trace: one `Step` per decision, the end-of-sequence token's included; None unless asked for.
        end_token: the end-of-sequence token that ended the answer, where one did.
        alternatives: the other samples of best-of-n, the best first; None otherwise.
        base_logprob: log π(y | x) of the whole answer under the base model, the end-of-sequence token included.
        guided_logprob: the same under the distribution that its tokens were drawn from (0 for greedy); None for
            strategies, whose distribution is not known. Its mean over answers, less that of base_logprob, estimates
            KL(guided ‖ π).
    """

    index: int
    prompt: PromptLike
    tokens: list[int]
    text: str
    finish_reason: str
    reward: float | None
    logprobs: list[float]
    rewards: list[float]
    trace: list[Step] | None = None
    end_token: int | None = None
    alternatives: list[GeneratedRow] | None = None
    base_logprob: float = 0.0
    guided_logprob: float | None = None


@dataclass(frozen=True)
class StreamChunk:
    """One token of a stream.

    Attributes:
        text: may be empty while a character is incomplete.
        token: id.
        candidates: candidates of the token's step; empty without a trace.
        finish_reason: None until the last chunk.
    """

    text: str
    token: int
    candidates: list[Candidate]
    finish_reason: str | None = None


@dataclass
class Stats:
    """The cost of a run.

    Attributes:
        tokens: decided, end-of-sequence tokens included.
        guided_tokens: those of them that the reward also decided (fewer with `Guidance(gate_entropy=...)`).
        seconds: duration of the whole call, prefill included.
        steps: iterations of the decode loop.
        lm_calls: forwards of the base model in them.
        reward_calls: forwards of the reward model in them.
        lm_tokens: tokens through the base model in them.
        reward_tokens: tokens through the reward model in them.
        prompt_tokens_lm: tokens through the base model in the prefills.
        prompt_tokens_reward: tokens through the reward model in the prefills.
        first_token_seconds: from the call to the first decision on the host, prefill, compiling and capturing included;
            None where a strategy drew the tokens.
        graph_seconds: spent on warming up and capturing CUDA graphs.
        phases: seconds by phase.
        cache_bytes: bytes of each model's prefix cache.
    """

    tokens: int = 0
    guided_tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    lm_calls: int = 0
    reward_calls: int = 0
    lm_tokens: int = 0
    reward_tokens: int = 0
    prompt_tokens_lm: int = 0
    prompt_tokens_reward: int = 0
    first_token_seconds: float | None = None
    graph_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, other: Stats) -> None:
        """Adds another run's counts; the caller measures seconds."""
        for name in (
            "tokens",
            "guided_tokens",
            "steps",
            "lm_calls",
            "reward_calls",
            "lm_tokens",
            "reward_tokens",
            "prompt_tokens_lm",
            "prompt_tokens_reward",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows by wall seconds of the whole call."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class GenerationResult(Sequence[GeneratedRow]):
    """The rows of a call in the order of its prompts, and the cost of the call."""

    rows: list[GeneratedRow]
    stats: Stats

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[GeneratedRow]:
        return iter(self.rows)


# ---- a step's tensors ------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """One row's decision in a step, on the host.

    Attributes:
        token: the chosen candidate.
        logprob: its log-probability under the base model.
        reward: its reward.
        chosen_logprob: its log-probability after guidance.
        error_code: a candidate whose reward is NaN or +inf, `NO_CANDIDATE` where no score is finite, else `OK`
            (`rgtg_fast.ops.finish_step`).
    """

    token: int
    logprob: float
    reward: float
    chosen_logprob: float
    error_code: int


def decisions_of(decision: torch.Tensor) -> list[Decision]:
    """The rows' decisions [5, B] of `finish_step`, once they are on the host."""
    return [
        Decision(int(token), logprob, reward, chosen_logprob, int(error_code))
        for token, logprob, reward, chosen_logprob, error_code in decision.T.tolist()
    ]


class StepTensors(NamedTuple):
    """Intermediate results of a step.

    Attributes:
        logprobs: [B, K] under the base model.
        candidates: [B, K] int64.
        rewards: [B, K].
        choice: [B] int64, the chosen candidate, -1 where no score is finite.
        entropy: [B] of the base model's next-token distribution, in nats.
    """

    logprobs: torch.Tensor
    candidates: torch.Tensor
    rewards: torch.Tensor
    choice: torch.Tensor
    entropy: torch.Tensor


class TraceTensors(NamedTuple):
    """`StepTensors` of a traced step, and what is computed from them.

    Attributes:
        probability: [B, K] of the candidates after guidance.
        base: [B] int64, the base model's choice by the same noise.
    """

    logprobs: torch.Tensor
    candidates: torch.Tensor
    rewards: torch.Tensor
    choice: torch.Tensor
    entropy: torch.Tensor
    probability: torch.Tensor
    base: torch.Tensor


def trace_tensors(batch: Batch, step: StepTensors) -> TraceTensors:
    """Computes what a trace shows of a step that has been executed, on the device."""
    beta, slots = batch.beta, batch.now
    temperature = slots.temperature.unsqueeze(-1)
    score = step.logprobs + torch.where(beta.unsqueeze(-1) == 0, 0, beta.unsqueeze(-1) * step.rewards)
    # A row without a finite score has no choice (-1), and nothing to be shown.
    at = torch.arange(score.shape[-1], device=score.device)
    greedy = (at == step.choice.unsqueeze(-1)).to(score.dtype)
    sampled = (score / temperature.clamp_min(torch.finfo(score.dtype).tiny)).softmax(-1)
    probability = torch.where(temperature == 0, greedy, sampled)
    # The base model's choice, with the noise of the position that the step has left behind.
    zeros, position = torch.zeros_like(step.rewards), slots.position - 1
    base, _ = resample(step.logprobs, zeros, beta * 0, slots.temperature, slots.seed, position)
    return TraceTensors(*step, probability, base)


def write_trace(rows: list[tuple[int, Row, bool]], step: TraceTensors, lm: LanguageModel) -> None:
    """Appends a step to each row's trace.

    Args:
        rows: slot, row, and whether the step has rewards for it.
        step: on the host.
        lm: gives the tokens' texts.
    """
    for slot, row, rewarded in rows:
        shown = range(step.logprobs.shape[-1])
        if row.guidance.support == "all":
            width = min(row.guidance.k, step.logprobs.shape[-1])
            shown = step.probability[slot].topk(width).indices.tolist()
        chosen, token = int(step.choice[slot]), int(step.candidates[slot, step.choice[slot]])
        listed = []
        for at in list(shown)[: row.guidance.k]:
            candidate = int(step.candidates[slot, at])
            listed.append(
                Candidate(
                    candidate,
                    lm.token_text(candidate),
                    float(step.logprobs[slot, at]),
                    float(step.rewards[slot, at]) if rewarded else None,
                    float(step.probability[slot, at]),
                    at == chosen,
                )
            )
        base_token = int(step.candidates[slot, step.base[slot]])
        row.trace.append(
            Step(
                len(row.answer),
                token,
                lm.token_text(token),
                float(step.entropy[slot]),
                base_token,
                listed,
            )
        )
