"""Runs a strategy over the rows of a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from rgtg_fast.config import BestOfN, Blocks, Segments, Strategy
from rgtg_fast.engine.batch import Row
from rgtg_fast.engine.memory import check_fits, check_samples
from rgtg_fast.engine.outputs import GeneratedRow, Stats
from rgtg_fast.engine.strategies.best_of_n import Generate, best_of_n, prompts_at_once
from rgtg_fast.engine.strategies.blocks import BlockDecoder
from rgtg_fast.engine.strategies.sampler import Sampler
from rgtg_fast.engine.strategies.segments import SegmentDecoder
from rgtg_fast.engine.strategies.stopping import StoppingCriteria
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.device import free_bytes
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.runner import Counter
from rgtg_fast.rewards.base import Reward


@dataclass
class Call:
    """What a strategy needs of a decoder's call.

    Attributes:
        generate: decodes without a guide. max_batch: rows of the base model's batch.
    """

    lm: LanguageModel
    guide: Reward | None
    rows: list[Row]
    ends: StoppingCriteria
    max_batch: int
    generate: Generate
    stats: Stats


# What the command line and `generate(strategy=...)` call them.
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
    values: dict[str, float] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in known:
            raise RGTGError(f"{kind} has no setting {key!r}: use {', '.join(sorted(known))}")
        try:
            values[key] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise RGTGError(f"{key}={value!r} is not a number: use for example {kind}:{key}=4") from None
    return NAMES[kind](**values)  # pyright: ignore[reportArgumentType]


def check_strategy(strategy: Strategy, guide: Reward | None) -> None:
    """Refuses a strategy that the decoder's guide cannot serve.

    Raises:
        RGTGError: no guide, or one without a cache that grows and shrinks by chunks.
    """
    name = type(strategy).__name__
    if not isinstance(strategy, Strategy):
        raise RGTGError(f"strategy={strategy!r} is none: use BestOfN(...), Segments(...) or Blocks(...)")
    if guide is None:
        raise RGTGError(f"{name} chooses by reward and this decoder has none: pass reward=...")
    if not isinstance(strategy, BestOfN) and not guide.appends:
        raise RGTGError(
            f"{name} needs a guide whose cache grows and shrinks by chunks and this decoder has {guide.name}: use a "
            "SequenceReward with a cache of its own (an adapter with share_trunk=False), or BestOfN(...)"
        )


def run_strategy(strategy: Strategy, call: Call) -> Iterator[GeneratedRow]:
    """The rows of a call as they finish, decoded by a strategy instead of token by token."""
    guide = call.guide
    assert guide is not None
    if isinstance(strategy, BestOfN):
        prompt = max(len(row.prompt_ids) for row in call.rows)
        free = free_bytes(torch.device("cpu"))
        prompts = min(len(call.rows), prompts_at_once(call.max_batch, strategy.n))
        check_samples(strategy.n, prompts, prompt, call.ends.max_new_tokens, free)
        yield from best_of_n(call.generate, guide, call.rows, strategy, call.ends, call.max_batch, call.stats)
        return
    sampler = Sampler(call.lm, strategy.temperature, strategy.top_k)
    longest = max(len(row.prompt_ids) for row in call.rows) + call.ends.max_new_tokens
    own = max(len(row.encoded[0]) for row in call.rows) + call.ends.max_new_tokens
    if isinstance(strategy, Segments):
        slots = prompts = min(call.max_batch, len(call.rows))
        room = 0
    else:
        prompts = min(max(1, call.max_batch // strategy.k), len(call.rows))
        # A block that has ended goes on repeating its last token until the others are through.
        slots, room = prompts * strategy.k, min(strategy.length, call.ends.max_new_tokens)
    runner = call.lm.runner
    free = free_bytes(runner.device)
    held = runner.cache.nbytes() + guide.cache_bytes()
    per_row = runner.cache_bytes_per_token * (longest + room)
    per_row += -(-guide.cache_bytes_per_token * own * prompts // slots)
    setting = "max_batch" if prompts > 1 or isinstance(strategy, Segments) else "k"
    check_fits(per_row, slots, longest + room, None if free is None else free + held, setting)
    runner.reserve(slots, longest + room)
    guide.reserve(prompts, own)
    if isinstance(strategy, Segments):
        rows = SegmentDecoder(sampler, guide, strategy, call.ends, slots, call.stats).run(call.rows)
    else:
        rows = BlockDecoder(sampler, guide, strategy, call.ends, prompts, call.stats).run(call.rows)
    extra = Counter()
    for row in rows:
        _count(call, extra)
        yield row.finished(guide.answer_reward, traced=False)
    _count(call, extra)


def _count(call: Call, extra: Counter) -> None:
    """Adds what the base model has done since the last time."""
    counter = call.lm.runner.counter
    call.stats.lm_calls += counter.calls - extra.calls
    call.stats.lm_tokens += counter.tokens - extra.tokens
    call.stats.prompt_tokens_lm = counter.prompt_tokens
    extra.calls, extra.tokens = counter.calls, counter.tokens
