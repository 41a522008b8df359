"""Times our decoder against the published algorithms, in one interleaved run with outputs compared first."""

from __future__ import annotations

import copy
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgtg_fast import (
    AutoregressiveReward,
    Guidance,
    RewardGuidedDecoder,
    SequenceReward,
    __version__,
    bundled,
)
from rgtg_fast.bench import baselines
from rgtg_fast.bench.baselines import BaselineRun
from rgtg_fast.errors import MemoryTooSmallError, RGTGError
from rgtg_fast.models.adapter import (
    Adapter,
    LowRank,
    decoder_layers,
    fingerprint,
    is_adapter,
    linear_shape,
)
from rgtg_fast.models.loading import load_causal_lm, load_sequence_classifier, resolve_device

# More of anything than a machine holds; beyond it torch's own counters overflow.
MOST = 2**31 - 1
METHODS = (
    "ours",
    "ours_transformers",
    "ours_eager",
    "ours_compiled",
    "ours_genarm",
    "shared_trunk",
    "shared_compiled",
    "two_models",
    "args_replicated",
    "pargs_serial",
    "genarm_published",
    "unguided",
    "ours_unguided",
    "ours_unguided_compiled",
)
# Groups of methods whose greedy tokens must agree; the first of a group that runs is the reference for its others.
# Methods in no group are compared with nothing.
AGREEING = (
    (
        "args_replicated",
        "pargs_serial",
        "ours",
        "ours_transformers",
        "ours_eager",
        "ours_compiled",
        "two_models",
        "shared_trunk",
        "shared_compiled",
    ),
    ("genarm_published", "ours_genarm"),
)
# Methods of our decoder, those whose guide is an adapter, a second language model, and those that hold the base
# model alone.
OURS = (
    "ours",
    "ours_transformers",
    "ours_eager",
    "ours_compiled",
    "ours_genarm",
    "shared_trunk",
    "shared_compiled",
    "two_models",
    "ours_unguided",
    "ours_unguided_compiled",
)
COMPILED = ("ours_compiled", "shared_compiled", "ours_unguided_compiled")
# Those that run the model's own blocks even where the native engine could: on a CPU, `ours_eager` is `ours`.
OWN_BLOCKS = ("ours_transformers", *COMPILED)
TRUNKS = ("shared_trunk", "shared_compiled")
ADAPTED = (*TRUNKS, "two_models")
AUTOREGRESSIVE = ("genarm_published", "ours_genarm")
BASE_ALONE = ("unguided", "ours_unguided", "ours_unguided_compiled")
# Decoded one row at a time whatever the batch: the published programs have no other way.
ONE_ROW = ("args_replicated", "pargs_serial")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Sizes of real models, to be filled with random weights. "tiny" tries the command out; its numbers mean
# nothing.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}

# The random adapter that stands in where none is named: the upper third of the layers, all linear layers.
_ADAPTER_SHARE, _ADAPTER_RANK = 3, 16

# Tokens of the warm-up, which is also the first comparison of the outputs.
_WARM_UP_TOKENS = {"args_replicated": 2, "pargs_serial": 2}
_WARM_UP_TOKENS_OTHERS = 8


class BenchmarkMismatchError(RGTGError):
    """Methods that must produce the same tokens did not, so no time is reported."""


