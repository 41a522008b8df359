"""The published decoding algorithms, reimplemented on plain transformers, as baselines for this package's timings.

Each keeps what defines its algorithm (what is copied, what is encoded again, how many model calls a token costs) and
drops what merely made the published program slow (host synchronization inside the loop, emptied allocator caches,
whole-vocabulary logits of the prompt). All are greedy, stop at `new_tokens` only, and share one formula,
score(v) = log π(v | x, y) + β·r(x, y ∘ v), over the k most probable tokens, or over the whole vocabulary where r is a
language model's log-probability.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.kv_cache import cache_keyword


@dataclass
class BaselineRun:
    """One timed run of one method.

    Attributes:
        tokens: new tokens of each prompt.
        seconds: wall-clock time of the whole run, prefill included.
        phases: seconds by phase; "host" is the time outside of every phase.
        cache_resident_bytes: largest key-value cache held between two steps, by model ("lm", "reward").
        cache_peak_bytes: largest within a step: the resident tensors and those being written beside them.
        steps: for every prompt and new token, the k candidates [k] and their scores [k] in float32, on the CPU; of
            `genarm_published` the best two of the vocabulary. Empty for `unguided`.
    """

    tokens: list[list[int]]
    seconds: float
    phases: dict[str, float]
    cache_resident_bytes: dict[str, int] = field(default_factory=dict)
    cache_peak_bytes: dict[str, int] = field(default_factory=dict)
    steps: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)


class PhaseClock:
    """Seconds by phase, without making the device wait: events on CUDA, the monotonic clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.synchronize()
        self._start = time.perf_counter()

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def stop(self) -> tuple[float, dict[str, float]]:
        """Total seconds, and seconds by phase with the remainder under "host"."""
        self.synchronize()
        total = time.perf_counter() - self._start
        for name, first, last in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1e3
        phases = dict(self._seconds)
        phases["host"] = max(0.0, total - sum(phases.values()))
        return total, phases


def _held(cache: DynamicCache) -> list[torch.Tensor]:
    return [
        tensor
        for layer in cache.layers
        if isinstance(layer, DynamicLayer)
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    ]


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the key and value tensors that a transformers cache holds now."""
    return sum(tensor.nbytes for tensor in _held(cache))


def _step_peak_bytes(cache: DynamicCache) -> int:
    """Most bytes of a cache within a step: growing or re-ordering a tensor holds its old and new copy at once."""
    return cache_bytes(cache) + max((tensor.nbytes for tensor in _held(cache)), default=0)


def _cached(model: nn.Module, tokens: torch.Tensor, cache: Cache, **options: Any) -> Any:
    """A model's output for new tokens [B, S] after those in its cache; appends them to the cache."""
    return model(tokens, use_cache=True, **{cache_keyword(type(model)): cache}, **options)


