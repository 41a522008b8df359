"""Times block shapes of tree_attention on a GPU, beside those that its `configuration` chooses.

    python -m benchmarks.ops.tune                  # every shape; needs a GPU
    python -m benchmarks.ops.tune --list           # prints the block shapes; needs none

For each shape the block shapes are compiled, compared with the reference, timed as in `gpu_ops`, and printed from the
fastest on. The fastest at several shapes belong in `TILES` of rgtg_fast/ops/tree_attention/blocks.py; nothing is
chosen at run time, so that a row's bits never depend on timing.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.gpu_ops import Case, copies, copy_bandwidth, footprint, moved_bytes, timed
from rgtg_fast.ops import tree_attention, use_backend
from tests.ops.specs import SPECS, Tolerance

RESULTS = Path(__file__).parents[1] / "results" / "tune.csv"
COLUMNS = (
    "shape",
    "block_m",
    "block_n",
    "num_warps",
    "num_stages",
    "chosen",
    "us_p20",
    "us_p50",
    "us_p80",
    "of_copy",
)
# Sizes of Llama-3.1-8B: the base model's token, then 10 and 40 candidates.
SHAPES = tuple(
    {"B": B, "H": 32, "G": 8, "S": S, "T": T, "D": 128, "lengths": [T] * B}
    for S in (1, 10, 40)
    for B, T in ((1, 512), (1, 4096), (32, 512), (32, 4096))
)
Settings = dict[str, object]


def own_settings(shape: dict[str, Any], dtype: torch.dtype) -> Settings:
    """The block shapes that the launch itself chooses; needs Triton."""
    kernel = SPECS["tree_attention"].kernel
    return kernel.configuration(shape["D"], shape["S"] * shape["H"] // shape["G"], kernel.ALONE, dtype)


def candidates(chosen: Settings) -> Iterator[Settings]:
    """The chosen block shapes, then others with the same query rows, on which the bits of a row depend."""
    yield chosen
    for block_n in (32, 64, 128):
        for warps in (2, 4, 8):
            for stages in (2, 3, 4):
                other = {**chosen, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
                # Pipelined blocks of keys and values must fit in shared memory, 227 KiB per multiprocessor.
                if other != chosen and 4 * block_n * int(str(chosen["BLOCK_D"])) * stages <= 160 * 1024:
                    yield other


@contextmanager
def launched_with(settings: Settings) -> Iterator[None]:
    """Launches the kernel with these block shapes."""
    kernel = SPECS["tree_attention"].kernel
    own = kernel.configuration
    kernel.configuration = lambda *_: settings
    try:
        yield
    finally:
        kernel.configuration = own


def agrees(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance) -> bool:
    """Whether a result is within the op's tolerance of the reference."""
    difference = got.double() - want
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt()
    return bool(rms <= tolerance.rms) and bool(difference.abs().max() <= tolerance.max * want.abs().max())


def tried(
    shape: dict[str, Any], ceiling: float, device: str, time: Callable[..., tuple[float, float, float]]
) -> list[dict[str, Any]]:
    """Result rows of one shape, fastest first; block shapes that fail are printed and left out.

    Args:
        ceiling: GB/s of a copy. device: of the inputs. time: as `timed`.
    """
    spec, case = SPECS["tree_attention"], Case("tree_attention", shape)
    inputs = spec.make_inputs(shape, case.dtype, device)
    with use_backend("reference"):
        want = tree_attention(**{k: x.double() if _floating(x) else x for k, x in inputs.items()})
    clones = [inputs]
    for _ in range(copies(footprint(inputs)) - 1 if device == "cuda" else 0):
        clones.append({k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()})
    chosen = own_settings(shape, case.dtype)
    rows = []
    for settings in candidates(chosen):
        with use_backend("triton"), launched_with(settings):
            try:
                right = agrees(tree_attention(**inputs), want, spec.tolerances[case.dtype])
                times = time(lambda a: tree_attention(**a), clones) if right else None
            except Exception as error:  # noqa: BLE001 - any error of compiler or driver: go on with the next
                print(f"    {_short(settings)}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
                continue
        if times is None:
            print(f"    {_short(settings)}: differs from the reference")
            continue
        rows.append(
            {
                "shape": " ".join(f"{k}={v}" for k, v in shape.items() if k != "lengths"),
                **{
                    name.lower(): settings[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
                },
                "chosen": settings == chosen,
                **{f"us_p{p}": round(t, 2) for p, t in zip((20, 50, 80), times, strict=True)},
                "of_copy": round(moved_bytes(case) / times[1] / 1000 / ceiling, 3),
            }
        )
    return sorted(rows, key=lambda row: row["us_p50"])


def _floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _short(settings: Settings) -> str:
    return " ".join(f"{name}={settings[name]}" for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the block shapes and stop")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.list:
        for shape in SHAPES:
            for settings in candidates(own_settings(shape, torch.bfloat16)):
                print(f"B={shape['B']} S={shape['S']} T={shape['T']}", _short(settings))
        return 0
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured")
        return 2
    ceiling = copy_bandwidth()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="", encoding="utf-8") as file, torch.inference_mode():
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for shape in SHAPES:
            for row in tried(shape, ceiling, "cuda", timed):
                writer.writerow(row)
                print(*(row[name] for name in COLUMNS), sep="  ")
            file.flush()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