@dataclass(frozen=True)
class Difference:
    """Where a method's tokens first leave the reference's.

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


def first_difference(reference: BaselineRun, run: BaselineRun) -> Difference | None:
    """The first token that differs over the rows and positions that both runs have; None where they agree."""
    for row, (expected, tokens) in enumerate(zip(reference.tokens, run.tokens, strict=False)):
        for position, (a, b) in enumerate(zip(expected, tokens, strict=False)):
            if a != b:
                gap = None
                if reference.steps:
                    candidates, scores = reference.steps[row][position]
                    of = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
                    gap = of[a] - of[b] if b in of else None
                return Difference(row, position, a, b, gap)
    return None


@dataclass
class _Method:
    """A method to be timed: how to run it, how much of it is run, and what came out.

    Attributes:
        held: bytes of the device that its runs so far have left allocated: static caches, what graphs keep.
        beyond: most bytes that it had allocated at once, these and a run's own; None on a CPU.
    """

    name: str
    call: Callable[[Sequence[Sequence[int]], int], BaselineRun]
    engine: str
    rows: int
    tokens: int
    repeats: int
    device: torch.device
    runs: list[BaselineRun] = field(default_factory=list)
    difference: Difference | None = None
    compared: int = 0
    held: int = 0
    beyond: int | None = None

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
        with self._memory():
            run = self.call(prompts[: self.rows], tokens)
        for row, produced in enumerate(run.tokens):
            if len(produced) != tokens:
                raise RGTGError(
                    f"{self.name} produced {len(produced)} tokens instead of {tokens} for prompt {row}: "
                    "only methods that produce the same number can be timed against each other"
                )
        return run

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Counts what a run allocates on the device, weights apart: they are there before."""
        if self.device.type != "cuda":
            yield
            return
        gc.collect()  # what earlier runs dropped must not be freed, and subtracted, during this one
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        transient = torch.cuda.max_memory_allocated(self.device) - before
        self.beyond = max(self.beyond or 0, self.held + transient)
        gc.collect()
        self.held += torch.cuda.memory_allocated(self.device) - before

    def plan(self, trial: BaselineRun, batch: int, new_tokens: int, repeats: int, limit: float) -> None:
        """Fit a run into `limit` seconds: fewer rows first (they only add up), then fewer tokens, once."""
        prefill = trial.phases["prefill"] / (self.rows if self.name in ONE_ROW else 1)
        step = max((trial.seconds - trial.phases["prefill"]) / len(trial.tokens[0]), 1e-9)
        row = prefill + new_tokens * step
        self.repeats, self.tokens = repeats, new_tokens
        if self.name in ONE_ROW and row * batch <= limit:
            self.rows = batch
        elif row > limit:
            self.repeats = 1
            self.tokens = max(min(new_tokens, int((limit - prefill) / step)), len(trial.tokens[0]))
            if self.tokens == len(trial.tokens[0]):
                # the warm-up was as long as the run could be: it counts
                self.runs, self.repeats = [trial], 0


@dataclass
class _Isolation:
    """A method that fails, for memory or otherwise, is left out; the others are timed without it.

    Attributes:
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

    def remaining(self, entries: Sequence[_Method]) -> list[_Method]:
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


def memory_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second that the memory can be read with, measured: the best of six sums over 1 GiB.

    On CUDA by events over ten sums, so that no launch and no waiting is counted.
    """
    device = torch.device(device)
    x = torch.ones(2**28, device=device)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            with torch.cuda.device(device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(10):
                    x.sum()
                end.record()
                end.synchronize()
            seconds = begin.elapsed_time(end) / 1e4
        else:
            start = time.perf_counter()
            x.sum()
            seconds = time.perf_counter() - start
        best = min(best, seconds)
    return x.nbytes / best


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on: processor, threads, memory bandwidth, versions, commit.

    The commit is `RGTG_COMMIT`'s where that is set, for sources that were copied without their history.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _driver() if cuda else None,
        "memory_bandwidth_gb_s": round(memory_bandwidth(device) / 1e9, 2),
        "python": platform.python_version(),
    }
    info |= {"torch": torch.__version__, "triton": _triton()}
    info |= {"transformers": transformers.__version__, "rgtg_fast": __version__}
    return info | {"commit": os.environ.get("RGTG_COMMIT") or _commit()}


