"""Checks in half a minute that a device computes correctly, before anything is measured on it.

    python -m benchmarks.ops.gate                  # needs a GPU
    python -m benchmarks.ops.gate --device cpu     # tries the command out

Every op runs once in bfloat16 and is compared with its float64 reference; then a tiny model decodes in float32, with
captured steps and without, and must give the tokens that the CPU gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from benchmarks.ops.tune import agrees
from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward
from rgtg_fast.bench.models import SHAPES
from rgtg_fast.ops import use_backend
from tests.ops.specs import SPECS, call, in_double

# One shape of each op, ragged where it can be.
SHAPE = {
    "topk_logprobs": {"B": 1, "V": 49152, "k": 10},
    "tree_attention": {"B": 3, "H": 8, "G": 2, "S": 10, "T": 700, "D": 128, "lengths": [700, 1, 513]},
    "resample": {"B": 8, "K": 5},
    "commit": {"L": 2, "B": 3, "G": 2, "S": 5, "T": 40, "D": 64},
    "score_and_sample": {"B": 8, "K": 10, "E": 576},
    "finish_step": {"B": 9, "K": 10, "Z": 2},
    "add_rms_norm": {"B": 3, "S": 10, "E": 576},
    "rope_and_store": {"B": 3, "S": 10, "H": 9, "G": 3, "D": 64, "norms": True},
    "act_and_mul": {"B": 3, "S": 10, "F": 1536},
    "invariant_linear": {"B": 2, "S": 5, "N": 130, "K": 2100, "bias": True},
    "partial_bt_loss": {"N": 3, "T": 9, "mode": "repeat_last"},
}


def wrong_ops(device: str) -> Iterator[str]:
    """Names of the ops that differ from their references or fail, with Triton on a GPU and the default on a CPU."""
    for name, spec in SPECS.items():
        arguments = spec.make_inputs(SHAPE[name], torch.bfloat16, device)
        with use_backend("reference"):
            want = call(name, in_double(arguments))
        try:
            with use_backend("triton") if device == "cuda" else nullcontext():
                got = call(name, arguments)
        except Exception as error:  # noqa: BLE001 - any error of compiler or driver: go on with the other ops
            yield f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            continue
        tolerance = spec.tolerances[torch.bfloat16]
        for a, b in zip(got, want, strict=True):
            same = _close(a, b, tolerance) if b.is_floating_point() else torch.equal(a, b)
            if not same:
                yield name
                break


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: Any) -> bool:
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].isnan(), b[~finite].isnan()):
        return False
    return not bool(finite.any()) or agrees(a[finite], b[finite].double(), tolerance)


def tokens(device: str, graphs: bool | None) -> list[list[int]]:
    """Greedy and sampled answers of a tiny model in float32; rows end and are replaced."""
    config = LlamaConfig(**SHAPES["tiny"], bos_token_id=None, eos_token_id=1, pad_token_id=0, num_labels=1)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    rm = AutoModelForSequenceClassification.from_config(config)
    assert lm.generation_config is not None
    lm.generation_config.eos_token_id = list(range(1, 256, 9))
    decoder = RewardGuidedDecoder.from_pretrained(
        (lm, None), SequenceReward((rm, None)), device=device, dtype="float32", max_batch=3, graphs=graphs
    )
    prompts = [[3 + (5 * row + i) % 250 for i in range(20 + 60 * row)] for row in range(5)]
    found = []
    for temperature in (0.0, 0.9):
        rows = decoder.generate(prompts, 16, Guidance(k=10, temperature=temperature), seed=[1, 2, 3, 4, 5])
        found += [list(row.tokens) for row in rows]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args(arguments)
    cuda = given.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was compared")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    begun = time.perf_counter()
    with torch.inference_mode():
        wrong = list(wrong_ops(given.device))
    print(
        f"{len(SPECS) - len(wrong)} of {len(SPECS)} ops right, {time.perf_counter() - begun:.0f} s",
        *wrong,
        sep="\n",
    )
    want = tokens("cpu", None)
    ways = {"eager": False, "captured": None} if cuda else {"eager": None}
    for name, graphs in ways.items():
        same = tokens(given.device, graphs) == want
        print(f"{name} steps: {'the tokens' if same else 'NOT the tokens'} of the CPU")
        wrong += [] if same else [name]
    print(f"{time.perf_counter() - begun:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
