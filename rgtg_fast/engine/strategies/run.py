"""Decodes the rows of a run by a strategy instead of token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields

import torch

from rgtg_fast.config import RENAMED_SETTINGS, BestOfN, Blocks, Guidance, Segments, Strategy
from rgtg_fast.engine.outputs import GeneratedRow, GenerationResult
from rgtg_fast.engine.request import Arguments, Run, check_fits, check_samples
from rgtg_fast.engine.scheduler import Scheduler
from rgtg_fast.engine.strategies.best_of_n import best_of_n, prompts_at_once
from rgtg_fast.engine.strategies.blocks import BlockDecoder
from rgtg_fast.engine.strategies.sampler import Sampler
from rgtg_fast.engine.strategies.segments import SegmentDecoder
from rgtg_fast.errors import RewardNaNError, RGTGError
from rgtg_fast.models.device import free_bytes
from rgtg_fast.models.prompts import PromptLike
from rgtg_fast.models.runner import Counter
from rgtg_fast.profiling import PhaseTimer
from rgtg_fast.rewards.base import NoReward, Reward

# Names on the command line and in `generate(strategy=...)`.
NAMES: dict[str, type[Strategy]] = {"best_of_n": BestOfN, "segment": Segments, "blockwise": Blocks}
TOKENWISE = "tokenwise"


def named_strategy(name: str) -> Strategy | None:
    """The strategy that a name means, with settings behind a colon; None for `tokenwise`.

    Raises:
        RGTGError: an unknown name or setting, or a value out of its range.

    Example:
        >>> named_strategy("best_of_n:n=8,temperature=0.7")
        BestOfN(n=8, temperature=0.7, top_k=None)
    """
    kind, _, settings = name.partition(":")
    if kind == TOKENWISE and not settings:
        return None
    if kind not in NAMES:
        raise RGTGError(f"strategy={name!r} is unknown: use one of {', '.join([TOKENWISE, *NAMES])}")
    known = {field.name for field in fields(NAMES[kind])}
    old = RENAMED_SETTINGS if kind == "segment" else {}
    values: dict[str, float] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in known and key not in old:
            raise RGTGError(f"{kind} has no setting {key!r}: use {', '.join(sorted(known))}")
        try:
            values[key] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise RGTGError(f"{key}={value!r} is not a number: use for example {kind}:{key}=4") from None
    return NAMES[kind](**values)  # pyright: ignore[reportArgumentType]


def check_strategy(strategy: Strategy, reward: Reward, run: Run) -> None:
    """Refuses a strategy that the decoder's reward or the call's arguments do not allow.

    Raises:
        RGTGError: no reward, one whose cache does not grow and shrink by several tokens, or guidance or a trace.
    """
    name = type(strategy).__name__
    if not isinstance(strategy, Strategy):
        raise RGTGError(
            f"strategy={strategy!r} is not a strategy: use BestOfN(...), Segments(...) or Blocks(...)"
        )
    if not reward.gives_rewards:
        raise RGTGError(f"{name} chooses by reward and this decoder has none: pass reward=...")
    if not isinstance(strategy, BestOfN) and not reward.appends:
        raise RGTGError(
            f"{name} needs a reward whose cache grows and shrinks by chunks and this decoder has {reward.name}: use a "
            "SequenceReward with a cache of its own (an adapter with share_trunk=False), or BestOfN(...)"
        )
    if run.trace or any(row.guidance != Guidance() for row in run.rows):
        raise RGTGError(
            f"{name} does not choose token by token: leave out guidance and trace, and give its own settings instead"
        )


def run_strategy(strategy: Strategy, run: Run, scheduler: Scheduler) -> Iterator[GeneratedRow]:
    """The rows of a run as they finish, with the run's statistics up to date.

    Args:
        strategy: one that `check_strategy` allows.
        run: without a trace.
        scheduler: the scheduler that would decode it token by token.

    Raises:
        RewardNaNError: a NaN reward; carries the rows finished before it.
    """
    decode = _best_of_n if isinstance(strategy, BestOfN) else _by_chunks
    done: list[GeneratedRow] = []
    try:
        for row in decode(strategy, run, scheduler):  # pyright: ignore[reportArgumentType]
            run.stats.seconds = time.perf_counter() - run.started
            run.stats.cache_bytes = scheduler.cache_bytes()
            done.append(row)
            yield row
    except RewardNaNError as error:
        error.finished = done
        raise


def _best_of_n(strategy: BestOfN, run: Run, scheduler: Scheduler) -> Iterator[GeneratedRow]:
    lm, max_batch = scheduler.lm, scheduler.max_batch
    longest = max(len(row.prompt_ids) for row in run.rows)
    prompts = min(len(run.rows), prompts_at_once(max_batch, strategy.n))
    check_samples(strategy.n, prompts, longest, run.max_new_tokens, free_bytes(torch.device("cpu")))

    def sample(prompts: list[PromptLike], guidance: Guidance, seeds: list[int]) -> GenerationResult:
        no_reward = NoReward()
        rows = Arguments(prompts, run.max_new_tokens, guidance, seeds, lm.tokenizer).rows(lm, no_reward)
        unguided = Run(rows, run.stopping, False, PhaseTimer())
        sampling = Scheduler(lm, no_reward, max_batch, graphs=False, batch_invariant=scheduler.invariant)
        found = sampling.rows(unguided)
        return GenerationResult(sorted(found, key=lambda row: row.index), unguided.stats)

    yield from best_of_n(sample, scheduler.reward, run.rows, strategy, run.stopping, max_batch, run.stats)


def _by_chunks(strategy: Segments | Blocks, run: Run, scheduler: Scheduler) -> Iterator[GeneratedRow]:
    """Rows that grow by segments or blocks, which enter the reward model's cache at once and can be cut off it."""
    lm, reward, max_batch = scheduler.lm, scheduler.reward, scheduler.max_batch
    lm_length = max(len(row.prompt_ids) for row in run.rows) + run.max_new_tokens
    reward_length = max(len(row.encoded[0]) for row in run.rows) + run.max_new_tokens
    if isinstance(strategy, Segments):
        slots = prompts = min(max_batch, len(run.rows))
        undo = strategy.max_tokens
    else:
        prompts = min(max(1, max_batch // strategy.k), len(run.rows))
        slots = prompts * strategy.k
        undo = strategy.length
        # A block that has ended repeats its last token until the others have.
        lm_length += min(strategy.length, run.max_new_tokens)
    runner = lm.runner
    free = scheduler.memory_for_caches(max(lm_length, reward_length) - run.max_new_tokens)
    row_bytes = runner.cache.row_bytes(lm_length, undo)
    row_bytes += -(-reward.row_bytes(reward_length, undo) * prompts // slots)
    setting = "max_batch" if prompts > 1 or isinstance(strategy, Segments) else "k"
    check_fits(row_bytes, slots, lm_length, free, setting)
    runner.reserve(slots, lm_length, undo=undo)
    reward.reserve(prompts, reward_length, undo)
    sampler = Sampler(lm, strategy.temperature, strategy.top_k, scheduler.invariant)
    if isinstance(strategy, Segments):
        decoder = SegmentDecoder(sampler, reward, strategy, run.stopping, slots, run.stats)
    else:
        decoder = BlockDecoder(sampler, reward, strategy, run.stopping, prompts, run.stats)
    counted = Counter()
    for row in decoder.run(run.rows):
        _count(run, runner.counter, counted)
        yield row.finished(reward, traced=False)
    _count(run, runner.counter, counted)


def _count(run: Run, counter: Counter, counted: Counter) -> None:
    """Adds the base model's forwards and tokens since the last time."""
    run.stats.lm_calls += counter.calls - counted.calls
    run.stats.lm_tokens += counter.tokens - counted.tokens
    run.stats.prompt_tokens_lm = counter.prompt_tokens
    counted.calls, counted.tokens = counter.calls, counter.tokens
