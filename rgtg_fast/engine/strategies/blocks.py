"""Blockwise best-of-k: k blocks are sampled, the best one is kept, and all samples continue from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rgtg_fast.config import Blocks
from rgtg_fast.engine.batch import Row
from rgtg_fast.engine.outputs import Stats
from rgtg_fast.engine.stopping import StoppingCriteria
from rgtg_fast.engine.strategies.sampler import Sampler, sample_seed
from rgtg_fast.rewards.base import Reward


@dataclass
class _Block:
    """One sample of a block: tokens (end-of-sequence included) and their log π.

    Attributes:
        end: why the answer ends with the block, where it does.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: str | None = None


class BlockDecoder:
    """Decodes rows by blocks. Prompt i has slots i·k to i·k + k - 1 of the base model and slot i of the reward."""

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        strategy: Blocks,
        stopping: StoppingCriteria,
        prompts: int,
        stats: Stats,
    ):
        self.sampler, self.reward, self.strategy, self.stopping = sampler, reward, strategy, stopping
        self.prompts, self.stats = prompts, stats
        self.rows: list[Row] = []

    def run(self, rows: list[Row]) -> Iterator[Row]:
        """Finished rows as they finish."""
        waiting = deque(rows)
        while waiting or self.rows:
            while waiting and len(self.rows) < self.prompts:
                self._admit(waiting.popleft())
            blocks = self._sample()
            for which, row in enumerate(self.rows):
                self._keep_best(which, row, blocks[which * self.strategy.k : (which + 1) * self.strategy.k])
            yield from self._retire()

    def _admit(self, row: Row) -> None:
        """The prompt is prefilled once and copied to the row's other slots."""
        k, which = self.strategy.k, len(self.rows)
        self.sampler.begin(which * k, row.prompt_ids, row.seed)
        for j in range(1, k):
            self.sampler.fork(which * k, sample_seed(row.seed, j))
        before = self.reward.counter.prompt_tokens
        self.reward.admit(which, row, row.encoded)
        self.stats.prompt_tokens_reward += self.reward.counter.prompt_tokens - before
        self.rows.append(row)

    def _sample(self) -> list[_Block]:
        """A block for every slot; one that has ended waits for the others."""
        blocks = [_Block() for _ in self.sampler.newest]
        for _ in range(self.strategy.length):
            growing = [slot for slot, block in enumerate(blocks) if block.end is None]
            if not growing:
                break
            logits = self.sampler.step()
            self.stats.steps += 1
            drawn = self.sampler.draw(logits[torch.tensor(growing, device=logits.device)], growing)
            for slot, (token, logprob) in zip(growing, drawn, strict=True):
                block, row = blocks[slot], self.rows[slot // self.strategy.k]
                block.tokens.append(token)
                block.logprobs.append(logprob)
                block.end = self.stopping.reason([*row.answer, *block.tokens])
        return blocks

    def _keep_best(self, which: int, row: Row, blocks: list[_Block]) -> None:
        rewards = []
        for j, block in enumerate(blocks):
            if j:
                self.reward.roll_back(which, len(blocks[j - 1].tokens))
            rewards.append(self._score(which, block))
        best = max(range(len(blocks)), key=lambda j: rewards[j][-1])
        block = blocks[best]
        row.last_token = block.tokens[-1]
        row.answer += block.tokens[:-1] if block.end == "eos" else block.tokens
        row.logprobs += block.logprobs
        row.rewards += rewards[best]
        self.stats.tokens += len(block.tokens)
        self.stopping.finish(row, block.end)
        if row.finish_reason is not None:
            return
        if best != len(blocks) - 1:
            self.reward.roll_back(which, len(blocks[-1].tokens))
            self._score(which, block)
        first = which * self.strategy.k
        for slot in range(first, first + self.strategy.k):
            if slot != first + best:
                self.sampler.continue_as(first + best, slot)

    def _score(self, which: int, block: _Block) -> list[float]:
        self.stats.reward_calls += 1
        self.stats.reward_tokens += len(block.tokens)
        rewards = self.reward.append(which, block.tokens)
        self.stopping.check(self.rows[which], block.tokens, rewards)
        return rewards

    def _retire(self) -> Iterator[Row]:
        """Finished rows leave their slots, which the last row's take."""
        k = self.strategy.k
        for which in reversed(range(len(self.rows))):
            row = self.rows[which]
            if row.finish_reason is None:
                continue
            last = len(self.rows) - 1
            if which != last:
                for j in range(k):
                    self.sampler.move(last * k + j, which * k + j)
                self.reward.move(last, which)
                self.rows[which] = self.rows[last]
            self.rows.pop()
            self.sampler.drop(k)
            yield row