def _next_logits(model: nn.Module, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    # [B, S] -> [B, V]
    return _cached(model, tokens, cache, logits_to_keep=1).logits[:, -1]


def _replicated_cache(rm: PreTrainedModel, prompt: torch.Tensor, k: int) -> DynamicCache:
    # The prompt [1, P] is encoded once and its cache copied k times.
    cache = DynamicCache(config=rm.config)
    _cached(rm.base_model, prompt, cache)
    cache.batch_repeat_interleave(k)
    return cache


def _top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    # [1, V] -> log-probabilities [k], tokens [k]
    logits = logits.float()
    values, tokens = torch.topk(logits, k, dim=-1)
    return (values - torch.logsumexp(logits, dim=-1, keepdim=True))[0], tokens[0]


def _check_new_tokens(new_tokens: int) -> None:
    if new_tokens < 1:
        raise RGTGError(f"new_tokens={new_tokens} is below 1: ask for at least one new token")


def _check_prompt(prompt: Sequence[int]) -> None:
    if len(prompt) == 0:
        raise RGTGError("an empty prompt has nothing to predict from: give it at least one token")


def _run_rows(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    decode: Callable[[torch.Tensor, int, PhaseClock, BaselineRun], None],
    device: torch.device,
) -> BaselineRun:
    """Decode the prompts one after another, as the published programs do."""
    _check_new_tokens(new_tokens)
    run = BaselineRun(tokens=[], seconds=0.0, phases={})
    with torch.inference_mode():
        clock = PhaseClock(device)
        for prompt in prompts:
            _check_prompt(prompt)
            decode(torch.tensor([list(prompt)], device=device), new_tokens, clock, run)
        run.seconds, run.phases = clock.stop()
    run.steps = [[(tokens.cpu(), scores.cpu()) for tokens, scores in record] for record in run.steps]
    return run


def _one_length(prompts: Sequence[Sequence[int]], method: str, device: torch.device) -> torch.Tensor:
    """The prompts' ids as one batch [B, P].

    Raises:
        RGTGError: prompts of different lengths.
    """
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1:
        raise RGTGError(
            f"prompt lengths {sorted(lengths)} differ: the {method} baseline takes one length per batch"
        )
    return torch.tensor([list(prompt) for prompt in prompts], device=device)


def _note_caches(run: BaselineRun, **caches: DynamicCache) -> None:
    """Keeps the largest sizes of these caches, by model."""
    for name, cache in caches.items():
        for sizes, size in (
            (run.cache_resident_bytes, cache_bytes(cache)),
            (run.cache_peak_bytes, _step_peak_bytes(cache)),
        ):
            sizes[name] = max(sizes.get(name, 0), size)


def args_replicated(
    lm: PreTrainedModel,
    rm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    beta: float,
    new_tokens: int,
) -> BaselineRun:
    """ARGS as published: the reward model's cache holds the prefix k times and is re-ordered at every step.

    Each step runs the k candidates as rows [k, 1] through the reward model and copies the chosen row's cache over all
    k. Faster here: the prompt is encoded once and then copied (published: k times); the choice stays on the device.

    Args:
        lm: causal LM.
        rm: sequence-classification model with one label (its head is `.score`).
        prompts: token ids of each prompt; several prompts are decoded one after another.
        k: candidates per step.
        beta: weight of the reward.
        new_tokens: tokens to produce for each prompt.

    Returns:
        The run, with its caches measured after the last step.

    Raises:
        RGTGError: `new_tokens` below 1, or an empty prompt.

    Source: Khanov et al. 2024 (arXiv 2402.01694), algorithm 1.
    """
    trunk, head = rm.base_model, rm.get_submodule("score")

    def decode(prompt: torch.Tensor, steps: int, clock: PhaseClock, run: BaselineRun) -> None:
        lm_cache = DynamicCache(config=lm.config)
        with clock.phase("prefill"):
            logits = _next_logits(lm, prompt, lm_cache)
            rm_cache = _replicated_cache(rm, prompt, k)
        answer, record = [], []
        for step in range(steps):
            with clock.phase("topk"):
                logprobs, tokens = _top(logits, k)
            with clock.phase("reward"):
                hidden = _cached(trunk, tokens[:, None], rm_cache).last_hidden_state[:, -1]
                rewards = head(hidden)[:, 0].float()
            with clock.phase("resample"):
                scores = logprobs + beta * rewards
                choice = scores.argmax(dim=0, keepdim=True)
                chosen = tokens[choice]
            with clock.phase("commit"):
                rm_cache.reorder_cache(choice.expand(k))
            answer.append(chosen)
            record.append((tokens, scores))
            if step + 1 < steps:
                with clock.phase("lm"):
                    logits = _next_logits(lm, chosen[None], lm_cache)
        run.tokens.append(torch.cat(answer).tolist())
        run.steps.append(record)
        _note_caches(run, lm=lm_cache, reward=rm_cache)

    return _run_rows(prompts, new_tokens, decode, lm.device)


def pargs_serial(
    lm: PreTrainedModel,
    rm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    beta: float,
    new_tokens: int,
) -> BaselineRun:
    """PARGS as published: the reward model encodes prompt, answer and one candidate anew, k times a token.

    The base LM keeps its cache. Faster here: the reward model builds no cache that would be thrown away, and rewards
    stay on the device until the choice is made there.

    Args:
        lm: causal LM.
        rm: sequence-classification model with one label (its head is `.score`).
        prompts: token ids of each prompt; several prompts are decoded one after another.
        k: candidates per step.
        beta: weight of the reward.
        new_tokens: tokens to produce for each prompt.

    Returns:
        The run; the reward model's cache is 0 bytes.

    Raises:
        RGTGError: `new_tokens` below 1, or an empty prompt.

    Source: Rashid et al. 2024 (arXiv 2406.07780), section 4, greedy.
    """
    trunk, head = rm.base_model, rm.get_submodule("score")

    def decode(prompt: torch.Tensor, steps: int, clock: PhaseClock, run: BaselineRun) -> None:
        lm_cache, prefix = DynamicCache(config=lm.config), prompt
        with clock.phase("prefill"):
            logits = _next_logits(lm, prompt, lm_cache)
        record = []
        for step in range(steps):
            with clock.phase("topk"):
                logprobs, tokens = _top(logits, k)
            with clock.phase("reward"):
                rewards = []
                for token in tokens:
                    sequence = torch.cat([prefix, token.view(1, 1)], dim=1)
                    hidden = trunk(sequence, use_cache=False).last_hidden_state
                    rewards.append(head(hidden[:, -1])[0])
            with clock.phase("resample"):
                scores = logprobs + beta * torch.cat(rewards).float()
                chosen = tokens[scores.argmax(dim=0, keepdim=True)]
                prefix = torch.cat([prefix, chosen[None]], dim=1)
            record.append((tokens, scores))
            if step + 1 < steps:
                with clock.phase("lm"):
                    logits = _next_logits(lm, chosen[None], lm_cache)
        run.tokens.append(prefix[0, prompt.shape[1] :].tolist())
        run.steps.append(record)
        _note_caches(run, lm=lm_cache)
        run.cache_resident_bytes["reward"] = run.cache_peak_bytes["reward"] = 0

    return _run_rows(prompts, new_tokens, decode, lm.device)


def genarm_published(
    lm: PreTrainedModel,
    rm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    beta: float,
    new_tokens: int,
) -> BaselineRun:
    """GenARM as published: a second causal LM gives log π_r of the whole vocabulary, one token of each model a step.

    The next token is the argmax over the vocabulary of log π + β·log π_r; both models run eagerly. Faster here:
    both keep a growing cache, prompts of one length are one batch, and the choice stays on the device.

    Args:
        lm: causal LM.
        rm: causal LM over the same vocabulary, whose log-probabilities are the reward.
        prompts: token ids of each prompt, all of one length.
        beta: weight of log π_r, the paper's 1/β.
        new_tokens: tokens to produce for each prompt.

    Returns:
        The run, with the best two scores of every step.

    Raises:
        RGTGError: `new_tokens` below 1, an empty prompt, or prompts of different lengths.

    Source: Xu et al. 2024 (arXiv 2410.08193).
    """
    _check_new_tokens(new_tokens)
    for prompt in prompts:
        _check_prompt(prompt)
    ids = _one_length(prompts, "genarm_published", lm.device)
    lm_cache, rm_cache = DynamicCache(config=lm.config), DynamicCache(config=rm.config)
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        clock = PhaseClock(lm.device)
        with clock.phase("prefill"):
            lm_logits, rm_logits = _next_logits(lm, ids, lm_cache), _next_logits(rm, ids, rm_cache)
        for step in range(new_tokens):
            with clock.phase("topk"):
                logprobs = lm_logits.log_softmax(-1, dtype=torch.float32)
            with clock.phase("reward"):
                rewards = rm_logits.log_softmax(-1, dtype=torch.float32)
            with clock.phase("resample"):
                # The second best score is kept for the gap between the two.
                scores, tokens = torch.add(logprobs, rewards, alpha=beta).topk(min(2, logprobs.shape[-1]))
            best.append((tokens, scores))
            if step + 1 < new_tokens:
                with clock.phase("lm"):
                    lm_logits = _next_logits(lm, tokens[:, :1], lm_cache)
                with clock.phase("reward"):
                    rm_logits = _next_logits(rm, tokens[:, :1], rm_cache)
        seconds, phases = clock.stop()
    tokens, scores = (torch.stack(column, dim=1).cpu() for column in zip(*best, strict=True))
    run = BaselineRun(tokens[:, :, 0].tolist(), seconds, phases)
    run.steps = [list(zip(*row, strict=True)) for row in zip(tokens, scores, strict=True)]
    _note_caches(run, lm=lm_cache, reward=rm_cache)
    return run


class _FirstToken(StoppingCriteria):
    """Notes when `generate` has its first token, which is where the prefill ends."""

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self.seconds = 0.0
        self._start = time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if self.seconds == 0.0:
            self._clock.synchronize()
            self.seconds = time.perf_counter() - self._start
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def unguided(lm: PreTrainedModel, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> BaselineRun:
    """The upper bound of speed: transformers' own greedy `generate`, prompts in one batch, no reward model.

    Args:
        lm: causal LM.
        prompts: token ids of each prompt, all of one length.
        new_tokens: tokens to produce for each prompt; end-of-sequence tokens do not stop it.

    Returns:
        The run; its phases are "prefill" (until the first token) and "lm" (the rest).

    Raises:
        RGTGError: prompts of different lengths.
    """
    ids = _one_length(prompts, "unguided", lm.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    cache = DynamicCache(config=lm.config)
    # generate takes what this configuration leaves open from the model's own, end-of-sequence included.
    own, lm.generation_config = lm.generation_config, config
    try:
        with torch.inference_mode():
            clock = PhaseClock(lm.device)
            first = _FirstToken(clock)
            output = lm.generate(  # pyright: ignore[reportCallIssue]
                ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=StoppingCriteriaList([first]),
                **{cache_keyword(type(lm)): cache},
            )
            seconds, _ = clock.stop()
    finally:
        lm.generation_config = own
    phases = {"prefill": first.seconds, "lm": seconds - first.seconds}
    run = BaselineRun(output.sequences[:, ids.shape[1] :].tolist(), seconds, phases)
    _note_caches(run, lm=cache)
    return run
