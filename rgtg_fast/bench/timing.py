"""Timed runs of one method: how long they take, what memory they need, and where their tokens first differ."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.bench.baselines import BaselineRun
from rgtg_fast.bench.methods import BenchMethod, RewardModel
from rgtg_fast.bench.models import RewardModels, clone_modules
from rgtg_fast.config import Guidance
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.errors import MemoryTooSmallError, RGTGError
from rgtg_fast.rewards import AutoregressiveReward, SequenceReward


@dataclass(frozen=True)
class TokenDifference:
    """Where a method's tokens first differ from the reference's.

    Attributes:
        row: prompt.
        position: new token, from 0.
        reference_token: what the reference chose.
        token: what the method chose.
        score_gap: the reference's score of its own choice minus that of the method's; None where the reference keeps
            no score of the method's token.
    """

    row: int
    position: int
    reference_token: int
    token: int
    score_gap: float | None


def first_difference(reference: BaselineRun, run: BaselineRun) -> TokenDifference | None:
    """The first token that differs over the rows and positions that both runs have; None where they agree."""
    for row, (expected, tokens) in enumerate(zip(reference.tokens, run.tokens, strict=False)):
        for position, (a, b) in enumerate(zip(expected, tokens, strict=False)):
            if a != b:
                gap = None
                if reference.steps:
                    candidates, scores = reference.steps[row][position]
                    of = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
                    gap = of[a] - of[b] if b in of else None
                return TokenDifference(row, position, a, b, gap)
    return None


@dataclass
class TimedMethod:
    """A method in a benchmark: how to run it, how much of it is run, and the results.

    Attributes:
        method: entry of the table of methods.
        call: function of prompts and a number of new tokens, which decodes that many for each prompt.
        engine: the engine that runs the base model.
        device: the device that it runs on.
        rows: prompts of a timed run.
        tokens: new tokens per prompt of a timed run.
        repeats: number of planned timed runs.
        runs: the finished timed runs.
        difference: first difference of any run from the reference; None if there is none.
        compared: tokens of a run that were compared with the reference's.
        resident_bytes: device memory that its runs so far have left allocated: static caches, memory of graphs.
        peak_bytes: most bytes that were allocated for it at once, resident ones included; None on a CPU.
    """

    method: BenchMethod
    call: Callable[[Sequence[Sequence[int]], int], BaselineRun]
    engine: str
    device: torch.device
    rows: int
    tokens: int = 0
    repeats: int = 0
    runs: list[BaselineRun] = field(default_factory=list)
    difference: TokenDifference | None = None
    compared: int = 0
    resident_bytes: int = 0
    peak_bytes: int | None = None

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method.name

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
        """One run over the first `rows` prompts.

        Raises:
            RGTGError: a row that ended early.
        """
        with self._counting_memory():
            run = self.call(prompts[: self.rows], tokens)
        for row, produced in enumerate(run.tokens):
            if len(produced) != tokens:
                raise RGTGError(
                    f"{self.name} produced {len(produced)} tokens instead of {tokens} for prompt {row}: "
                    "only methods that produce the same number can be timed against each other"
                )
        return run

    @contextmanager
    def _counting_memory(self) -> Iterator[None]:
        """Counts what a run allocates on the device, weights excluded: they are allocated before."""
        if self.device.type != "cuda":
            yield
            return
        gc.collect()  # garbage of earlier runs must not be freed, and subtracted, during this one
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        transient = torch.cuda.max_memory_allocated(self.device) - before
        self.peak_bytes = max(self.peak_bytes or 0, self.resident_bytes + transient)
        gc.collect()
        self.resident_bytes += torch.cuda.memory_allocated(self.device) - before

    def plan(self, trial: BaselineRun, batch: int, new_tokens: int, repeats: int, limit: float) -> None:
        """Fit a run into `limit` seconds: fewer rows first (they only add up), then fewer tokens, once.

        Args:
            trial: the warm-up's last run.
            batch: prompts of the whole job.
            new_tokens: per prompt, of the whole job.
            repeats: runs where one fits into the limit.
            limit: in seconds.
        """
        one_row = self.method.one_row
        prefill = trial.phases["prefill"] / (self.rows if one_row else 1)
        step = max((trial.seconds - trial.phases["prefill"]) / len(trial.tokens[0]), 1e-9)
        row = prefill + new_tokens * step
        self.repeats, self.tokens = repeats, new_tokens
        if one_row and row * batch <= limit:
            self.rows = batch
        elif row > limit:
            self.repeats = 1
            self.tokens = max(min(new_tokens, int((limit - prefill) / step)), len(trial.tokens[0]))
            if self.tokens == len(trial.tokens[0]):
                # The warm-up was as long as the run could be, so it counts as the run.
                self.runs, self.repeats = [trial], 0

    def result(self, reference: TimedMethod | None, batch: int, new_tokens: int) -> dict[str, Any]:
        """The run of the median time, extrapolated to the whole job, ready for JSON.

        `ms_per_token` has the prefill in it, `decode_ms_per_token` does not; `phases` are ms per token of the batch,
        `tokens` and `seconds` of the whole job. `memory_beyond_weights_bytes`, on CUDA, is the most that was allocated
        at once, weights excluded; intermediates of a graph count only while it is recorded, as the allocator does not
        know them later.
        """
        by_time = sorted(self.runs, key=lambda run: run.seconds)
        run = by_time[(len(by_time) - 1) // 2]
        measured_rows, measured_tokens = len(run.tokens), len(run.tokens[0])
        prefill = run.phases["prefill"]
        longer, wider = new_tokens / measured_tokens, batch / measured_rows
        seconds = (prefill + (run.seconds - prefill) * longer) * wider
        tokens = new_tokens * batch
        phases = {
            name: value * wider * (1.0 if name == "prefill" else longer) / tokens * 1e3
            for name, value in run.phases.items()
        }
        return {
            "method": self.name,
            "engine": self.engine,
            "tokens_per_second": tokens / seconds,
            "ms_per_token": seconds / tokens * 1e3,
            "decode_ms_per_token": (seconds - prefill * wider) / tokens * 1e3,
            "phases": phases,
            "cache_resident_bytes": run.cache_resident_bytes,
            "cache_peak_bytes": run.cache_peak_bytes,
            "memory_beyond_weights_bytes": self.peak_bytes,
            "tokens": tokens,
            "seconds": seconds,
            "seconds_of_every_run": [r.seconds for r in self.runs],
            "runs": len(self.runs),
            "tokens_measured": measured_tokens,
            "rows_measured": measured_rows,
            "extrapolated": measured_rows != batch or measured_tokens != new_tokens,
            "rows_one_after_another": self.method.one_row and batch > 1,
            "reference": reference.name if reference is not None else None,
            "equal_to_reference": self.difference is None if reference is not None else None,
            "tokens_compared": self.compared,
            "first_difference": asdict(self.difference) if self.difference else None,
        }


@dataclass
class Isolation:
    """A method that fails, for lack of memory or otherwise, is left out; the others are timed without it.

    Attributes:
        device: the device that the methods run on.
        progress: receives a line about every method that is left out.
        left_out: names of such methods, and why in one line.
    """

    device: torch.device
    progress: Callable[[str], None]
    left_out: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryTooSmallError):
            self._leave_out(name, "the device's memory does not suffice")
        except RuntimeError as error:  # a capture or a compilation that failed, say
            self._leave_out(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _leave_out(self, name: str, reason: str) -> None:
        self.progress(f"{name} is left out: {reason}")
        self.left_out[name] = reason

    def remaining(self, entries: Sequence[TimedMethod]) -> list[TimedMethod]:
        """The methods that still take part.

        Raises:
            RGTGError: none does.
        """
        remaining = [entry for entry in entries if entry.name not in self.left_out]
        if not remaining:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise RGTGError(
                f"every method failed on {self.device} ({reasons}): use smaller models, fewer rows or shorter prompts"
            )
        return remaining


def prepare(
    method: BenchMethod,
    lm: PreTrainedModel,
    rewards: RewardModels,
    tokenizer: PreTrainedTokenizerBase | None,
    guidance: Guidance,
    batch: int,
    length: int,
    device: torch.device,
) -> TimedMethod:
    """A method that is ready to run.

    Args:
        method: entry of the table of methods.
        lm: base model.
        rewards: the reward models of this benchmark.
        tokenizer: tokenizer of the base model; None with random weights.
        guidance: k and β.
        batch: prompts decoded at once, where the method can.
        length: most tokens of a prompt and its answer.
        device: device of the models.
    """
    rm, engine = rewards.model_of(method), "transformers"
    peer = method.peer
    if peer is not None:

        def call(prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
            return peer(lm, rm, prompts, guidance, tokens)

    else:
        reward = None
        if method.reward.is_adapter:
            assert rewards.adapter is not None
            shared = method.reward is RewardModel.SHARED_ADAPTER
            reward = SequenceReward(rewards.adapter, share_trunk=shared)
        elif method.reward is RewardModel.LANGUAGE_MODEL:
            assert rm is not None
            reward = AutoregressiveReward((clone_modules(rm), tokenizer))
            guidance = replace(guidance, support="all")
        elif rm is not None:
            reward = SequenceReward((clone_modules(rm), tokenizer))
        decoder = RewardGuidedDecoder.from_pretrained(
            (clone_modules(lm), tokenizer),
            reward=reward,
            device=device,
            dtype=lm.dtype,
            max_batch=batch,
            max_length=length,
            engine=method.engine,
            graphs=method.graphs,
            compile=method.compile,
        )
        engine = str(decoder.describe()["lm_engine"])

        def call(prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
            return run_ours(decoder, guidance, prompts, tokens, device)

    return TimedMethod(method, call, engine, device, rows=1 if method.one_row else batch)


def run_ours(
    decoder: RewardGuidedDecoder,
    guidance: Guidance,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    device: torch.device,
) -> BaselineRun:
    """One timed run of our decoder."""
    _synchronize(device)
    start = time.perf_counter()
    result = decoder.generate([list(prompt) for prompt in prompts], max_new_tokens=tokens, guidance=guidance)
    _synchronize(device)
    seconds = time.perf_counter() - start
    phases = dict(result.stats.phases)
    first = result.stats.first_token_seconds
    if device.type == "cuda" and first is not None:
        # The host's clock sees the prefill being launched, and the rest of it as waiting. The prefill ends a step
        # before the first token arrives.
        phases |= {"prefill": max(0.0, first - (seconds - first) / max(tokens - 1, 1)), "host": 0.0}
    phases["host"] = phases.get("host", 0.0) + max(0.0, seconds - sum(phases.values()))
    resident = dict(result.stats.cache_bytes)
    return BaselineRun(
        tokens=[list(row.tokens) for row in result],
        seconds=seconds,
        phases=phases,
        cache_resident_bytes=resident,
        cache_peak_bytes=resident,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