def run_bench(
    lm: str | None = None,
    rm: str | None = None,
    shape: str | None = None,
    prompt_length: int = 512,
    k: int = 10,
    batch: int = 1,
    new_tokens: int = 64,
    dtype: str = "float32",
    methods: Sequence[str] = ("ours", "args_replicated", "pargs_serial", "unguided"),
    repeats: int = 3,
    seed: int = 0,
    threads: int | None = None,
    beta: float = 1.0,
    progress: Callable[[str], None] | None = None,
    device: str | None = None,
    seconds_per_run: float = 30.0,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time reward-guided decoding methods against each other, greedily, on the same prompts and models.

    Every method first decodes a few tokens (warm-up); then the methods take turns (A B C A B C ...), prefill
    included, and the run of the median time is reported. Greedy tokens of every guided method are compared
    with those of its reference, the first of its group in `AGREEING` that takes part, in the warm-up
    and in every timed run. In float32 a difference is an error and no time is reported; in lower precision,
    where cached and uncached logits really differ, the row names the first difference and the score gap
    there.

    A method whose run would take longer than `seconds_per_run` is run on fewer rows (methods that decode rows
    one after another anyway) and then on fewer tokens, once. Its time is extended to the whole job as

        seconds = (prefill + (measured - prefill) · new_tokens / tokens_measured) · batch / rows_measured,

    so that prefill is paid once a row and not spread over fewer tokens; as later tokens cost a little more
    than earlier ones, this is at most in that method's favour. `extrapolated`, `tokens_measured` and
    `rows_measured` say where it was done; its cache bytes are those of the measured part.

    On CUDA, and for what is compiled, the warm-up has two rounds: the first compiles, captures and allocates, for our
    methods at full length, and the second alone tells how long a run takes. Every run's memory is counted, the
    warm-up's included. A method that fails, or for which the device's memory does not suffice beside the caches that
    the others hold, is left out and named, and the others are timed without it.

    Args:
        lm: path or hub id of the base model; or None with `shape`.
        rm: path or hub id of a one-label sequence-classification model, a folder with an adapter of the base model,
            or `bundled:NAME`; None: the base model's trunk with a seeded random head, and for `shared_trunk` and
            `two_models` a seeded random adapter of rank 16 on the upper third of its layers as well. The language
            model that guides `genarm_published` and `ours_genarm` is always made: the base model's trunk in memory of
            its own, with a seeded random vocabulary head.
        shape: random weights of these sizes instead of a model: one of `SHAPES`.
        prompt_length: tokens of each prompt (random ids).
        k: candidates per step.
        batch: prompts; `args_replicated` and `pargs_serial` take them one after another.
        new_tokens: tokens per prompt. End-of-sequence does not stop a row.
        dtype: "float32", "bfloat16" or "float16".
        methods: of `METHODS`.
        repeats: timed runs of each method.
        seed: of prompts, reward head and random weights.
        threads: CPU threads; None: torch's own number.
        beta: weight of the reward.
        progress: is told in one line what happens next.
        device: "cpu" or "cuda"; None: CUDA where there is one.
        seconds_per_run: see above.
        each: is given what is returned, with one method in it, as soon as that has had its last run and its outputs
            have been compared.

    Returns:
        {"methods": [...], "left_out": {name: reason}, "config": {...}, "machine": {...}}, ready for JSON. Each method:
        `tokens_per_second`, `ms_per_token` (prefill included), `decode_ms_per_token` (without), `phases` (ms
        per token), bytes of the caches (between steps and within one), `weight_bytes` of the models it holds,
        `tokens` and `seconds` of the whole job, `reference`, `equal_to_reference`, and on CUDA
        `memory_beyond_weights_bytes`: the most that was allocated at once for it, weights apart (intermediates of a
        graph count while it is recorded only; the allocator does not know them later). For our guided methods also
        `floor`: bytes of weights and caches that a token must read, the time the measured bandwidth allows for it, and
        how many times that the decoding takes.

    Raises:
        RGTGError: a value out of range, an unknown name, both or neither of `lm` and `shape`; no method that does not
            fail.
        BenchmarkMismatchError: outputs that differ in float32.
    """
    progress = progress or (lambda line: None)
    _check(lm, rm, shape, prompt_length, k, batch, new_tokens, dtype, methods, repeats, beta, seconds_per_run)
    if not -(2**63) <= seed < 2**63:
        raise RGTGError(f"seed={seed} is not a 64-bit number: use for example 0")
    target = resolve_device(device)
    with _threads(threads):
        progress("loading the models")
        base, tokenizer = _base_model(lm, shape, DTYPES[dtype], target, seed)
        limit = base.config.max_position_embeddings
        if prompt_length + new_tokens > limit:
            raise RGTGError(
                f"prompt_length + new_tokens = {prompt_length + new_tokens} exceeds the context ({limit}): "
                "shorten one of them"
            )
        if k > base.config.vocab_size:
            raise RGTGError(f"k={k} exceeds the vocabulary (V={base.config.vocab_size}): lower it")
        adapter = _adapter(rm, base, methods, seed)
        guide = _Guide(adapter)
        if any(name not in ADAPTED + BASE_ALONE + AUTOREGRESSIVE for name in methods):
            guide.model = (
                _reward_model(rm, base, DTYPES[dtype], target, seed)
                if adapter is None
                else adapter.merged(base)
            )
        if any(name in AUTOREGRESSIVE for name in methods):
            guide.language_model = _second_language_model(base, seed)
        prompts = _prompts(tokenizer, base.config.vocab_size, batch, prompt_length, seed)
        guidance = Guidance(k=k, beta=beta, temperature=0.0)
        config = {
            "lm": lm,
            "rm": rm or f"the base model's trunk with a random {'adapter and ' if adapter else ''}head",
            "shape": shape,
            "prompt_length": prompt_length,
            "k": k,
            "batch": batch,
            "new_tokens": new_tokens,
            "dtype": dtype,
            "device": str(target),
            "beta": beta,
            "seed": seed,
            "repeats": repeats,
            "seconds_per_run": seconds_per_run,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        }
        isolated, entries = _Isolation(target, progress), []
        length = prompt_length + new_tokens
        for name in methods:
            with isolated(name):
                entries.append(_method(name, base, guide, tokenizer, guidance, batch, length, target))
        entries = _warm_up(entries, isolated, prompts, batch, new_tokens, repeats, seconds_per_run, dtype)
        about = machine(target)

        def finished(entry: _Method) -> dict[str, Any]:
            row = _row(entry, _reference(entry.name, entries), batch, new_tokens)
            weights, stored = _held(entry.name, base, guide)
            row["weight_bytes"] = weights
            if entry.name in OURS:
                bandwidth = about["memory_bandwidth_gb_s"]
                floor = _floor(weights, stored, prompt_length, new_tokens, batch, bandwidth)
                row["floor"] = floor | {
                    "achieved_over_floor": round(row["decode_ms_per_token"] / floor["floor_ms_per_token"], 3)
                }
            return row

        told: set[str] = set()

        def tell() -> None:
            """Reports the methods that are done, as soon as there is a run to compare theirs with."""
            for entry in entries:
                reference = _reference(entry.name, entries) or entry
                done = len(entry.runs) >= max(entry.repeats, 1) and entry.name not in isolated.left_out
                if each is not None and done and reference.runs and entry.name not in told:
                    told.add(entry.name)
                    _compare([entry], entries, dtype)
                    each({"methods": [finished(entry)], "left_out": {}, "config": config, "machine": about})

        for turn in range(repeats):
            for entry in entries:
                if turn < entry.repeats:
                    progress(f"run {turn + 1} of {entry.repeats}: {entry.name}")
                    with isolated(entry.name):
                        entry.runs.append(entry.run(prompts, entry.tokens))
                tell()
            entries = isolated.remaining(entries)
        tell()
        _compare(entries, entries, dtype)
        rows = [finished(entry) for entry in entries]
    return {"methods": rows, "left_out": isolated.left_out, "config": config, "machine": about}


def _check(
    lm: str | None,
    rm: str | None,
    shape: str | None,
    prompt_length: int,
    k: int,
    batch: int,
    new_tokens: int,
    dtype: str,
    methods: Sequence[str],
    repeats: int,
    beta: float,
    seconds_per_run: float,
) -> None:
    if (lm is None) == (shape is None):
        raise RGTGError(
            f"lm={lm!r} and shape={shape!r}: name one of them, a model or a shape with random weights"
        )
    if shape is not None and shape not in SHAPES:
        raise RGTGError(f"shape={shape!r} is unknown: choose from {', '.join(SHAPES)}")
    if shape is not None and rm is not None:
        raise RGTGError(f"rm={rm!r} does not fit random weights: name the base model with lm as well")
    if dtype not in DTYPES:
        raise RGTGError(f"dtype={dtype!r} is unknown: choose from {', '.join(DTYPES)}")
    if not methods:
        raise RGTGError(f"methods is empty: choose from {', '.join(METHODS)}")
    for name in methods:
        if name not in METHODS:
            raise RGTGError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    if len(set(methods)) != len(methods):
        raise RGTGError(f"methods {', '.join(methods)} name one twice: name each once")
    at_least_one = {
        "prompt_length": prompt_length,
        "k": k,
        "batch": batch,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    for name, value in at_least_one.items():
        if not 1 <= value <= MOST:
            raise RGTGError(f"{name}={value} is not in 1 to {MOST}: use for example 1")
    if not seconds_per_run > 0:
        raise RGTGError(f"seconds_per_run={seconds_per_run} is not above 0: give a number of seconds")
    Guidance(k=k, beta=beta, temperature=0.0)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    if threads is not None and not 1 <= threads <= MOST:
        raise RGTGError(f"threads={threads} is not in 1 to {MOST}: leave it out for torch's own number")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _base_model(
    lm: str | None, shape: str | None, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    tokenizer = None
    if shape is not None:
        config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    else:
        assert lm is not None
        model, tokenizer = load_causal_lm(lm, device, dtype)
        assert tokenizer is not None
        tokenizer.eos_token = None
    # every method has to produce the same number of tokens, so nothing may end a row
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model.eval(), tokenizer


def _reward_model(
    rm: str | None, base: PreTrainedModel, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    if rm is not None:
        return load_sequence_classifier(rm, base, dtype)[0]
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=False)
    # a copy, not the same weights: a guided step must read both models' from memory
    model.base_model.load_state_dict(base.base_model.state_dict())
    head = model.get_submodule("score").weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.shape, generator=generator) / head.shape[1] ** 0.5
    model.get_submodule("score").weight = torch.nn.Parameter(drawn.to(device=device, dtype=dtype))
    return model.eval()


def _second_language_model(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of the base model in memory of its own, with a random vocabulary head in the place of the base's."""
    model = copy.deepcopy(base)
    replaced = base.get_output_embeddings()
    assert replaced is not None
    own = replaced.weight
    generator = torch.Generator(own.device).manual_seed(seed)
    drawn = torch.randn(own.shape, generator=generator, device=own.device) / own.shape[1] ** 0.5
    # Another module: where embeddings are tied, writing into the head's weight would change the input's too.
    head = torch.nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta")
    head.weight = torch.nn.Parameter(drawn.to(own.dtype))
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    return model.eval()


@dataclass
class _Guide:
    """What guides.

    Attributes:
        adapter: where there is one.
        model: the sequence model that the two-model methods run.
        language_model: the causal language model that those in `AUTOREGRESSIVE` run beside the base model.
    """

    adapter: Adapter | None
    model: PreTrainedModel | None = None
    language_model: PreTrainedModel | None = None


def _adapter(rm: str | None, base: PreTrainedModel, methods: Sequence[str], seed: int) -> Adapter | None:
    """The adapter that `rm` names, or a random one where only a method asks for it."""
    if rm is not None and is_adapter(bundled.resolve(rm)):
        adapter = Adapter.load(bundled.resolve(rm))
        reason = adapter.base_mismatch(base)
        if reason is not None:
            raise RGTGError(f"{reason}: name its base model with lm")
        return adapter
    asking = [name for name in methods if name in ADAPTED]
    if not asking:
        return None
    if rm is not None:
        raise RGTGError(f"rm={rm!r} is no adapter folder, which {asking[0]} needs: name one, or leave rm out")
    layers = decoder_layers(base)
    generator = torch.Generator().manual_seed(seed)
    low_rank = {}
    for number in range(len(layers) - max(len(layers) // _ADAPTER_SHARE, 1), len(layers)):
        for name, module in layers[number].named_modules():
            shape = linear_shape(module)
            if shape is None:
                continue
            a = torch.randn(_ADAPTER_RANK, shape[1], generator=generator) / shape[1] ** 0.5
            b = torch.randn(shape[0], _ADAPTER_RANK, generator=generator) / (10 * _ADAPTER_RANK**0.5)
            low_rank[number, name] = LowRank(a, b)
    head = torch.nn.Linear(base.config.hidden_size, 1, bias=False)
    drawn = torch.randn(head.weight.shape, generator=generator) / head.in_features**0.5
    head.weight = torch.nn.Parameter(drawn, requires_grad=False)
    return Adapter("a random adapter", "", fingerprint(base), low_rank, head, "score")


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in other modules: what one method sets on its modules does not reach the others."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def _prompts(
    tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, batch: int, length: int, seed: int
) -> list[list[int]]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if tokenizer else set()
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(ordinary), (batch, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[drawn].tolist()


def _method(
    name: str,
    lm: PreTrainedModel,
    guide: _Guide,
    tokenizer: PreTrainedTokenizerBase | None,
    guidance: Guidance,
    batch: int,
    length: int,
    device: torch.device,
) -> _Method:
    engine = "transformers"
    rm = guide.language_model if name in AUTOREGRESSIVE else guide.model
    if name in OURS:
        reward = None
        if name in ADAPTED and guide.adapter is not None:
            reward = SequenceReward(guide.adapter, share_trunk=name in TRUNKS)
        elif rm is not None and name in AUTOREGRESSIVE:
            reward = AutoregressiveReward((_twin(rm), tokenizer))
            guidance = replace(guidance, support="all")
        elif rm is not None and name not in BASE_ALONE:
            reward = SequenceReward((_twin(rm), tokenizer))
        decoder = RewardGuidedDecoder.from_pretrained(
            (_twin(lm), tokenizer),
            reward=reward,
            device=device,
            dtype=lm.dtype,
            max_batch=batch,
            max_length=length,
            engine="transformers" if name in OWN_BLOCKS else "auto",
            graphs=False if name == "ours_eager" else None,
            compile=name in COMPILED,
        )
        engine = str(decoder.describe()["lm_engine"])

        def call(prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
            return _ours(decoder, guidance, prompts, tokens, device)

    elif name == "unguided":

        def call(prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
            return baselines.unguided(lm, prompts, new_tokens=tokens)

    elif name == "genarm_published":
        assert rm is not None

        def call(prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
            return baselines.genarm_published(lm, rm, prompts, beta=guidance.beta, new_tokens=tokens)

    else:
        assert rm is not None
        published = {"args_replicated": baselines.args_replicated, "pargs_serial": baselines.pargs_serial}[
            name
        ]

        def call(prompts: Sequence[Sequence[int]], tokens: int) -> BaselineRun:
            return published(lm, rm, prompts, k=guidance.k, beta=guidance.beta, new_tokens=tokens)

    rows = 1 if name in ONE_ROW else batch
    return _Method(name, call, engine, rows=rows, tokens=0, repeats=0, device=device)


def _ours(
    decoder: RewardGuidedDecoder,
    guidance: Guidance,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    device: torch.device,
) -> BaselineRun:
    _synchronize(device)
    start = time.perf_counter()
    result = decoder.generate([list(prompt) for prompt in prompts], max_new_tokens=tokens, guidance=guidance)
    _synchronize(device)
    seconds = time.perf_counter() - start
    phases = dict(result.stats.phases)
    first = result.stats.first_token_seconds
    if device.type == "cuda" and first is not None:
        # The host's clock sees the prefill being launched, and the rest of it as waiting. It ends a step before the
        # first token arrives.
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


def _reference(name: str, entries: Sequence[_Method]) -> _Method | None:
    """What the method's tokens must agree with; None where it is in no group."""
    by_name = {entry.name: entry for entry in entries}
    group = next((group for group in AGREEING if name in group), ())
    return next((by_name[other] for other in group if other in by_name), None)


def _warm_up(
    entries: Sequence[_Method],
    isolated: _Isolation,
    prompts: Sequence[Sequence[int]],
    batch: int,
    new_tokens: int,
    repeats: int,
    limit: float,
    dtype: str,
) -> list[_Method]:
    """Run every method for a few tokens, compare them, and plan the timed runs; those that take part in them."""
    trials: dict[str, list[BaselineRun]] = {}
    for entry in entries:
        isolated.progress(f"warm-up and comparison of outputs: {entry.name}")
        tokens = min(new_tokens, _WARM_UP_TOKENS.get(entry.name, _WARM_UP_TOKENS_OTHERS))
        rounds = [tokens]
        if isolated.device.type == "cuda" or entry.name in COMPILED:
            # A longer run later would allocate larger caches and capture its steps anew.
            rounds = [new_tokens if entry.name in OURS else tokens, tokens]
        with isolated(entry.name):
            trials[entry.name] = [entry.run(prompts, tokens) for tokens in rounds]
    entries = isolated.remaining(entries)
    _compare(entries, entries, dtype, trials)
    for entry in entries:
        entry.plan(trials[entry.name][-1], batch, new_tokens, repeats, limit)
    return entries


def _compare(
    entries: Sequence[_Method],
    beside: Sequence[_Method],
    dtype: str,
    trials: dict[str, list[BaselineRun]] | None = None,
) -> None:
    """Compare every run with its reference's first, note the first difference, and refuse one in float32.

    Args:
        entries: whose runs are compared. beside: where their references are.
        trials: the warm-up's runs by method; None: the timed ones.
    """
    runs_of = {entry.name: entry.runs for entry in beside} if trials is None else trials
    for entry in entries:
        reference, own = _reference(entry.name, beside), runs_of[entry.name]
        if reference is None:
            continue
        truth = runs_of[reference.name][0]
        entry.compared = sum(min(len(a), len(b)) for a, b in zip(truth.tokens, own[0].tokens, strict=False))
        entry.difference = next((d for run in own if (d := first_difference(truth, run)) is not None), None)
        if entry.difference is not None and dtype == "float32":
            d = entry.difference
            gap = (
                "of which the reference keeps no score"
                if d.score_gap is None
                else f"{d.score_gap:.3g} lower in score"
            )
            raise BenchmarkMismatchError(
                f"{entry.name} differs from {reference.name} in float32 at prompt {d.row}, "
                f"new token {d.position}: {d.token} instead of {d.reference_token} ({gap}); "
                "no times are reported"
            )


def _row(entry: _Method, reference: _Method | None, batch: int, new_tokens: int) -> dict[str, Any]:
    by_time = sorted(entry.runs, key=lambda run: run.seconds)
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
        "method": entry.name,
        "engine": entry.engine,
        "tokens_per_second": tokens / seconds,
        "ms_per_token": seconds / tokens * 1e3,
        "decode_ms_per_token": (seconds - prefill * wider) / tokens * 1e3,
        "phases": phases,
        "cache_resident_bytes": run.cache_resident_bytes,
        "cache_peak_bytes": run.cache_peak_bytes,
        "memory_beyond_weights_bytes": entry.beyond,
        "tokens": tokens,
        "seconds": seconds,
        "seconds_of_every_run": [r.seconds for r in entry.runs],
        "runs": len(entry.runs),
        "tokens_measured": measured_tokens,
        "rows_measured": measured_rows,
        "extrapolated": measured_rows != batch or measured_tokens != new_tokens,
        "rows_one_after_another": entry.name in ONE_ROW and batch > 1,
        "reference": reference.name if reference is not None else None,
        "equal_to_reference": entry.difference is None if reference is not None else None,
        "tokens_compared": entry.compared,
        "first_difference": asdict(entry.difference) if entry.difference else None,
    }


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one pass reads: all but an input embedding that is not the output's."""
    embedding = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)


def _token_cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token, 2·L·G·D·bytes."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * groups * size * model.dtype.itemsize


def _held(name: str, lm: PreTrainedModel, guide: _Guide) -> tuple[int, float]:
    """Bytes of the weights that a method's step reads, and of the caches that it keeps for a token of a row."""
    weights, stored = _weight_bytes(lm), float(_token_cache_bytes(lm))
    adapter = guide.adapter
    if name in BASE_ALONE:
        return weights, stored
    if name in TRUNKS and adapter is not None:
        layers = lm.config.get_text_config().num_hidden_layers
        above = 0 if adapter.fork is None else layers - adapter.fork
        return weights + adapter.nbytes, stored * (1 + above / layers)
    second = guide.language_model if name in AUTOREGRESSIVE else guide.model
    if second is not None:
        return weights + _weight_bytes(second), stored + _token_cache_bytes(second)
    head = lm.get_output_embeddings()
    return 2 * weights - (0 if head is None else head.weight.nbytes), 2 * stored


def _floor(
    weights: int, stored: float, prompt_length: int, new_tokens: int, batch: int, bandwidth_gb_s: float
) -> dict[str, float]:
    """What a token must read when weights and caches are read once a step (B tokens a step)."""
    per_token = weights / batch
    caches = (prompt_length + (new_tokens - 1) / 2) * stored
    return {
        "weight_bytes_per_token": per_token,
        "cache_bytes_per_token": caches,
        "bandwidth_gb_s": bandwidth_gb_s,
        "floor_ms_per_token": (per_token + caches) / bandwidth_gb_s / 1e6,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where its tool does not say."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this package runs from, "+" appended where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        head = git("rev-parse", "--short=12", "HEAD")
        root = git("rev-parse", "--show-toplevel")
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", f"{root}/rgtg_fast", f"{root}/csrc"
        )
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
