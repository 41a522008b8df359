"""Launches every Triton kernel once on small and ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.ops.sanitize
    compute-sanitizer --tool racecheck python -m benchmarks.ops.sanitize

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: otherwise a write past a tensor may go to memory that torch has reserved.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from rgtg_fast import ops
from rgtg_fast.ops import use_backend
from tests.ops.specs import SPECS

# Under a sanitizer a kernel runs hundreds of times slower.
MOST_NUMBERS = 300_000


def size(arguments: dict[str, Any]) -> int:
    """Numbers among the arguments."""
    return sum(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the launches and stop")
    given = parser.parse_args(arguments)
    launches = [
        (name, shape)
        for name, spec in SPECS.items()
        for shape in spec.shapes
        if shape.get("k", 0) <= 256 and size(spec.make_inputs(shape, torch.bfloat16)) <= MOST_NUMBERS
    ]
    if given.list:
        for name, shape in launches:
            print(name, shape)
        return 0
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was launched")
        return 2
    for name, shape in launches:
        inputs = SPECS[name].make_inputs(shape, torch.bfloat16, "cuda")
        with use_backend("triton"), torch.inference_mode():
            getattr(ops, name)(**inputs)
        torch.cuda.synchronize()
    print(f"{len(launches)} launches")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
