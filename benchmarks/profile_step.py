"""Where a decoding step's time goes: first token, compiling, capturing, milliseconds a step, memory, kernels.

    python -m benchmarks.profile_step --shape llama-8b --device cuda
    python -m benchmarks.profile_step --shape tiny --device cpu --modes eager      # tries the command out

Writes one row per mode to results/profile.csv. `cold` columns are of the first call of a new decoder, which compiles
kernels and captures graphs; the others are of the second call. Counts per step are the difference between a longer and
a shorter answer. `apart` is graphed with separate matrix products for q, k and v, and for gate and up; `tuned` is
compiled with matrix-vector products as reductions and autotuned block shapes. `device_ms_per_step` is the sum of the
kernels' times: the rest of `ms_per_step` is the host, or gaps between kernels. With --kernels N the N longest kernels
(on a CPU: operators) are printed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from benchmarks.harness import MACHINE, RESULTS, append, shown
from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward
from rgtg_fast.bench.models import DTYPES, SHAPES
from rgtg_fast.bench.roofline import machine
from rgtg_fast.errors import RGTGError
from rgtg_fast.profiling import PhaseTimer

MODES = ("eager", "apart", "graphed", "compiled", "tuned")
COMPILE = {"compiled": True, "tuned": {"coordinate_descent_tuning": True, "max_autotune": True}}
PHASES = ("prefill", "lm", "topk", "reward", "resample", "commit", "host")
# Calls in which the host waits for the device.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy")
# Steps of the two profiled calls, whose difference is counted. The profiler costs half a millisecond per operator.
SHORT, LONG = 2, 4
COLUMNS = (
    *MACHINE,
    "shape",
    "device",
    "dtype",
    "prompt_length",
    "k",
    "batch",
    "new_tokens",
    "mode",
    "cold_first_token_ms",
    "cold_graph_ms",
    "first_token_ms",
    "ms_per_step",
    "device_ms_per_step",
    "kernels_per_step",
    "synchronizations_per_step",
    "tokens_per_second",
    *(f"{phase}_ms_per_step" for phase in PHASES),
    "resident_bytes",
    "peak_bytes",
)


def make_decoder(shape: str, device: str, dtype: torch.dtype, batch: int, mode: str) -> RewardGuidedDecoder:
    """A decoder with two models of the shape, random weights, and no end-of-sequence token."""
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0, num_labels=1)
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        rm = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    assert lm.generation_config is not None
    lm.generation_config.eos_token_id = None
    return RewardGuidedDecoder.from_pretrained(
        (lm, None),
        SequenceReward((rm, None)),
        device=device,
        dtype=dtype,
        max_batch=batch,
        engine="transformers" if mode in COMPILE else "auto",
        graphs=False if mode == "eager" else None,
        compile=COMPILE.get(mode, False),
        fuse_projections=False if mode == "apart" else None,
    )


class Counted(NamedTuple):
    """What a profiled call did on the device: milliseconds of kernels, number of kernels, waits of the host."""

    device_ms: float
    kernels: int
    waits: int


def counted(events: Iterable[Any]) -> Counted:
    """Sums over the profiler's events; its own averages by name take longer than the run."""
    events = list(events)
    kernels = [event for event in events if "CUDA" in str(event.device_type)]
    return Counted(
        sum(event.self_device_time_total for event in kernels) / 1e3,
        len(kernels),
        sum(event.name in WAITS for event in events),
    )


def measure(given: argparse.Namespace, mode: str) -> tuple[dict[str, Any], Any]:
    """The row of a mode, and the profiler of the last call."""
    cuda = given.device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    decoder = make_decoder(given.shape, given.device, DTYPES[given.dtype], given.batch, mode)
    prompts = [[3 + (7 * i + row) % 200 for i in range(given.prompt_length)] for row in range(given.batch)]

    def run(tokens: int) -> Any:
        stats = decoder.generate(prompts, tokens, Guidance(k=given.k, temperature=0)).stats
        if cuda:
            torch.cuda.synchronize()
        return stats

    cold, warm = run(given.new_tokens), run(given.new_tokens)
    first = warm.first_token_seconds or 0.0
    steps = max(warm.steps - 1, 1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def profiled(tokens: int) -> tuple[Counted, Any]:
        with profile(activities=activities) as profiler:
            run(tokens)
        return counted(profiler.events()), profiler

    (short, _), (long, profiler) = profiled(SHORT), profiled(LONG)
    resident = torch.cuda.memory_allocated() if cuda else sum(warm.cache_bytes.values())
    row = {
        "mode": mode,
        "cold_first_token_ms": 1e3 * (cold.first_token_seconds or 0.0),
        "cold_graph_ms": 1e3 * cold.graph_seconds,
        "first_token_ms": 1e3 * first,
        "ms_per_step": 1e3 * (warm.seconds - first) / steps,
        "device_ms_per_step": (long.device_ms - short.device_ms) / (LONG - SHORT) if cuda else None,
        "kernels_per_step": (long.kernels - short.kernels) / (LONG - SHORT) if cuda else None,
        "synchronizations_per_step": (long.waits - short.waits) / (LONG - SHORT) if cuda else None,
        "tokens_per_second": warm.tokens_per_second,
        "resident_bytes": resident,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    if mode == "eager":
        # Each phase waits for the device, which slows the run: the sum is more than `ms_per_step`.
        decoder.phase_timer = lambda: PhaseTimer(synchronize=cuda)
        phases = run(given.new_tokens).phases
        row |= {f"{phase}_ms_per_step": 1e3 * phases.get(phase, 0.0) / warm.steps for phase in PHASES}
    return row, profiler


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="default: graphed and compiled; on a CPU eager alone"
    )
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the longest kernels")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile.csv")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    about = machine(given.device)
    modes = given.modes or (("graphed", "compiled") if given.device == "cuda" else ("eager",))
    failed, names = 0, ("shape", "device", "dtype", "prompt_length", "k", "batch", "new_tokens")
    for mode in modes:
        try:
            row, profiler = measure(given, mode)
        except (RGTGError, RuntimeError) as error:
            print(f"{mode}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            failed = 2
            continue
        row |= {name: about[name] for name in MACHINE} | {name: getattr(given, name) for name in names}
        append(given.output, [{name: shown(row.get(name)) for name in COLUMNS}], COLUMNS)
        print(mode, *(f"{name}={shown(row.get(name))}" for name in COLUMNS[len(MACHINE) + 8 :]), sep="  ")
        if given.kernels:
            key = "self_device_time_total" if given.device == "cuda" else "self_cpu_time_total"
            print(
                profiler.key_averages().table(sort_by=key, row_limit=given.kernels, max_name_column_width=60)
            )
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
