"""Times our decoder against the published algorithms, in one interleaved run with outputs compared first.

Every method first decodes a few tokens (warm-up). Then the methods take turns (A B C A B C ...), prefill included, and
the run of the median time is reported. Greedy tokens of every guided method are compared with those of its reference
(`rgtg_fast.bench.methods.reference`), in the warm-up and in every timed run. In float32 a difference is an error and no
time is reported. In lower precision, where cached and uncached logits really differ, the row names the first difference
and the score gap there.

A method whose run would take longer than `seconds_per_run` is run on fewer rows (methods that decode rows one after
another anyway) and then on fewer tokens, once. Its time is extrapolated to the whole job as

    seconds = (prefill + (measured - prefill) · new_tokens / tokens_measured) · batch / rows_measured,

so that the prefill counts once a row. Later tokens cost a little more than earlier ones, so any error is in that
method's favor. `extrapolated`, `tokens_measured` and `rows_measured` say where this was done; the cache bytes are
those of the measured part.

On CUDA, and with torch.compile, the warm-up has two rounds: the first compiles, captures and allocates (our methods: at
full length), and the second alone tells how long a run takes. The memory of every run is counted, the warm-up's
included. A method that fails, for example because the device's memory does not suffice beside the caches of the others,
is left out and named, and the others are timed without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rgtg_fast.bench import roofline
from rgtg_fast.bench.baselines import BaselineRun
from rgtg_fast.bench.methods import METHODS, reference
from rgtg_fast.bench.models import DTYPES, SHAPES, RewardModels, base_model, random_prompts
from rgtg_fast.bench.timing import Isolation, TimedMethod, first_difference, prepare
from rgtg_fast.config import Guidance
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.loading import resolve_device

# Torch's own counters overflow beyond it.
_MOST = 2**31 - 1


class BenchmarkMismatchError(RGTGError):
    """Methods that must produce the same tokens did not, so no time is reported."""


@dataclass(frozen=True)
class BenchSettings:
    """The settings of `run_bench` that decide what is measured, checked; see there.

    Raises:
        RGTGError: a value out of range, an unknown name, or both or neither of `lm` and `shape`.
    """

    lm: str | None
    rm: str | None
    shape: str | None
    prompt_length: int
    k: int
    batch: int
    new_tokens: int
    dtype: str
    methods: Sequence[str]
    repeats: int
    seed: int
    beta: float
    seconds_per_run: float

    def __post_init__(self) -> None:
        self._check_models()
        self._check_methods()
        for name in ("prompt_length", "k", "batch", "new_tokens", "repeats"):
            value = getattr(self, name)
            if not 1 <= value <= _MOST:
                raise RGTGError(f"{name}={value} is not in 1 to {_MOST}: use for example 1")
        if not self.seconds_per_run > 0:
            raise RGTGError(
                f"seconds_per_run={self.seconds_per_run} is not above 0: give a number of seconds"
            )
        _ = self.guidance
        if not -(2**63) <= self.seed < 2**63:
            raise RGTGError(f"seed={self.seed} is not a 64-bit number: use for example 0")

    def _check_models(self) -> None:
        if (self.lm is None) == (self.shape is None):
            raise RGTGError(
                f"lm={self.lm!r} and shape={self.shape!r}: name one of them, a model or a shape with random weights"
            )
        if self.shape is not None and self.shape not in SHAPES:
            raise RGTGError(f"shape={self.shape!r} is unknown: choose from {', '.join(SHAPES)}")
        if self.shape is not None and self.rm is not None:
            raise RGTGError(
                f"rm={self.rm!r} does not fit random weights: name the base model with lm as well"
            )
        if self.dtype not in DTYPES:
            raise RGTGError(f"dtype={self.dtype!r} is unknown: choose from {', '.join(DTYPES)}")

    def _check_methods(self) -> None:
        if not self.methods:
            raise RGTGError(f"methods is empty: choose from {', '.join(METHODS)}")
        for name in self.methods:
            if name not in METHODS:
                raise RGTGError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
        if len(set(self.methods)) != len(self.methods):
            raise RGTGError(f"methods {', '.join(self.methods)} name one twice: name each once")

    def check_fits(self, base: PreTrainedModel) -> None:
        """Refuses prompts, answers or candidates that are too many for the base model.

        Raises:
            RGTGError: they are.
        """
        limit, tokens = base.config.max_position_embeddings, self.prompt_length + self.new_tokens
        if tokens > limit:
            raise RGTGError(
                f"prompt_length + new_tokens = {tokens} exceeds the context ({limit}): shorten one of them"
            )
        if self.k > base.config.vocab_size:
            raise RGTGError(f"k={self.k} exceeds the vocabulary (V={base.config.vocab_size}): lower it")

    @property
    def guidance(self) -> Guidance:
        """Greedy, with this k and β."""
        return Guidance(k=self.k, beta=self.beta, temperature=0.0)

    def as_dict(self, device: torch.device, random_adapter: bool) -> dict[str, Any]:
        """The `config` of a result."""
        values = asdict(self)
        del values["methods"]
        random = f"the base model's trunk with a random {'adapter and ' if random_adapter else ''}head"
        values |= {"rm": self.rm or random, "device": str(device)}
        return values | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}


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

    Greedy tokens are compared before anything is timed. See `rgtg_fast.bench.run` for the procedure.

    Args:
        lm: path or hub id of the base model; or None with `shape`.
        rm: path or hub id of a one-label sequence-classification model, a folder with an adapter of the base model,
            or `bundled:NAME`; None: seeded random heads and adapters on the base model (`rgtg_fast.bench.models`).
        shape: random weights of these sizes instead of a model: one of `SHAPES`.
        prompt_length: tokens of each prompt (random ids).
        k: candidates per step.
        batch: prompts; `args_replicated` and `pargs_serial` take them one after another.
        new_tokens: tokens per prompt. End-of-sequence does not stop a row.
        dtype: "float32", "bfloat16" or "float16".
        methods: names in `rgtg_fast.bench.methods.METHODS`.
        repeats: timed runs of each method.
        seed: seed of prompts and random weights.
        threads: CPU threads; None: torch's own number.
        beta: weight of the reward.
        progress: receives a line before every step.
        device: "cpu" or "cuda"; None: CUDA where there is one.
        seconds_per_run: most seconds of one run; longer ones are cut and extrapolated.
        each: receives what is returned, with one method in it, as soon as that method has had its last run and its
            outputs have been compared.

    Returns:
        {"methods": [...], "left_out": {name: reason}, "config": {...}, "machine": {...}}, ready for JSON. A method has
        the fields of `TimedMethod.result`, the bytes of weights that its step reads, and `floor` where it is ours.

    Raises:
        RGTGError: a value out of range, an unknown name, both or neither of `lm` and `shape`; no method that does not
            fail.
        BenchmarkMismatchError: outputs that differ in float32.
    """
    progress = progress or (lambda line: None)
    models, sizes = (lm, rm, shape), (prompt_length, k, batch, new_tokens)
    settings = BenchSettings(*models, *sizes, dtype, methods, repeats, seed, beta, seconds_per_run)
    target = resolve_device(device)
    with _threads(threads):
        return _Benchmark(settings, target, progress, each).run()


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    if threads is not None and not 1 <= threads <= _MOST:
        raise RGTGError(f"threads={threads} is not in 1 to {_MOST}: leave it out for torch's own number")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Benchmark:
    """One call of `run_bench`: models, prompts and the methods that take part.

    Args:
        settings: what is measured.
        device: device of the models.
        progress: receives a line before every step.
        each: receives the result of every method as soon as it is complete; None: nothing does.
    """

    def __init__(
        self,
        settings: BenchSettings,
        device: torch.device,
        progress: Callable[[str], None],
        each: Callable[[dict[str, Any]], None] | None,
    ):
        self.settings, self.device, self.progress, self.each = settings, device, progress, each
        progress("loading the models")
        dtype = DTYPES[settings.dtype]
        self.base, self.tokenizer = base_model(settings.lm, settings.shape, dtype, device, settings.seed)
        settings.check_fits(self.base)
        methods = [METHODS[name] for name in settings.methods]
        self.rewards = RewardModels.load(settings.rm, self.base, methods, dtype, device, settings.seed)
        vocabulary = self.base.config.vocab_size
        self.prompts = random_prompts(
            self.tokenizer, vocabulary, settings.batch, settings.prompt_length, settings.seed
        )
        self.config = settings.as_dict(device, self.rewards.adapter is not None)
        self.isolated = Isolation(device, progress)
        self.reported: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Warms up, measures, compares; what `run_bench` returns."""
        settings, isolated = self.settings, self.isolated
        self.entries = warm_up(self._prepared(), isolated, self.prompts, settings)
        self.machine = roofline.machine(self.device)
        for turn in range(settings.repeats):
            for entry in self.entries:
                if turn < entry.repeats:
                    self.progress(f"run {turn + 1} of {entry.repeats}: {entry.name}")
                    with isolated(entry.name):
                        entry.runs.append(entry.run(self.prompts, entry.tokens))
                self._report()
            self.entries = isolated.remaining(self.entries)
        self._report()
        compare(self.entries, self.entries, settings.dtype)
        return self._result(self.entries, isolated.left_out)

    def _prepared(self) -> list[TimedMethod]:
        settings, entries = self.settings, []
        length = settings.prompt_length + settings.new_tokens
        for name in settings.methods:
            with self.isolated(name):
                entries.append(
                    prepare(
                        METHODS[name],
                        self.base,
                        self.rewards,
                        self.tokenizer,
                        settings.guidance,
                        settings.batch,
                        length,
                        self.device,
                    )
                )
        return entries

    def _report(self) -> None:
        """Reports the methods that are complete, as soon as there is a run to compare theirs with."""
        if self.each is None:
            return
        for entry in self.entries:
            truth = _reference(entry, self.entries) or entry
            complete = len(entry.runs) >= max(entry.repeats, 1) and entry.name not in self.isolated.left_out
            if complete and truth.runs and entry.name not in self.reported:
                self.reported.add(entry.name)
                compare([entry], self.entries, self.settings.dtype)
                self.each(self._result([entry], {}))

    def _result(self, entries: Sequence[TimedMethod], left_out: dict[str, str]) -> dict[str, Any]:
        rows = [self._row(entry) for entry in entries]
        return {"methods": rows, "left_out": left_out, "config": self.config, "machine": self.machine}

    def _row(self, entry: TimedMethod) -> dict[str, Any]:
        settings = self.settings
        row = entry.result(_reference(entry, self.entries), settings.batch, settings.new_tokens)
        weights, stored = roofline.bytes_read(entry.method, self.base, self.rewards)
        row["weight_bytes"] = weights
        if entry.method.ours:
            bandwidth = self.machine["memory_bandwidth_gb_s"]
            job = settings.prompt_length, settings.new_tokens, settings.batch
            floor = roofline.floor(weights, stored, *job, bandwidth)
            row["floor"] = floor | {
                "achieved_over_floor": round(row["decode_ms_per_token"] / floor["floor_ms_per_token"], 3)
            }
        return row


def _reference(entry: TimedMethod, entries: Sequence[TimedMethod]) -> TimedMethod | None:
    """What the method's tokens must agree with; None where they are compared with nothing."""
    by_name = {other.name: other for other in entries}
    name = reference(entry.name, by_name)
    return None if name is None else by_name[name]


