"""Best-of-n: n samples of the base model, of which the one with the highest reward is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rgtg_fast.config import BestOfN, Guidance
from rgtg_fast.engine.batch import Row
from rgtg_fast.engine.outputs import GeneratedRow, GenerationResult, Stats
from rgtg_fast.engine.stopping import StoppingCriteria
from rgtg_fast.engine.strategies.sampler import sample_seed
from rgtg_fast.models.prompts import PromptLike
from rgtg_fast.rewards.base import Reward

# Samples of the base model: prompts, guidance and seeds to a result.
Generate = Callable[[list[PromptLike], Guidance, list[int]], GenerationResult]


def prompts_at_once(rows: int, n: int) -> int:
    """Prompts whose n samples are decoded in one call, for a batch of so many rows.

    Long enough that slots are refilled, short enough that answers come while others are waiting.
    """
    return max(1, 4 * rows // n)


def best_of_n(
    generate: Generate,
    reward: Reward,
    rows: list[Row],
    strategy: BestOfN,
    stopping: StoppingCriteria,
    at_once: int,
    stats: Stats,
) -> Iterator[GeneratedRow]:
    """Each prompt's best answer.

    A prompt costs n answers of the base model, ordinary rows of its batch, and one forward of the reward model over
    each whole answer.

    Args:
        generate: samples the base model.
        reward: ranks the answers.
        rows: the prompts.
        strategy: n and the settings of the samples.
        stopping: checks rewards.
        at_once: rows that are decoded at once.
        stats: stats of the run, to which the costs are added.
    """
    sampled = Guidance(beta=0, temperature=strategy.temperature, support="all")
    if strategy.top_k is not None:
        sampled = Guidance(strategy.top_k, beta=0, temperature=strategy.temperature)
    prompts = prompts_at_once(at_once, strategy.n)
    for first in range(0, len(rows), prompts):
        part = rows[first : first + prompts]
        seeds = [sample_seed(row.seed, j) for row in part for j in range(strategy.n)]
        result = generate([row.prompt.given for row in part for _ in range(strategy.n)], sampled, seeds)
        stats.add(result.stats)
        for i, row in enumerate(part):
            samples = result.rows[i * strategy.n : (i + 1) * strategy.n]
            ranked = sorted(samples, key=lambda sample: -_scored(sample, row, reward, stopping, stats))
            ranked[0].alternatives = ranked[1:]
            yield ranked[0]


def _scored(
    sample: GeneratedRow, row: Row, reward: Reward, stopping: StoppingCriteria, stats: Stats
) -> float:
    """Writes its rewards into a sample, the end-of-sequence token's included; returns that of the whole answer."""
    tokens = sample.tokens + ([] if sample.end_token is None else [sample.end_token])
    rewards = reward.score_answer(row, tokens)
    stopping.check(row, tokens, rewards)
    contexts = row.encoded or [row.prompt_ids]
    stats.reward_calls += len(contexts)
    stats.reward_tokens += len(tokens) * len(contexts)
    stats.prompt_tokens_reward += sum(map(len, contexts))
    whole = reward.answer_reward(rewards)
    sample.index, sample.rewards, sample.reward = row.prompt.index, rewards[: len(sample.tokens)], whole
    # The best of several is drawn from another distribution than each of them.
    sample.guided_logprob = None
    return whole
