"""Continuous batching: waiting prompts enter free slots, every step decides a token per row, finished rows leave."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rgtg_fast.engine.batch import Batch, Row, SlotState
from rgtg_fast.engine.graphs import StepGraphs, bucket
from rgtg_fast.engine.invariance import needs_products, products
from rgtg_fast.engine.outputs import (
    Decision,
    GeneratedRow,
    StreamChunk,
    TraceTensors,
    decisions_of,
    trace_tensors,
    write_trace,
)
from rgtg_fast.engine.request import Run, check_candidates, check_fits
from rgtg_fast.engine.step import DecodeStep
from rgtg_fast.engine.step_variants import step_for
from rgtg_fast.engine.stopping import shown_text
from rgtg_fast.errors import RewardNaNError, RGTGError
from rgtg_fast.models.device import AsyncCopy, free_bytes, to_device
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.ops.finish_step import NO_CANDIDATE, OK
from rgtg_fast.rewards.base import Reward


@dataclass
class InFlightStep:
    """A step that the host has launched and not yet seen the decisions of.

    Attributes:
        rows: rows of its slots at the launch.
        guided: for each row, whether the step used its reward.
        copy: copy of its tensors on the host.
    """

    rows: list[Row]
    guided: list[bool]
    copy: AsyncCopy


class Scheduler:
    """Decodes the rows of a run in slots of one prefix cache per model.

    Args:
        lm: the base model.
        reward: bound to it.
        max_batch: rows decoded at once.
        graphs: whether steps are replayed as CUDA graphs. None: on CUDA, where the reward stays on the device.
        pad_batch: whether every step runs `max_batch` rows, missing ones empty.
        batch_invariant: whether a row's bits must not depend on its batch.

    Attributes:
        max_in_flight: steps that the device may be ahead of the host, 0 or 1.
        graphs: None where steps are not replayed.
        invariant: whether steps compute their products by `InvariantProducts`.
        eos: [Z] int64, ids that end a row.

    Raises:
        RGTGError: graphs where they are impossible, or models whose bits depend on the batch.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reward: Reward,
        max_batch: int,
        graphs: bool | None = None,
        pad_batch: bool = False,
        batch_invariant: bool = False,
    ):
        self.lm, self.reward = lm, reward
        self.max_batch, self.pad_batch = max_batch, pad_batch
        self.invariant = batch_invariant and needs_products(self.models(), reward)
        device = lm.runner.device
        reason = None if device.type == "cuda" else f"the models are on {device}"
        # The reward's own models may be on another device.
        self.two_devices = any(model.device != device for model in self.models())
        if reason is None and self.two_devices:
            reason = "the models are on two devices"
        self.max_in_flight = 1 if reason is None else 0
        if not reward.on_device:
            reason = reason or f"{reward.name} reads on the host"
        if graphs and reason is not None:
            raise RGTGError(f"graphs=True and {reason}: leave graphs out")
        self.graphs: StepGraphs | None = None
        if reason is None and graphs is not False:
            self.graphs = StepGraphs(self.execute, lm.runner, reward)
        self._slots = SlotState.empty(0, device)
        self._eos_ids: frozenset[int] = frozenset()
        self.eos = torch.zeros(0, dtype=torch.int64, device=device)

    def models(self) -> list[ModelRunner]:
        """The base model and the reward's own."""
        return [self.lm.runner, *self.reward.models()]

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of each model's prefix cache."""
        return {"lm": self.lm.runner.cache.nbytes(), "reward": self.reward.cache_bytes()}

    def bytes_per_row(self, lm_length: int, reward_length: int) -> int:
        """Bytes that a row takes in all caches.

        Args:
            lm_length: its tokens in each context of the base model.
            reward_length: its tokens in the reward's own models.
        """
        contexts = 1 + self.reward.prompt_contexts
        lm = self.lm.runner.cache.row_bytes(lm_length) * contexts
        return lm + self.reward.row_bytes(reward_length)

    def memory_for_caches(self, longest: int) -> int | None:
        """Bytes that all caches may take, with what they hold now; None where it is unknown.

        Args:
            longest: tokens of the longest prompt, whose prefill may take memory besides its rows.
        """
        each = [free_bytes(device) for device in dict.fromkeys(model.device for model in self.models())]
        if None in each:
            return None
        # On two devices this is too much for a batch whose caches are uneven; then one of them refuses it.
        free = sum(filter(None, each))
        prefill = max(model.cache.prefill_bytes(longest) for model in self.models())
        return max(0, free + sum(self.cache_bytes().values()) - prefill)

    # ---- results ----------------------------------------------------------------------------------------------------

    def rows(self, run: Run) -> Iterator[GeneratedRow]:
        """Rows as they finish.

        Raises:
            RewardNaNError: a NaN reward; carries the rows finished before it.
        """
        done: list[GeneratedRow] = []
        try:
            for rows in self._steps(run):
                for row in rows:
                    if row.finish_reason is not None:
                        done.append(row.finished(self.reward, run.trace))
                        yield done[-1]
        except RewardNaNError as error:
            error.finished = done
            raise

    def chunks(self, run: Run) -> Iterator[StreamChunk]:
        """The text of a run's only row, token by token."""
        row, shown = run.rows[0], 0
        for _ in self._steps(run):
            ended = row.finish_reason is not None
            text = row.text if ended else shown_text(self.lm, row.answer, run.stopping.stops)
            candidates = row.trace[-1].candidates if run.trace else []
            yield StreamChunk(text[shown:], row.last_token, candidates, row.finish_reason)
            shown = max(shown, len(text))

    def steps(self, run: Run) -> Iterator[list[Row]]:
        """The rows that each step advanced; one that the caller ends (`run.stopping.finish`) leaves its slot."""
        return self._steps(run)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _steps(self, run: Run) -> Iterator[list[Row]]:
        """One iteration per step, when the host has seen its decisions: the rows that it advanced."""
        # A gate is decided by the host, step by step; so is a reward that reads the rows' answers there.
        device_only = self.reward.on_device and not run.gated and not self.two_devices
        # The phases of a graph could not be told apart.
        graphs = self.graphs if device_only and not (run.timer.spans or run.timer.synchronize) else None
        max_in_flight = self.max_in_flight if device_only else 0
        waiting = deque(sorted(run.rows, key=lambda row: row.guidance.support == "all"))
        in_flight: deque[InFlightStep] = deque()
        self._reserve(run, graphs)
        batch = Batch(self._slots, self._bucket(run, graphs))
        step: DecodeStep | None = None
        while waiting or batch:
            with run.timer("prefill"):
                changed = self._admit(run, batch, waiting)
            if changed or step is None:
                step = step_for(batch, self.lm, self.reward, self.eos, run.timer)
            in_flight.append(self._launch(run, batch, step, graphs))
            while len(in_flight) > self._allowed(batch, len(in_flight), run, max_in_flight):
                with run.timer("host"):
                    rows = self._advance(run, in_flight.popleft())
                if rows:
                    self._count(run, graphs)
                    yield rows
                with run.timer("host"):
                    if self._retire(batch):
                        step = None

    def execute(self, batch: Batch, trace: bool, step: DecodeStep | None = None) -> list[torch.Tensor]:
        """Executes one step; its decision [5, B], and with `trace` the tensors of a trace."""
        step = step or step_for(batch, self.lm, self.reward, self.eos)
        with products(self.invariant):
            decision, tensors = step(batch)
        return [decision, *(trace_tensors(batch, tensors) if trace else ())]

    def _launch(self, run: Run, batch: Batch, step: DecodeStep, graphs: StepGraphs | None) -> InFlightStep:
        if graphs is None:
            tensors = self.execute(batch, run.trace, step)
        else:
            with run.timer("step"):
                tensors = graphs(batch, run.trace)
        return InFlightStep(list(batch.rows), list(batch.guided), AsyncCopy(tensors))

    def _allowed(self, batch: Batch, in_flight: int, run: Run, most: int) -> int:
        """Steps that may stay in flight: none where those in flight decide the last token of every row."""
        more = any(len(row.answer) + in_flight < run.max_new_tokens for row in batch.rows)
        return most if more else 0

    # ---- slots ------------------------------------------------------------------------------------------------------

    def _admit(self, run: Run, batch: Batch, waiting: deque[Row]) -> bool:
        """Waiting prompts enter free slots; whether any did."""
        changed = False
        while waiting and len(batch) < self.max_batch:
            whole = waiting[0].guidance.support == "all"
            if batch and (batch.rows[0].guidance.support == "all") != whole:
                break  # the candidates of the two supports differ in shape
            row = waiting.popleft()
            slot = batch.add(row, run.max_new_tokens)
            self.lm.admit(slot, [row.prompt_ids, *row.encoded[: self.reward.prompt_contexts]])
            self.reward.admit(slot, row, row.encoded)
            changed = True
        if changed:
            batch.refresh()
        return changed

    def _retire(self, batch: Batch) -> bool:
        """Finished rows leave their slots, which the last rows take; whether any did."""
        finished = [slot for slot, row in enumerate(batch.rows) if row.finish_reason is not None]
        for slot in reversed(finished):
            source = batch.remove(slot)
            if source != slot:
                self.lm.move(source, slot)
                self.reward.move(source, slot)
        if finished and batch:
            batch.refresh()
        return bool(finished)

    # ---- decisions on the host --------------------------------------------------------------------------------------

    def _advance(self, run: Run, step: InFlightStep) -> list[Row]:
        """Appends each row's token and ends rows; returns the rows that had not ended before."""
        decision, *trace = step.copy.get()
        slots = [slot for slot, row in enumerate(step.rows) if row.finish_reason is None]
        decisions = decisions_of(decision)
        self._check(step, slots, decisions)
        rewarded = [guided and self.reward.gives_rewards for guided in step.guided]
        if trace:
            traced = [(slot, step.rows[slot], rewarded[slot]) for slot in slots]
            write_trace(traced, TraceTensors(*trace), self.lm)
        scored = any(step.guided)
        for slot in slots:
            row, decided = step.rows[slot], decisions[slot]
            row.last_token = decided.token
            row.guided_logprob = (row.guided_logprob or 0.0) + decided.chosen_logprob
            row.logprobs.append(decided.logprob)
            if self.reward.gives_rewards:
                row.rewards.append(decided.reward if rewarded[slot] else math.nan)
            if not scored:
                row.unscored.append(decided.token)
            row.answer.append(decided.token)
            reason = run.stopping.reason(row.answer)
            if reason == "eos":
                row.answer.pop()
            run.stopping.finish(row, reason)
        stats = run.stats
        stats.tokens += len(slots)
        stats.guided_tokens += sum(rewarded[slot] for slot in slots)
        stats.steps += 1
        if stats.first_token_seconds is None:
            stats.first_token_seconds = time.perf_counter() - run.started
        return [step.rows[slot] for slot in slots]

    def _check(self, step: InFlightStep, slots: list[int], decisions: list[Decision]) -> None:
        """Refuses NaN and +inf rewards, and rows without a candidate."""
        for slot in slots:
            row, code = step.rows[slot], decisions[slot].error_code
            if code == NO_CANDIDATE:
                raise RGTGError(
                    f"no candidate of prompt {row.prompt.index}, step {len(row.answer)} has a finite score: "
                    "check that the reward leaves at least one candidate above -inf"
                )
            if code != OK:
                raise RewardNaNError(row.prompt.index, len(row.answer), code, self.lm.token_text(code))

    def _count(self, run: Run, graphs: StepGraphs | None) -> None:
        """Updates the run's statistics."""
        stats, lm, reward = run.stats, self.lm.runner.counter, self.reward.counter
        stats.seconds = time.perf_counter() - run.started
        stats.lm_calls, stats.lm_tokens, stats.prompt_tokens_lm = lm.calls, lm.tokens, lm.prompt_tokens
        stats.reward_calls, stats.reward_tokens = reward.calls, reward.tokens
        stats.prompt_tokens_reward = reward.prompt_tokens
        stats.phases = dict(run.timer.seconds)
        stats.graph_seconds = 0.0 if graphs is None else graphs.seconds
        stats.cache_bytes = self.cache_bytes()

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _reserve(self, run: Run, graphs: StepGraphs | None) -> None:
        """Allocates one prefix cache per model, as large as the run needs."""
        runner, reward, slots = self.lm.runner, self.reward, self._slots_of(run)
        contexts = [ids for row in run.rows for ids in row.encoded[: reward.prompt_contexts]]
        prompts = [row.prompt_ids for row in run.rows]
        lm_length = max(map(len, [*prompts, *contexts])) + run.max_new_tokens
        encoded = [ids for row in run.rows for ids in row.encoded]
        reward_length = max(map(len, encoded), default=0) + run.max_new_tokens
        row_bytes = self.bytes_per_row(lm_length, reward_length)
        longest = max(map(len, [*prompts, *contexts, *encoded]))
        check_fits(row_bytes, slots, max(lm_length, reward_length), self.memory_for_caches(longest))
        widest = max((row.guidance.k for row in run.rows if row.guidance.support != "all"), default=0)
        check_candidates(self._candidate_bytes() * slots, widest, slots, free_bytes(runner.device))
        self.lm.reserve(slots, lm_length, reward.prompt_contexts, reward.shared_forward)
        reward.reserve(slots, reward_length)
        if len(self._slots.tokens) < slots:
            self._slots = SlotState.empty(slots, runner.device)
        if run.stopping.eos_ids != self._eos_ids:
            self._eos_ids = run.stopping.eos_ids
            self.eos = to_device(sorted(self._eos_ids), torch.int64, runner.device)
            if self.graphs is not None:
                self.graphs.forget()  # they read the tensor that was replaced
        if graphs is not None:
            graphs.begin(self._slots)

    def _candidate_bytes(self) -> int:
        """Bytes that a candidate takes in a step, in the models that execute candidates."""
        lm, reward = self.lm.runner, self.reward
        parts = [part for part in reward.stateful() if not part.parts and not part.scores_vocabulary]
        own = sum(model.step_bytes_per_token for part in parts for model in part.models())
        return own + (lm.step_bytes_per_token * (1 + reward.prompt_contexts) if reward.shared_forward else 0)

    def _slots_of(self, run: Run) -> int:
        return self.max_batch if self.pad_batch else min(self.max_batch, len(run.rows))

    def _bucket(self, run: Run, graphs: StepGraphs | None) -> Callable[[int], int]:
        """From the number of active rows to that of a step: the same, the next graph's, or always all."""
        slots = self._slots_of(run)
        # The host reads a gate's entropy row by row: such a run is not padded.
        if self.pad_batch and not run.gated:
            return lambda rows: slots
        return (lambda rows: rows) if graphs is None else (lambda rows: bucket(rows, slots))
