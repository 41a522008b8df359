"""What a run returns: rows, their traces, and what the run cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rgtg_fast.models.prompts import PromptLike


@dataclass(frozen=True)
class Candidate:
    """One candidate of a step.

    Attributes:
        token, text: id and text. logprob: log π(token | prefix) under the base model, natural log.
        reward: the guide's, None without a guide. probability: after guidance; 1 for greedy's choice.
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
        position: index of the answer token, from 0. token, text: the chosen one.
        entropy: of the base model's next-token distribution, in nats.
        base_token: what beta = 0 picks among the same candidates with the same noise.
        candidates: in the order of the top-k, `support="all"` shows the k most probable after guidance.
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
        index: of the prompt in the call. prompt: as given.
        tokens: answer ids, without the end-of-sequence token. text: the answer, cut before a stop string.
        finish_reason: "eos", "stop" or "length".
        reward: the guide's reward of the whole answer (the end-of-sequence token included where it ended the
            answer), None without a guide.
        logprobs, rewards: per answer token, base log-probability and the guide's reward (NaN where a gate left the
            token to the base model; `reward` is None where that is the last one).
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
    """One token of a stream: its text (may be empty while a character is incomplete), id and candidates.

    `finish_reason` is None until the last piece.
    """

    text: str
    token: int
    candidates: list[Candidate]
    finish_reason: str | None = None


@dataclass
class Stats:
    """What a run cost.

    Attributes:
        tokens: decided, end-of-sequence tokens included. guided_tokens: of these, decided with the guide's word (fewer
            with `Guidance(gate_entropy=...)`). seconds: of the whole call, prefill included.
        steps: iterations of the decode loop. lm_calls, reward_calls: forwards of each model in them.
        lm_tokens, reward_tokens: tokens through each model in them. prompt_tokens_lm, prompt_tokens_reward: tokens
            through each model in the prefills.
        first_token_seconds: from the call to the first decision on the host, prefill, compiling and capturing included;
            None where a strategy drew the tokens. graph_seconds: spent on warming up and capturing CUDA graphs.
        phases: seconds by phase. cache_bytes: of each model's prefix cache.
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
        """Adds another run's counts; seconds are left to who measures them."""
        for name in (
            "tokens",
            "guided_tokens",
            "steps",
            "lm_calls",
            "reward_calls",
            "lm_tokens",
            "reward_tokens",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.prompt_tokens_lm += other.prompt_tokens_lm
        self.prompt_tokens_reward += other.prompt_tokens_reward

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows by wall seconds of the whole call."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class GenerationResult(Sequence[GeneratedRow]):
    """The rows of a call in the order of its prompts, and what the call cost."""

    rows: list[GeneratedRow]
    stats: Stats

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[GeneratedRow]:
        return iter(self.rows)
