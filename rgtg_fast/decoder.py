"""The decoder: reward-guided generation with a base model and a reward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.config import Guidance, Strategy, whole
from rgtg_fast.deprecation import RenamedAttribute, renamed_keywords
from rgtg_fast.engine.locks import Turns
from rgtg_fast.engine.outputs import GeneratedRow, GenerationResult, StreamChunk
from rgtg_fast.engine.request import Arguments, Run, as_run, encoded_row
from rgtg_fast.engine.scheduler import Scheduler
from rgtg_fast.engine.strategies import check_strategy, named_strategy, run_strategy
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.device import without_autocast
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    language_runner,
    load_causal_lm,
    resolve_device,
    resolve_dtype,
)
from rgtg_fast.models.prompts import PromptLike, as_answers, as_prompts, check_known
from rgtg_fast.models.quantized import quantization, round_weights
from rgtg_fast.models.templates import warn_of_template
from rgtg_fast.models.tensor_parallel import check_plan, spread_over
from rgtg_fast.ops._extension import instruction_set
from rgtg_fast.profiling import PhaseTimer
from rgtg_fast.rewards import Reward
from rgtg_fast.rewards.base import NoReward
from rgtg_fast.rewards.compatibility import check_rounding
from rgtg_fast.rewards.parse import RewardLike, as_reward


class RewardGuidedDecoder:
    """Decodes from π(v)·exp(β·r(v)) over the top k next tokens of a frozen language model.

    Build one with `from_pretrained`, then call `generate`, `iterate`, `stream` or `score`. A decoder holds one prefix
    cache per model and decodes one call at a time: threads wait for each other, and an unfinished iterator raises an
    error once a newer call has begun. Several decoders may share models and reward objects.

    Args:
        lm: the base language model.
        reward: already bound to it, or None.
        max_batch: rows decoded at once; more prompts wait for a free slot.
        graphs: whether steps are replayed as CUDA graphs. None: on CUDA, where the reward stays on the device.
        pad_batch: whether every step runs `max_batch` rows, missing ones empty.
        batch_invariant: as in `from_pretrained`.

    Attributes:
        lm: the base language model.
        reward: None where none was given.
        phase_timer: makes the timer of a call; `lambda: PhaseTimer(spans=True)` records the phases as ranges of torch's
            profiler and NVTX.
    """

    ahead = RenamedAttribute("max_in_flight")

    def __init__(
        self,
        lm: LanguageModel,
        reward: Reward | None,
        max_batch: int,
        graphs: bool | None = None,
        pad_batch: bool = False,
        batch_invariant: bool = False,
    ):
        self.lm, self.reward = lm, reward
        self._scheduler = Scheduler(
            lm,
            reward or NoReward(),
            whole("max_batch", max_batch, 1, 8),
            graphs,
            pad_batch,
            batch_invariant,
        )
        self._scheduler.reward.used_by(self)
        # How the reward was bound, to bind it again where another decoder has taken it over.
        self._binding: dict[str, Any] = {"dtype": None, "engine": "auto", "max_length": None}
        self.phase_timer: Callable[[], PhaseTimer] = PhaseTimer

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RGTGError(
            "a decoder cannot be copied or sent to another process: make one there with from_pretrained"
        )

    @classmethod
    @renamed_keywords(join_products="fuse_projections")
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
        label: str | int | None = None,
        trust_remote_code: bool = False,
        weights: str | None = None,
        reward_weights: str | None = None,
        batch_invariant: bool = False,
        reward_device: str | torch.device | None = None,
        tp_plan: str | None = None,
    ) -> RewardGuidedDecoder:
        """Loads a base model and its reward.

        Args:
            lm: path or hub id of a causal language model, or a (model, tokenizer) pair.
            reward: path or hub id of a reward model (a `SequenceReward`), after a method's name and a colon
                (`"farma:path"`, see `named_guide`) for another reward, a reward object, a (model, tokenizer) pair (a
                `SequenceReward`), a function f(prefix_ids, candidate_ids) -> rewards, or None for the base model alone.
            device: by default CUDA where there is one, a loaded model's own.
            dtype: by default float32 on a CPU, bfloat16 on CUDA, a loaded model's own.
            max_batch: rows decoded at once.
            max_length: tokens a row may reach, prompt included; by default the context of both models.
            engine: "native" (fused C++ layers, CPU), "triton" (the library's products with fused kernels between
                them, GPU; on a CPU their references run), "transformers" (the model's own blocks) or "auto".
            graphs: whether a step is replayed as a CUDA graph. None: on CUDA, unless the reward reads on the host.
            compile: whether the models' own blocks run as compiled code in steps (torch.compile), instead of the
                Triton engine's kernels.
                Each number of rows and of candidates is compiled at its first use, for tens of seconds. A dictionary
                holds torch.compile's options, such as `{"coordinate_descent_tuning": True}`.
            pad_batch: whether every step runs `max_batch` rows, missing ones empty. Matrix products on CUDA round by
                the number of their rows; padded, a row's text depends on no other row there too, as long as all have
                the same k. The native engine does not need it; a run with a gate or a strategy is not padded.
            fuse_projections: whether linear layers that read the same input (q, k, v; gate, up) run as one product
                (engines "triton" and "transformers"). Their weights are then stored in one tensor, a loaded model's
                too. None: on CUDA.
            label: name or index of the label whose score is the reward, where `reward` is a name or a pair of a model
                with several (as in `SequenceReward`).
            trust_remote_code: whether code that comes with a model may run, where `lm` or `reward` names it; never
                that of an adapter's base, or of a reward object, which has a parameter of its own.
            weights: "int8" or "int4" rounds the weights of the base model that `lm` names to 8 or 4 bits once it is
                loaded, as `weights` of `SequenceReward` does with a reward model's: a half or a quarter of bfloat16's
                bytes, and other tokens. An adapter in its forward is computed beside them as it is.
            reward_weights: the same for the reward model that `reward` names.
            batch_invariant: whether the products of a step are the op `invariant_linear`, so that a row's bits on CUDA
                depend on no other row: of any k, with a gate too, and without `pad_batch`, whose products are faster.
                Engine "triton"; "native" does so by itself. Not with compile, quantized weights, an adapter in the
                base model's forward, or a reward that reads on the host.
            reward_device: device of the reward's own models, by default the base model's. On another one a step sends
                the candidates there and the rewards back; steps are neither CUDA graphs nor ahead of the host, and an
                adapter is merged into a copy of its base there.
            tp_plan: "auto" spreads the base model's weights over the processes that torchrun has started, by
                transformers' tensor-parallel plan, for a model that is larger than a device. Every process makes the
                same calls and gets the same tokens; each has the whole reward model. Engine "transformers", without
                CUDA graphs, compile and fuse_projections; `lm` is a path or hub id, and `reward` no adapter.

        Raises:
            RGTGError: an argument or model that cannot work, in one line.
        """
        max_batch = whole("max_batch", max_batch, 1, 8)
        if max_length is not None:
            max_length = whole("max_length", max_length, 2, 512)
        if not isinstance(compile, (bool, Mapping)):
            raise RGTGError(f"compile={shown(compile)} is neither True, False nor torch.compile's options")
        if compile is not False and engine == "triton":
            raise RGTGError("compile and engine='triton', whose kernels are fused already: use one of them")
        if batch_invariant and compile is not False:
            raise RGTGError(
                "batch_invariant=True and compile, whose products are the library's: use one of them"
            )
        check_plan(tp_plan, lm, engine)
        check_rounding(weights, lm)
        if weights is not None and tp_plan is not None:
            raise RGTGError(
                f"weights={weights!r} and tp_plan={tp_plan!r}: a model in several processes keeps its files' weights, "
                "leave out one of them"
            )
        own = as_reward(reward, label, trust_remote_code, reward_weights)
        model, tokenizer = load_causal_lm(lm, device, dtype, trust_remote_code, tp_plan)
        round_weights(model, weights, engine)
        if spread_over(model) > 1:
            graphs, fuse_projections = _spread(graphs, compile is not False, fuse_projections)
        runner = language_runner(model, engine, max_length)
        warn_of_template(tokenizer, "language model", runner.name, texts=False)
        vocabulary = min(runner.head.out_features, runner.embeddings)
        elsewhere = None if reward_device is None else _with_index(resolve_device(reward_device))
        language_model = LanguageModel(runner, tokenizer, vocabulary, elsewhere)
        kind = None if dtype is None else resolve_dtype(dtype, model.device)
        binding = {"dtype": kind, "engine": engine, "max_length": max_length}
        if own is not None:
            own = own.for_decoder()
            own.bind(language_model, **binding)
        if reward_device is not None:
            _check_reward_device(language_model, own)
        decoder = cls(language_model, own, max_batch, graphs, pad_batch, batch_invariant)
        decoder._binding = binding
        for each in decoder._scheduler.models():
            if fuse_projections or (fuse_projections is None and each.device.type == "cuda"):
                each.fuse_projections()
        if compile is not False:
            decoder.compile(None if compile is True else compile)
        return decoder

    def compile(self, options: Mapping[str, Any] | None = None) -> None:
        """Compiles the models' blocks: steps run the compiled code from the next call on.

        Args:
            options: torch.compile's.

        Raises:
            RGTGError: the engine is native, an option is unknown, or the decoder is batch-invariant.
        """
        if self._scheduler.invariant:
            raise RGTGError(
                "batch_invariant=True and compile, whose products are the library's: use one of them"
            )
        for model in self._scheduler.models():
            model.compile(options)
        if self._scheduler.graphs is not None:
            self._scheduler.graphs.forget()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base model's tokenizer."""
        return self.lm.tokenizer

    @property
    def max_batch(self) -> int:
        """Rows decoded at once."""
        return self._scheduler.max_batch

    @property
    def max_in_flight(self) -> int:
        """Steps that the device may be ahead of the host, 0 or 1; by default 1 on CUDA. Settable.

        With 1, rows end and are replaced one step late, and the tokens are the same. It has no effect with a reward
        that reads on the host, or a gate.
        """
        return self._scheduler.max_in_flight

    @max_in_flight.setter
    def max_in_flight(self, steps: int) -> None:
        self._scheduler.max_in_flight = steps

    @property
    def max_length(self) -> int:
        """Tokens a row may reach, prompt included, in every model's context."""
        limit = self._scheduler.reward.limit
        return self.lm.runner.limit if limit is None else min(limit, self.lm.runner.limit)

    def describe(self) -> dict[str, Any]:
        """Models, engines, quantization, dtype, device, the C++ kernels' instruction set, cache bytes: for a report."""
        runner, reward, scheduler = self.lm.runner, self.reward, self._scheduler
        return {
            "lm": runner.name,
            "lm_engine": runner.engine,
            "lm_quantization": quantization(runner.model),
            "reward": None if reward is None else reward.name,
            "reward_engine": None if reward is None else reward.engine,
            "reward_quantization": None if reward is None else _quantization(reward),
            "reward_trunk": None if reward is None else reward.trunk,
            "device": str(runner.device),
            "instruction_set": instruction_set() if runner.device.type == "cpu" else None,
            "dtype": str(runner.dtype).removeprefix("torch."),
            "max_batch": self.max_batch,
            "max_length": self.max_length,
            "graphs": scheduler.graphs is not None,
            "compiled": any(model.compiled for model in scheduler.models()),
            "cache_bytes": scheduler.cache_bytes(),
        }

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
            prompts: a string (tokenized as it is), a list of chat messages (through the chat template), a list of
                token ids, or a list of these; any lengths, any number.
            max_new_tokens: tokens of an answer, end-of-sequence included.
            guidance: one, or one per prompt.
            seed: one for all (equal prompts then get equal answers), or one per prompt.
            stop: strings that end an answer and are cut from its text.
            trace: keep every step's candidates.
            strategy: how the models are used: `BestOfN(...)`, `Segments(...)`, `Blocks(...)`, their names
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
            run = self._begin(prompts, max_new_tokens, guidance, seed, stop, trace)
            rows = sorted(self._rows(run, strategy), key=lambda row: row.index)
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
        """Like `generate`, but yields (index, row) as soon as a row is finished."""
        with self._turns.taken():
            run = self._begin(prompts, max_new_tokens, guidance, seed, stop, trace)
            rows = self._rows(run, strategy)
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
        """Like `generate` for one prompt, but yields each token as it is chosen; without `trace`, no candidates.

        The chunks' texts join to the answer's text. An unfinished character, or text that may be the beginning of a
        stop string, is kept for the next chunk.
        """
        given = as_prompts(prompt, self.tokenizer)
        if len(given) != 1:
            raise RGTGError(
                f"stream takes one prompt and got {len(given)}: use generate or iterate for several"
            )
        with self._turns.taken():
            run = self._begin(given[0].given, max_new_tokens, guidance, seed, stop, trace)
        return self._turns.of(run, self._scheduler.chunks(run))

    def score(
        self, prompts: PromptLike | Sequence[PromptLike], answers: str | Sequence[str | Sequence[int]]
    ) -> list[list[float]]:
        """Rewards of every prefix y_{1:i} of given answers, in one forward per answer.

        Args:
            prompts: as in `generate`.
            answers: one per prompt, text or token ids.

        Raises:
            RGTGError: no reward, an empty answer, counts that differ, or a text that exceeds the context.
        """
        reward = self.reward
        if reward is None:
            raise RGTGError("this decoder has no reward to score with: pass reward=... to from_pretrained")
        given, texts = as_prompts(prompts, self.tokenizer), as_answers(answers, self.tokenizer)
        as_text = isinstance(answers, str) or any(isinstance(answer, str) for answer in answers)
        if as_text and any(prompt.messages is not None for prompt in given):
            warn_of_template(self.tokenizer, "language model", self.lm.runner.name, texts=True)
        if len(texts) != len(given):
            raise RGTGError(f"{len(texts)} answers for {len(given)} prompts: pass one answer per prompt")
        with self._turns.taken():
            self._turns.begin()
            rows = []
            for prompt, ids in zip(given, texts, strict=True):
                check_known(ids, self.lm.vocabulary, f"answer {prompt.index}")
                rows.append(encoded_row(prompt, len(ids), self.lm, reward))
            return [reward.score_answer(row, ids) for row, ids in zip(rows, texts, strict=True)]

    @property
    def _turns(self) -> Turns:
        return Turns(self.lm, self._scheduler.reward, self._binding)

    def _begin(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        max_new_tokens: int,
        guidance: Guidance | Sequence[Guidance],
        seed: int | Sequence[int],
        stop: str | Sequence[str] | None,
        trace: bool,
    ) -> Run:
        """Checks everything that can be checked before the first forward; the caches belong to this call then."""
        arguments = Arguments(prompts, max_new_tokens, guidance, seed, self.tokenizer)
        self._turns.begin()
        rows = arguments.rows(self.lm, self._scheduler.reward)
        run = as_run(rows, self.lm, arguments.max_new_tokens, stop, trace, self.phase_timer())
        self._turns.claim(run)
        return run

    def _rows(self, run: Run, strategy: Strategy | str | None) -> Iterator[GeneratedRow]:
        """Rows as they finish, token by token or by a strategy."""
        chosen = named_strategy(strategy) if isinstance(strategy, str) else strategy
        if chosen is None:
            return self._scheduler.rows(run)
        check_strategy(chosen, self._scheduler.reward, run)
        return run_strategy(chosen, run, self._scheduler)


def _spread(graphs: bool | None, compile: bool, fuse_projections: bool | None) -> tuple[bool, bool]:
    """Turns off what a model in several processes does not have.

    Raises:
        RGTGError: the user has turned it on.
    """
    for name, value in (("graphs", graphs), ("compile", compile), ("fuse_projections", fuse_projections)):
        if value:
            raise RGTGError(
                f"{name}=True and a model that is spread over several processes: leave {name} out"
            )
    return False, False


def _with_index(device: torch.device) -> torch.device:
    """The device as a tensor there has it: "cuda" is the current CUDA device."""
    return torch.empty(0, device=device).device


def _check_reward_device(lm: LanguageModel, reward: Reward | None) -> None:
    """Refuses a device for the models of a reward that has none.

    Raises:
        RGTGError: nothing would be on that device.
    """
    own = [] if reward is None else reward.loaded()
    if not any(isinstance(each, PreTrainedModel) for each in own):
        name = "no reward" if reward is None else reward.name
        raise RGTGError(
            f"reward_device={str(lm.reward_device)!r} and {name}, which has no model of its own: leave it out"
        )


def _quantization(reward: Reward) -> str | None:
    """How the weights of a reward's models are quantized, by the first of them that are."""
    models = (each for each in reward.loaded() if isinstance(each, PreTrainedModel))
    return next((method for model in models if (method := quantization(model)) is not None), None)
