"""The decoder: the loop of the paper over one prefix cache per model."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.config import Guidance, Strategy, whole
from rgtg_fast.engine.batch import Batch, Row, SlotState
from rgtg_fast.engine.decision import Decision, unpacked
from rgtg_fast.engine.graphs import StepGraphs, bucket
from rgtg_fast.engine.locks import Turns
from rgtg_fast.engine.memory import check_candidates, check_fits
from rgtg_fast.engine.outputs import GeneratedRow, GenerationResult, Stats, StreamChunk
from rgtg_fast.engine.strategies import Call, StoppingCriteria, check_strategy, named_strategy, run_strategy
from rgtg_fast.engine.text import as_stops, before_stop, shown_text
from rgtg_fast.engine.trace import Seen, seen, write_trace
from rgtg_fast.errors import RewardNaNError, RGTGError, shown
from rgtg_fast.models.autocast import without_autocast
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    language_runner,
    load_causal_lm,
    resolve_dtype,
)
from rgtg_fast.models.memory import free_bytes
from rgtg_fast.models.prompts import Prompt, PromptLike, as_answers, as_prompts, check_known
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.models.transfer import AsyncCopy, to_device
from rgtg_fast.ops import finish_step, resample, topk_logprobs
from rgtg_fast.ops.finish_step import NO_CANDIDATE, OK
from rgtg_fast.profiling import PhaseTimer
from rgtg_fast.rewards import FunctionReward, Reward, SequenceReward, named_guide

RewardLike = Reward | str | os.PathLike[str] | ModelAndTokenizer | Callable[..., Any] | None


@dataclass
class _Run:
    """One call: its rows, its settings and its counters."""

    rows: list[Row]
    max_new_tokens: int
    stops: list[str]
    trace: bool
    timer: PhaseTimer
    ahead: int  # steps that may be on the device before the host looks at their decisions
    graphs: StepGraphs | None
    stats: Stats = field(default_factory=Stats)
    started: float = field(default_factory=time.perf_counter)


@dataclass
class InFlightStep:
    """A step whose decision is on its way to the host: the rows of its slots then, and which of them it guided."""

    rows: list[Row]
    guided: list[bool]
    arrival: AsyncCopy


class RewardGuidedDecoder:
    """Decodes from π(v)·exp(β·r(v)) over the top k next tokens of a frozen language model.

    Build one with `from_pretrained`, then call `generate`, `iterate`, `stream` or `score`. A decoder holds one prefix
    cache per model and decodes one call at a time: threads wait for each other, and an iterator that is not through
    ends with an error once a newer call has begun. Several decoders may have models and reward objects in common.

    Args:
        lm: the base language model. reward: the guide, already bound to it, or None.
        max_batch: rows decoded at once; more prompts wait for a free place.
        graphs: whether steps are replayed as CUDA graphs. None: on CUDA, where the guide stays on the device.
        pad_batch: whether every step runs `max_batch` rows, missing ones empty.

    Attributes:
        ahead: steps that the device may be ahead of the host, 0 or 1: by default 1 on CUDA. Rows then end, leave and
            are replaced one step late, and the tokens are the same. A guide that reads on the host, or a gate, leaves
            0.
        phase_timer: makes the timer of a call; `lambda: PhaseTimer(spans=True)` puts the phases into torch's profiler
            and NVTX.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reward: Reward | None,
        max_batch: int,
        graphs: bool | None = None,
        pad_batch: bool = False,
    ):
        self.lm, self.reward, self.pad_batch = lm, reward, pad_batch
        self.max_batch = whole("max_batch", max_batch, 1, 8)
        if reward is not None:
            reward.used_by(self)
        # As the guide was bound, to be bound again where another decoder has taken it over.
        self._binding: dict[str, Any] = {"dtype": None, "engine": "auto", "max_length": None}
        self.phase_timer: Callable[[], PhaseTimer] = PhaseTimer
        reason = None if lm.runner.device.type == "cuda" else f"the models are on {lm.runner.device}"
        self.ahead = 1 if reason is None else 0
        if reward is not None and not reward.on_device:
            reason = reason or f"{reward.name} reads on the host"
        if graphs and reason is not None:
            raise RGTGError(f"graphs=True and {reason}: leave graphs out")
        self._graphs: StepGraphs | None = None
        if reason is None and graphs is not False:
            self._graphs = StepGraphs(self._graphed_step, lm.runner, reward)
        self._slots = SlotState.empty(0, lm.runner.device)
        self._eos_ids: frozenset[int] = frozenset()
        self._eos = torch.zeros(0, dtype=torch.int64, device=lm.runner.device)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RGTGError(
            "a decoder cannot be copied or sent to another process: make one there with from_pretrained"
        )

    @classmethod
    @without_autocast()
    def from_pretrained(
        cls,
        lm: str | os.PathLike[str] | ModelAndTokenizer,
        reward: RewardLike = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_batch: int = 8,
        max_length: int | None = None,
        engine: str = "auto",
        graphs: bool | None = None,
        compile: bool | Mapping[str, Any] = False,
        pad_batch: bool = False,
        fuse_projections: bool | None = None,
    ) -> RewardGuidedDecoder:
        """Loads a base model and its guide.

        Args:
            lm: path or hub id of a causal language model, or a (model, tokenizer) pair.
            reward: path or hub id of a reward model (a `SequenceReward`), after a method's name and a colon
                (`"farma:path"`, see `named_guide`) for another guide, a reward object, a (model, tokenizer) pair (a
                `SequenceReward`), a function f(prefix_ids, candidate_ids) -> rewards, or None for the base model alone.
            device: by default CUDA where there is one, a loaded model's own.
            dtype: by default float32 on a CPU, bfloat16 on CUDA, a loaded model's own.
            max_batch: rows decoded at once.
            max_length: tokens a row may reach, prompt included; by default what both contexts hold.
            engine: "native" (fused C++ layers, CPU), "transformers" (the model's own blocks) or "auto".
            graphs: whether a step is replayed as a CUDA graph. None: on CUDA, unless the guide reads on the host.
            compile: whether the models' blocks run as compiled code in steps (torch.compile; engine "transformers").
                Each number of rows and of candidates is compiled at its first use, for tens of seconds. A dictionary
                holds torch.compile's options, such as `{"coordinate_descent_tuning": True}`.
            pad_batch: whether every step runs `max_batch` rows, missing ones empty. Matrix products on CUDA round by
                the number of their rows; padded, a row's text depends on no other row there too, as long as all have
                the same k. The native engine needs no such thing; a run with a gate or a strategy is not padded.
            fuse_projections: whether linear layers that read the same input (q, k, v; gate, up) run as one product
                (engine "transformers"). Their weights then lie in one tensor, a loaded model's too. None: on CUDA.

        Raises:
            RGTGError: anything that cannot work, in one line.
        """
        max_batch = whole("max_batch", max_batch, 1, 8)
        if max_length is not None:
            max_length = whole("max_length", max_length, 2, 512)
        if not isinstance(compile, (bool, Mapping)):
            raise RGTGError(f"compile={shown(compile)} is neither True, False nor torch.compile's options")
        guide = _as_reward(reward)
        model, tokenizer = load_causal_lm(lm, device, dtype)
        runner = language_runner(model, engine, max_length)
        vocabulary = min(runner.head.out_features, runner.embeddings)
        language_model = LanguageModel(runner, tokenizer, vocabulary)
        kind = None if dtype is None else resolve_dtype(dtype, model.device)
        binding = {"dtype": kind, "engine": engine, "max_length": max_length}
        if guide is not None:
            guide = guide.for_decoder()
            guide.bind(language_model, **binding)
        decoder = cls(language_model, guide, max_batch, graphs, pad_batch)
        decoder._binding = binding
        if fuse_projections or (fuse_projections is None and runner.device.type == "cuda"):
            for each in decoder._models():
                each.fuse_projections()
        if compile is not False:
            decoder.compile(None if compile is True else compile)
        return decoder

    def compile(self, options: Mapping[str, Any] | None = None) -> None:
        """Steps run the models' blocks as compiled code from the next call on.

        Args:
            options: torch.compile's.

        Raises:
            RGTGError: the engine is native, or an option is unknown.
        """
        for model in self._models():
            model.compile(options)
        if self._graphs is not None:
            self._graphs.forget()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base model's tokenizer."""
        return self.lm.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens a row may reach, prompt included, in every model's context."""
        limit = None if self.reward is None else self.reward.limit
        return self.lm.runner.limit if limit is None else min(limit, self.lm.runner.limit)

    def describe(self) -> dict[str, Any]:
        """Models, engines, dtype, device and cache bytes: what to print beside a result."""
        runner, guide = self.lm.runner, self.reward
        return {
            "lm": runner.name,
            "lm_engine": runner.engine,
            "reward": None if guide is None else guide.name,
            "reward_engine": None if guide is None else guide.engine,
            "reward_trunk": None if guide is None else guide.trunk,
            "device": str(runner.device),
            "dtype": str(runner.dtype).removeprefix("torch."),
            "max_batch": self.max_batch,
            "max_length": self.max_length,
            "graphs": self._graphs is not None,
            "compiled": any(model.compiled for model in self._models()),
            "cache_bytes": self._cache_bytes(),
        }

    # ---- calls --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        max_new_tokens: int = 128,
        guidance: Guidance | Sequence[Guidance] = Guidance(),
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        trace: bool = False,
        strategy: Strategy | str | None = None,
    ) -> GenerationResult:
        """Decodes an answer to each prompt.

        A row's tokens depend on its own prompt, seed and guidance alone, not on what else is in the call.

        Args:
            prompts: a string (tokenised as it is), a list of chat messages (through the chat template), a list of
                token ids, or a list of these; any lengths, any number.
            max_new_tokens: tokens of an answer, end-of-sequence included.
            guidance: one, or one per prompt. seed: one for all (equal prompts then get equal answers), or one each.
            stop: strings that end an answer and are cut from its text.
            trace: keep every step's candidates.
            strategy: how the models are spent: `BestOfN(...)`, `Segments(...)`, `Blocks(...)`, their names
                (`"best_of_n:n=8"`, see `named_strategy`), or None for token by token. A strategy samples the base model
                by its own settings and takes no guidance.

        Raises:
            RGTGError: a bad argument, or a prompt that cannot be answered, which it names before any is decoded.
            RewardNaNError: a NaN reward; carries the rows finished before it.

        Example:
            >>> result = decoder.generate("The sky is", max_new_tokens=8)  # doctest: +SKIP
            >>> result[0].text, result.stats.tokens_per_second  # doctest: +SKIP
        """
        with self._turns.taken():
            return self._generated(prompts, max_new_tokens, guidance, seed, stop, trace, strategy)

    def _generated(self, *request: Any) -> GenerationResult:
        *plan, strategy = request
        run = self._plan(*plan)
        rows = sorted(self._decoded(run, strategy), key=lambda row: row.index)
        return GenerationResult(rows, run.stats)

    def iterate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        max_new_tokens: int = 128,
        guidance: Guidance | Sequence[Guidance] = Guidance(),
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        trace: bool = False,
        strategy: Strategy | str | None = None,
    ) -> Iterator[tuple[int, GeneratedRow]]:
        """Like `generate`, giving (index, row) as soon as a row is finished."""
        with self._turns.taken():
            run = self._plan(prompts, max_new_tokens, guidance, seed, stop, trace)
            rows = self._decoded(run, strategy)
        return ((row.index, row) for row in self._turns.of(run, rows))

    def stream(
        self,
        prompt: PromptLike,
        max_new_tokens: int = 128,
        guidance: Guidance = Guidance(),
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        trace: bool = True,
    ) -> Iterator[StreamChunk]:
        """Like `generate` for one prompt, giving each token as it is chosen; without `trace`, no candidates.

        The pieces' texts join to the answer's text; text that may be the beginning of a stop string, or an unfinished
        character, waits for the next piece.
        """
        given = as_prompts(prompt, self.tokenizer)
        if len(given) != 1:
            raise RGTGError(
                f"stream takes one prompt and got {len(given)}: use generate or iterate for several"
            )
        with self._turns.taken():
            run = self._plan(given[0].given, max_new_tokens, guidance, seed, stop, trace)
        return self._turns.of(run, self._pieces(run))

    def score(
        self, prompts: PromptLike | Sequence[PromptLike], answers: str | Sequence[str | Sequence[int]]
    ) -> list[list[float]]:
        """Reward of every prefix y_{1:i} of given answers under the guide, in one forward per answer.

        Args:
            prompts: as in `generate`. answers: one per prompt, text or token ids.

        Raises:
            RGTGError: no guide, an empty answer, counts that differ, or a text over the context.
        """
        if self.reward is None:
            raise RGTGError("this decoder has no reward to score with: pass reward=... to from_pretrained")
        given, texts = as_prompts(prompts, self.tokenizer), as_answers(answers, self.tokenizer)
        if len(texts) != len(given):
            raise RGTGError(f"{len(texts)} answers for {len(given)} prompts: pass one answer per prompt")
        with self._turns.taken():
            self._turns.begin()
            rows = []
            for prompt, ids in zip(given, texts, strict=True):
                check_known(ids, self.lm.vocabulary, f"answer {prompt.index}")
                row = Row(prompt, self._prompt_ids(prompt))
                row.encoded = self.reward.encode(prompt)
                self._check_length(row, len(ids))
                rows.append(row)
            return [self.reward.score_answer(row, ids) for row, ids in zip(rows, texts, strict=True)]

    # ---- the loop -----------------------------------------------------------------------------------------------

    def _steps(self, run: _Run) -> Iterator[list[Row]]:
        """One iteration per token; the host may look at it `ahead` steps late. Gives the rows that it advanced."""
        phase, flights = run.timer, deque[InFlightStep]()
        waiting = deque(sorted(run.rows, key=lambda row: row.guidance.support == "all"))
        self._reserve(run)
        batch = Batch(self._slots, self._bucket(run))
        while waiting or batch:
            with phase("prefill"):
                self._admit(run, batch, waiting)
            flights.append(self._launch(run, batch))
            while len(flights) > self._in_flight(run, batch, len(flights)):
                with phase("host"):
                    rows = self._advance(run, flights.popleft())
                if rows:
                    yield rows
                with phase("host"):
                    self._retire(batch)

    def _step(self, batch: Batch, trace: bool, phase: PhaseTimer) -> list[torch.Tensor]:
        """Decides one token of every row: top-k → score → resample → commit.

        The host reads nothing of it but a gate's entropy. Returns the decision, and what a trace shows.
        """
        lm, reward, now = self.lm.runner, self.reward, batch.now
        with phase("lm"):
            logits, contexts = self._forward(batch)  # [B, V], [B, contexts, V]
        with phase("reward"):
            if reward is not None:
                reward.begin_step(contexts)
        with phase("topk"):
            logprobs, candidates, entropy = self._select(batch, logits)  # [B, k]
            batch.open_gates(entropy)
        if reward is not None and reward.fused and not batch.gated and batch.support != "all":
            with phase("reward"):
                rewards, choice, drawn = reward.choose(candidates, logprobs, *batch.draw)
        else:
            with phase("reward"):
                rewards = self._rewards(batch, candidates, logprobs)  # [B, k]
            with phase("resample"):
                choice, drawn = resample(logprobs, rewards, *batch.draw)
        with phase("commit"):
            shown = seen(now, batch.beta, logprobs, candidates, rewards, choice, entropy) if trace else ()
            state = now.tokens, now.position, now.limit, batch.widths, self._eos
            packed, kept = finish_step(logprobs, rewards, candidates, choice, drawn, *state)
            if lm.shared_forward:
                lm.commit(self._per_context(kept))
            if reward is not None and any(batch.guided):
                reward.commit(kept)
        return [packed, *shown]

    def _launch(self, run: _Run, batch: Batch) -> InFlightStep:
        """Sets a step going."""
        if run.graphs is None:
            tensors = self._step(batch, run.trace, run.timer)
        else:
            with run.timer("step"):
                tensors = run.graphs(batch, run.trace)
        return InFlightStep(list(batch.rows), list(batch.guided), AsyncCopy(tensors))

    def _in_flight(self, run: _Run, batch: Batch, flights: int) -> int:
        """Steps whose decisions may stay on their way: none where no row wants more tokens than they bring."""
        on = any(len(row.answer) + flights < run.max_new_tokens for row in batch.rows)
        return run.ahead if on else 0

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The base model's logits [B, V] for the next token, and those [B, contexts, V] in the guide's contexts.

        A guide that shares the forward has already run the newest token: as a candidate of the step before.
        """
        lm = self.lm.runner
        tokens = self._per_context(batch.now.tokens)
        if not lm.shared_forward:
            lm.step(tokens.clamp_min(0).unsqueeze(-1))
            # The one token of the step, or -1: a row that has ended stands still.
            lm.commit(tokens.clamp_max(0))
        logits = lm.next_logits(len(tokens))[:, : self.lm.vocabulary]
        per_prompt = logits.unflatten(0, (batch.width, self._contexts))
        return per_prompt[:, 0], per_prompt[:, 1:]

    def _select(self, batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The support: log-probabilities and tokens [B, k], and the base distribution's entropy [B]."""
        if batch.support == "all":
            logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            everything = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
            return logprobs, everything, topk_logprobs(logits, 1)[2]
        by_guidance = {}
        if batch.combined and self.reward is not None:
            by_guidance = {"guidance": self.reward.guidance().float(), "beta": batch.now.selection_beta}
        logprobs, candidates, entropy = topk_logprobs(logits, batch.k, **by_guidance)
        beyond = batch.beyond
        if beyond is not None:
            logprobs = logprobs.masked_fill(beyond, -torch.inf)
        return logprobs, candidates, entropy

    def _rewards(self, batch: Batch, candidates: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """The candidates' rewards [B, k]; zeros without a guide."""
        if self.reward is None or not any(batch.guided):
            return torch.zeros_like(logprobs)
        for slot, row in enumerate(batch.rows):
            if row.unseen:
                self._catch_up(slot, row)
        if self.lm.runner.shared_forward:
            self.lm.runner.step(self._per_context(candidates))
        whole = batch.support == "all"
        rewards = self.reward.guidance() if whole else self.reward.score(candidates)
        if not isinstance(rewards, torch.Tensor):
            raise RGTGError(f"{self.reward.name} gave {shown(rewards)}: score must return a tensor [B, k]")
        if batch.closed is not None:
            rewards = rewards.masked_fill(batch.closed, 0)
        return rewards.to(logprobs.dtype)

    def _catch_up(self, slot: int, row: Row) -> None:
        """The guide sees, in one chunk, the tokens that were decided without it."""
        assert self.reward is not None
        self.reward.append(slot, row.unseen)
        counter = self.reward.counter
        counter.calls += 1
        counter.tokens += len(row.unseen)
        counter.prompt_tokens -= len(row.unseen)  # where `append` has counted them
        row.unseen = []

    # ---- rows come and go ---------------------------------------------------------------------------------------

    def _admit(self, run: _Run, batch: Batch, waiting: deque[Row]) -> None:
        """Free slots take waiting prompts: all but the last prompt token enter the base model's cache.

        With a guide that shares the forward all of them do, as in every guide's own cache.
        """
        changed = False
        while waiting and len(batch) < self.max_batch:
            whole = waiting[0].guidance.support == "all"
            if batch and (batch.rows[0].guidance.support == "all") != whole:
                break  # the two supports have candidates of different shape
            row = waiting.popleft()
            slot = batch.add(row, run.max_new_tokens)
            own = row.encoded[: self._contexts - 1]
            for context, ids in enumerate([row.prompt_ids, *own]):
                new = ids if self.lm.runner.shared_forward else ids[:-1]
                self.lm.runner.begin(slot * self._contexts + context, new)
            if self.reward is not None:
                self.reward.admit(slot, row, row.encoded)
            changed = True
        if changed:
            batch.refresh()

    def _advance(self, run: _Run, flight: InFlightStep) -> list[Row]:
        """Appends each row's token on the host and decides whether the row ends there; rows that had ended stay out."""
        packed, *shown = flight.arrival.get()
        slots = [slot for slot, row in enumerate(flight.rows) if row.finish_reason is None]
        decisions = unpacked(packed)
        self._check(flight, slots, decisions)
        if shown:
            traced = [
                (slot, flight.rows[slot], flight.guided[slot] and self.reward is not None) for slot in slots
            ]
            write_trace(traced, Seen(*shown), self.lm)
        for slot in slots:
            row, decision, guided = flight.rows[slot], decisions[slot], flight.guided[slot]
            row.last_token = decision.token
            row.guided_logprob = (row.guided_logprob or 0.0) + decision.drawn
            row.logprobs.append(decision.logprob)
            if self.reward is not None:
                row.rewards.append(decision.reward if guided else math.nan)
            row.unseen += [] if any(flight.guided) else [decision.token]
            if decision.token in self._eos_ids:
                row.finish_reason = "eos"
            else:
                row.answer.append(decision.token)
            before = before_stop(self.lm, row.answer, run.stops)
            if before is not None:
                row.finish_reason = "stop"
            elif row.finish_reason is None and len(row.answer) == run.max_new_tokens:
                row.finish_reason = "length"
            if row.finish_reason is not None:
                row.text = self.lm.text(row.answer) if before is None else before
        run.stats.tokens += len(slots)
        run.stats.guided_tokens += 0 if self.reward is None else sum(flight.guided[slot] for slot in slots)
        run.stats.steps += 1
        if run.stats.first_token_seconds is None:
            run.stats.first_token_seconds = time.perf_counter() - run.started
        return [flight.rows[slot] for slot in slots]

    def _check(self, flight: InFlightStep, slots: list[int], decisions: list[Decision]) -> None:
        """Refuses rewards that are no numbers, and rows that have nothing to choose from."""
        for slot in slots:
            row, fault = flight.rows[slot], decisions[slot].fault
            if fault == NO_CANDIDATE:
                raise RGTGError(
                    f"no candidate of prompt {row.prompt.index}, step {len(row.answer)} has a finite score: "
                    "check that the reward leaves at least one candidate above -inf"
                )
            if fault != OK:
                raise RewardNaNError(row.prompt.index, len(row.answer), fault, self.lm.token_text(fault))

    def _retire(self, batch: Batch) -> None:
        """Finished rows leave their slots, which the last rows take."""
        finished = [slot for slot, row in enumerate(batch.rows) if row.finish_reason is not None]
        for slot in reversed(finished):
            source = batch.remove(slot)
            if source == slot:
                continue
            for context in range(self._contexts):
                self.lm.runner.move(source * self._contexts + context, slot * self._contexts + context)
            if self.reward is not None:
                self.reward.move(source, slot)
        if finished and batch:
            batch.refresh()

    def _decoded(self, run: _Run, strategy: Strategy | str | None) -> Iterator[GeneratedRow]:
        """Rows as they finish, token by token or by a strategy."""
        chosen = named_strategy(strategy) if isinstance(strategy, str) else strategy
        if chosen is None:
            return self._finished(run)
        check_strategy(chosen, self.reward)
        if run.trace or any(row.guidance != Guidance() for row in run.rows):
            raise RGTGError(
                f"{type(chosen).__name__} does not choose token by token: leave out guidance and trace, and give its "
                "own settings instead"
            )

        def sampled(prompts: list[PromptLike], guidance: Guidance, seeds: list[int]) -> GenerationResult:
            runner = self.lm.runner
            shared_forward = runner.shared_forward
            # No guide looks on: a step runs one token a row, whatever a guide that shares the forward would want.
            runner.shared_forward = False
            try:
                unguided = RewardGuidedDecoder(self.lm, None, self.max_batch, graphs=False)
                request = prompts, run.max_new_tokens, guidance, seeds, run.stops or None, False, None
                return unguided._generated(*request)
            finally:
                runner.shared_forward = shared_forward
                self._claim(run)

        ends = StoppingCriteria(self.lm, run.max_new_tokens, run.stops)
        call = Call(self.lm, self.reward, run.rows, ends, self.max_batch, sampled, run.stats)
        return self._by_strategy(run, run_strategy(chosen, call))

    def _by_strategy(self, run: _Run, rows: Iterator[GeneratedRow]) -> Iterator[GeneratedRow]:
        """The rows of a strategy, timed."""
        done: list[GeneratedRow] = []
        try:
            for row in rows:
                run.stats.seconds = time.perf_counter() - run.started
                run.stats.cache_bytes = self._cache_bytes()
                done.append(row)
                yield row
        except RewardNaNError as error:
            error.finished = done
            raise

    def _finished(self, run: _Run) -> Iterator[GeneratedRow]:
        """Rows as they finish."""
        done: list[GeneratedRow] = []
        answer_reward = None if self.reward is None else self.reward.answer_reward
        try:
            for rows in self._steps(run):
                self._count(run)
                for row in rows:
                    if row.finish_reason is not None:
                        done.append(row.finished(answer_reward, run.trace))
                        yield done[-1]
        except RewardNaNError as error:
            error.finished = done
            raise

    def _pieces(self, run: _Run) -> Iterator[StreamChunk]:
        """The one row's text in pieces."""
        row, shown = run.rows[0], 0
        for _ in self._steps(run):
            self._count(run)
            ended = row.finish_reason is not None
            text = row.text if ended else shown_text(self.lm, row.answer, run.stops)
            candidates = row.trace[-1].candidates if run.trace else []
            yield StreamChunk(text[shown:], row.last_token, candidates, row.finish_reason)
            shown = max(shown, len(text))

    # ---- before the loop ------------------------------------------------------------------------------------------

    def _plan(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        max_new_tokens: int,
        guidance: Guidance | Sequence[Guidance],
        seed: int | Sequence[int],
        stop: str | Sequence[str] | None,
        trace: bool,
    ) -> _Run:
        """Checks everything that can be checked before the first forward."""
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, 128)
        given = as_prompts(prompts, self.tokenizer)
        settings = list(guidance) if isinstance(guidance, Sequence) else [guidance] * len(given)
        listed: Any = seed
        listed = listed.tolist() if hasattr(listed, "tolist") else listed
        seeds = list(listed) if isinstance(listed, Sequence) else [listed] * len(given)
        for name, values in (("guidance", settings), ("seed", seeds)):
            if len(values) != len(given):
                raise RGTGError(
                    f"{len(values)} values of {name} for {len(given)} prompts: pass one, or one per prompt"
                )
        self._turns.begin()
        rows = []
        for prompt, setting, number in zip(given, settings, seeds, strict=True):
            self._check_guidance(setting)
            number = whole("seed", number, example=0)
            if not -(2**63) <= number < 2**63:
                raise RGTGError(f"seed={shown(number)} is not a 64-bit whole number: use for example 0")
            row = Row(
                prompt, self._prompt_ids(prompt), weights=setting.weights, guidance=setting, seed=number
            )
            row.encoded = [] if self.reward is None else self.reward.encode(prompt)
            self._check_length(row, max_new_tokens)
            rows.append(row)
        stops = as_stops(stop)
        if stops and self.tokenizer is None:
            raise RGTGError(
                "stop strings need text and the model came without a tokenizer: pass (model, tokenizer)"
            )
        timer = self.phase_timer()
        # A gate is opened by the host, step by step; so is a guide that reads the rows' answers there.
        gated = any(row.guidance.gate_entropy for row in rows)
        free = not gated and (self.reward is None or self.reward.on_device)
        # Phases inside a graph could not be told apart.
        graphs = self._graphs if free and not (timer.spans or timer.synchronize) else None
        ahead = self.ahead if free else 0
        run = _Run(rows, max_new_tokens, stops, trace, timer, ahead, graphs)
        self._claim(run)
        return run

    def _claim(self, run: _Run) -> None:
        """The caches and the guide belong to a run from now on."""
        self._turns.claim(run)
        self.lm.runner.contexts = self._contexts

    def _check_guidance(self, guidance: Guidance) -> None:
        if not isinstance(guidance, Guidance):
            raise RGTGError(f"guidance={shown(guidance)} is not a Guidance: pass Guidance(k=10, beta=1.0)")
        if guidance.support != "all" and guidance.k > self.lm.vocabulary:
            raise RGTGError(
                f"k={guidance.k} exceeds the vocabulary (V={self.lm.vocabulary}): use k <= {self.lm.vocabulary}"
            )
        wide = guidance.support == "all" if self.reward is None else self.reward.wide
        if guidance.support != "lm" and not wide:
            guide = "no reward" if self.reward is None else self.reward.name
            raise RGTGError(
                f"support={guidance.support!r} needs a reward over the whole vocabulary and this decoder has {guide}: "
                "use support='lm', or a guide such as ContrastiveReward"
            )
        if guidance.gate_entropy is not None and (self.reward is None or not self.reward.appends):
            guide = "none" if self.reward is None else self.reward.name
            raise RGTGError(
                f"gate_entropy={guidance.gate_entropy} needs a guide that can catch up with skipped tokens and this "
                f"decoder has {guide}: use a SequenceReward with a cache of its own (an adapter with share_trunk=False)"
            )
        if guidance.weights is not None:
            parts = 0 if self.reward is None else self.reward.parts
            if len(guidance.weights) != parts:
                raise RGTGError(
                    f"{len(guidance.weights)} weights in the guidance and this decoder mixes {parts} guides: "
                    "pass one weight per guide of a MixtureReward"
                )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = prompt.ids(self.tokenizer)
        known = min(self.lm.runner.head.out_features, self.lm.runner.embeddings)
        check_known(ids, known, f"prompt {prompt.index}")
        return ids

    def _check_length(self, row: Row, new_tokens: int) -> None:
        if not row.prompt_ids:
            raise RGTGError(f"prompt {row.prompt.index} is empty: pass at least one token")
        limits = [("base model", len(row.prompt_ids), self.lm.runner.limit)]
        limit = None if self.reward is None else self.reward.limit
        if limit is not None:
            limits += [("reward", len(ids), limit) for ids in row.encoded]
        for role, length, most in limits:
            if length + new_tokens > most:
                raise RGTGError(
                    f"prompt {row.prompt.index} has {length} tokens for the {role}; {new_tokens} new ones exceed its "
                    f"{most}: shorten the prompt or use max_new_tokens <= {max(most - length, 0)}"
                )

    def _reserve(self, run: _Run) -> None:
        """One prefix cache per model, as large as the call needs."""
        slots = self._slots_of(run)
        own = [ids for row in run.rows for ids in row.encoded]
        shared = [ids for row in run.rows for ids in row.encoded[: self._contexts - 1]]
        lm_length = max(map(len, [*(row.prompt_ids for row in run.rows), *shared])) + run.max_new_tokens
        reward_length = max(map(len, own), default=0) + run.max_new_tokens
        runner, reward = self.lm.runner, self.reward
        row_bytes = runner.cache_bytes_per_token * lm_length * self._contexts
        if reward is not None:
            row_bytes += reward.cache_bytes_per_token * reward_length
        free = free_bytes(runner.device)
        held = sum(self._cache_bytes().values())
        check_fits(row_bytes, slots, max(lm_length, reward_length), None if free is None else free + held)
        widest = max((row.guidance.k for row in run.rows if row.guidance.support != "all"), default=0)
        check_candidates(self._candidate_bytes * slots, widest, slots, free)
        runner.reserve(slots * self._contexts, lm_length)
        if reward is not None:
            reward.reserve(slots, reward_length)
        if len(self._slots.tokens) < slots:
            self._slots = SlotState.empty(slots, runner.device)
        if self.lm.eos_ids != self._eos_ids:
            self._eos_ids = self.lm.eos_ids
            self._eos = to_device(sorted(self._eos_ids), torch.int64, runner.device)
            if self._graphs is not None:
                self._graphs.forget()  # they read the tensor that was replaced
        if run.graphs is not None:
            run.graphs.begin(self._slots)

    def _slots_of(self, run: _Run) -> int:
        return self.max_batch if self.pad_batch else min(self.max_batch, len(run.rows))

    def _bucket(self, run: _Run) -> Callable[[int], int]:
        """Rows of a step for a number of rows: as many, those of the next graph, or always all."""
        slots = self._slots_of(run)
        # The host looks at a gate's entropy row by row.
        if self.pad_batch and not any(row.guidance.gate_entropy for row in run.rows):
            return lambda rows: slots
        return (lambda rows: rows) if run.graphs is None else (lambda rows: bucket(rows, slots))

    def _graphed_step(self, batch: Batch, trace: bool) -> list[torch.Tensor]:
        return self._step(batch, trace, PhaseTimer())

    # ---- small things -------------------------------------------------------------------------------------------

    @property
    def _turns(self) -> Turns:
        return Turns(self.lm, self.reward, self._binding)

    @property
    def _contexts(self) -> int:
        """Rows of the base model's batch per prompt."""
        return 1 if self.reward is None else 1 + self.reward.contexts

    def _models(self) -> list[ModelRunner]:
        return [self.lm.runner, *([] if self.reward is None else self.reward.models())]

    @property
    def _candidate_bytes(self) -> int:
        """Bytes of a candidate while a step scores it, by the models that run candidates."""
        lm, guides = self.lm.runner, [] if self.reward is None else self.reward.stateful()
        own = [model for guide in guides if not guide.parts and not guide.wide for model in guide.models()]
        shared = lm.step_bytes_per_token * self._contexts if lm.shared_forward else 0
        return shared + sum(model.step_bytes_per_token for model in own)

    def _per_context(self, of_prompt: torch.Tensor) -> torch.Tensor:
        """What belongs to a prompt [B, ...], for each of its rows in the base model's batch."""
        return of_prompt if self._contexts == 1 else of_prompt.repeat_interleave(self._contexts, 0)

    def _cache_bytes(self) -> dict[str, int]:
        guide = 0 if self.reward is None else self.reward.cache_bytes()
        return {"lm": self.lm.runner.cache.nbytes(), "reward": guide}

    def _count(self, run: _Run) -> None:
        """Brings the run's statistics up to date."""
        stats, lm = run.stats, self.lm.runner.counter
        stats.seconds = time.perf_counter() - run.started
        stats.lm_calls, stats.lm_tokens, stats.prompt_tokens_lm = lm.calls, lm.tokens, lm.prompt_tokens
        if self.reward is not None:
            guide = self.reward.counter
            stats.reward_calls, stats.reward_tokens = guide.calls, guide.tokens
            stats.prompt_tokens_reward = guide.prompt_tokens
        stats.phases = dict(run.timer.seconds)
        stats.graph_seconds = 0.0 if run.graphs is None else run.graphs.seconds
        stats.cache_bytes = self._cache_bytes()


def _as_reward(reward: RewardLike) -> Reward | None:
    if reward is None or isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        return named_guide(reward)
    if isinstance(reward, (os.PathLike, tuple, list)):
        return SequenceReward(reward)  # pyright: ignore[reportArgumentType]
    return FunctionReward(reward)


def _answers(answers: Any) -> list[Any]:
    """Given answers as a list of texts and lists of ids."""
    given = answers.tolist() if hasattr(answers, "tolist") else answers
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise RGTGError(f"answers={shown(answers)}: pass a text or a list of texts or of lists of token ids")
    each = [answer.tolist() if hasattr(answer, "tolist") else answer for answer in given]
    for index, answer in enumerate(each):
        if not isinstance(answer, (str, Sequence)) or isinstance(answer, bytes):
            raise RGTGError(f"answer {index} is {shown(answer)}: pass a text or a list of token ids")
    return each
