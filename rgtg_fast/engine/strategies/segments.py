"""Segment-level rejection sampling with cache roll-back: CARDS."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rgtg_fast.config import Segments
from rgtg_fast.engine.batch import Row
from rgtg_fast.engine.outputs import Stats
from rgtg_fast.engine.stopping import StoppingCriteria
from rgtg_fast.engine.strategies.sampler import Sampler
from rgtg_fast.rewards.base import Reward


@dataclass
class _Attempt:
    """A segment: its tokens (end-of-sequence included) with their log π, and its rewards once it is scored."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    end: str | None = None  # the reason, where the answer ends with it


@dataclass
class _Growing:
    """A row, the segment that is sampled for it, and where that begins."""

    row: Row
    random: random.Random
    prompt_reward: float
    attempt: _Attempt = field(default_factory=_Attempt)
    best: _Attempt | None = None
    rejected: int = 0
    start: int = 0  # tokens in the base model's cache
    start_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class SegmentDecoder:
    """Decodes rows by accepted segments. Each row accepts its own; a rejected segment is cut off both caches."""

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        strategy: Segments,
        stopping: StoppingCriteria,
        slots: int,
        stats: Stats,
    ):
        self.sampler, self.reward, self.strategy, self.stopping = sampler, reward, strategy, stopping
        self.slots, self.stats = slots, stats
        self.growing: list[_Growing] = []

    def run(self, rows: list[Row]) -> Iterator[Row]:
        """Finished rows as they finish."""
        waiting = deque(rows)
        while waiting or self.growing:
            fresh = len(self.growing)
            while waiting and len(self.growing) < self.slots:
                self._admit(waiting.popleft())
            logits = self.sampler.step()
            entropy = self.sampler.entropy(logits)
            for slot, state in enumerate(self.growing):
                if slot >= fresh:
                    self._begin_segment(slot, logits)
                elif self._is_complete(state.attempt, entropy[slot]):
                    self._settle(slot, logits)
            pending = self._unfinished(range(len(self.growing)))
            while pending:
                ended = []
                drawn = self.sampler.draw(logits[pending], pending)
                for slot, (token, logprob) in zip(pending, drawn, strict=True):
                    state = self.growing[slot]
                    state.attempt.tokens.append(token)
                    state.attempt.logprobs.append(logprob)
                    state.attempt.end = self.stopping.reason([*state.row.answer, *state.attempt.tokens])
                    if state.attempt.end is not None:
                        self._settle(slot, logits)
                        ended.append(slot)
                # A row whose segment was rejected draws again at once, from where that began.
                pending = self._unfinished(ended)
            self.stats.steps += 1
            yield from self._retire()

    def _admit(self, row: Row) -> None:
        slot, own = len(self.growing), row.encoded[0]
        self.sampler.begin(slot, row.prompt_ids, row.seed)
        before = self.reward.counter.prompt_tokens
        self.reward.admit(slot, row, [own[:-1]])
        reward = self.reward.append(slot, own[-1:])[-1]
        self.stats.prompt_tokens_reward += self.reward.counter.prompt_tokens - before
        self.growing.append(_Growing(row, random.Random(row.seed), reward))

    def _is_complete(self, attempt: _Attempt, entropy: float) -> bool:
        length, strategy = len(attempt.tokens), self.strategy
        if length >= strategy.max_tokens:
            return True
        return length >= strategy.min_tokens and entropy >= strategy.entropy

    def _begin_segment(self, slot: int, logits: torch.Tensor) -> None:
        """The next segment begins after what the base model's cache holds now."""
        state = self.growing[slot]
        state.attempt, state.best, state.rejected = _Attempt(), None, 0
        state.start = self.sampler.runner.length(slot)
        state.start_logits = logits[slot].clone()

    def _settle(self, slot: int, logits: torch.Tensor) -> None:
        """Accepts or rejects a row's segment; an unfinished row then continues from `logits[slot]`."""
        state, attempt = self.growing[slot], self.growing[slot].attempt
        attempt.rewards = self._score(slot, attempt)
        if state.best is None or attempt.rewards[-1] > state.best.rewards[-1]:
            state.best = attempt
        accepted = state.random.random() < self._acceptance(state, attempt)
        if not accepted:
            state.rejected += 1
            if state.rejected <= self.strategy.max_rejections:
                self._cut(slot)
                logits[slot] = state.start_logits
                state.attempt = _Attempt()
                return
            if state.best is not attempt:
                self._cut(slot)
                self._replay(slot, state.best, logits)
                attempt = state.best
        row = state.row
        row.last_token = attempt.tokens[-1]
        row.answer += attempt.tokens[:-1] if attempt.end == "eos" else attempt.tokens
        row.logprobs += attempt.logprobs
        row.rewards += attempt.rewards
        self.stats.tokens += len(attempt.tokens)
        self.stopping.finish(row, attempt.end)
        if attempt.end is None:
            self._begin_segment(slot, logits)

    def _acceptance(self, state: _Growing, attempt: _Attempt) -> float:
        """min(1, exp((r − τ_t)/beta))."""
        strategy = self.strategy
        base = (1 - strategy.alpha) * state.prompt_reward + strategy.alpha * strategy.target
        tokens = len(state.row.answer) + len(attempt.tokens)
        rising = base + tokens * (strategy.target - base) / self.stopping.max_new_tokens
        threshold = min(strategy.target, rising)
        return math.exp(min(0.0, (attempt.rewards[-1] - threshold) / strategy.beta))

    def _score(self, slot: int, attempt: _Attempt) -> list[float]:
        self.stats.reward_calls += 1
        self.stats.reward_tokens += len(attempt.tokens)
        rewards = self.reward.append(slot, attempt.tokens)
        self.stopping.check(self.growing[slot].row, attempt.tokens, rewards)
        return rewards

    def _cut(self, slot: int) -> None:
        """Cuts the current segment off both caches."""
        state = self.growing[slot]
        self.reward.roll_back(slot, len(state.attempt.tokens))
        self.sampler.runner.roll_back(slot, state.start)

    def _replay(self, slot: int, attempt: _Attempt, logits: torch.Tensor) -> None:
        """Appends a segment that had been cut off to both caches again, in one chunk."""
        runner = self.sampler.runner
        self._score(slot, attempt)
        hidden = runner.prefill(slot, attempt.tokens)
        logits[slot] = runner.logits(hidden[-1:])[0, : logits.shape[-1]]
        self.sampler.newest[slot] = attempt.tokens[-1]
        self.stats.lm_calls += 1
        self.stats.lm_tokens += len(attempt.tokens)

    def _unfinished(self, slots: range | list[int]) -> list[int]:
        return [slot for slot in slots if self.growing[slot].row.finish_reason is None]

    def _retire(self) -> Iterator[Row]:
        """Finished rows leave their slots, which the last rows take."""
        for slot in reversed(range(len(self.growing))):
            row = self.growing[slot].row
            if row.finish_reason is None:
                continue
            last = len(self.growing) - 1
            if slot != last:
                self.sampler.move(last, slot)
                self.reward.move(last, slot)
                self.growing[slot] = self.growing[last]
            self.growing.pop()
            self.sampler.drop(1)
            yield row