def warm_up(
    entries: Sequence[TimedMethod],
    isolated: Isolation,
    prompts: Sequence[Sequence[int]],
    settings: BenchSettings,
) -> list[TimedMethod]:
    """Run every method for a few tokens, compare them, and plan the timed runs.

    Returns:
        The methods that did not fail.

    Raises:
        RGTGError: every method failed.
        BenchmarkMismatchError: outputs that differ in float32.
    """
    new_tokens = settings.new_tokens
    trials: dict[str, list[BaselineRun]] = {}
    for entry in entries:
        isolated.progress(f"warm-up and comparison of outputs: {entry.name}")
        tokens = min(new_tokens, entry.method.warm_up_tokens)
        rounds = [tokens]
        if isolated.device.type == "cuda" or entry.method.compile:
            # A longer run later would allocate larger caches and capture its steps anew.
            rounds = [new_tokens if entry.method.ours else tokens, tokens]
        with isolated(entry.name):
            trials[entry.name] = [entry.run(prompts, tokens) for tokens in rounds]
    entries = isolated.remaining(entries)
    compare(entries, entries, settings.dtype, trials)
    for entry in entries:
        trial = trials[entry.name][-1]
        entry.plan(trial, settings.batch, new_tokens, settings.repeats, settings.seconds_per_run)
    return entries


def compare(
    entries: Sequence[TimedMethod],
    beside: Sequence[TimedMethod],
    dtype: str,
    trials: dict[str, list[BaselineRun]] | None = None,
) -> None:
    """Compare every run with the first run of its reference and note the first difference.

    Args:
        entries: the entries whose runs are compared.
        beside: the methods that include their references.
        dtype: dtype of the models.
        trials: the warm-up's runs by method; None: the timed ones.

    Raises:
        BenchmarkMismatchError: a difference in float32.
    """
    runs_of = {entry.name: entry.runs for entry in beside} if trials is None else trials
    for entry in entries:
        expected, own = _reference(entry, beside), runs_of[entry.name]
        if expected is None:
            continue
        truth = runs_of[expected.name][0]
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
                f"{entry.name} differs from {expected.name} in float32 at prompt {d.row}, "
                f"new token {d.position}: {d.token} instead of {d.reference_token} ({gap}); "
                "no times are reported"
            )
