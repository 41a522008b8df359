"""Times decoding, ours against the published algorithms: `python -m benchmarks.decode [--quick]`.

Prompt lengths 16, 512 and 2048, k of 5, 10 and 40, batches of 1 and 8, float32 and bfloat16, 64 new tokens,
prefill included, into results/decode.csv. Cells already in the file are skipped, so that a sweep that was
interrupted, or ended by `--seconds`, continues where it stopped; `--fresh` measures everything again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cells import HEADLINES, ROUND, SHARED, sweep_cells
from benchmarks.harness import CELL, RESULTS, Cell, append, read, sweep
from rgtg_fast.bench.models import SHAPES
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bench.run import run_bench
from rgtg_fast.bundled import embedded
from rgtg_fast.errors import RGTGError


def _fresh(path: Path, wanted: list[Cell], model: str, device: str) -> None:
    """Drop the rows of these cells' methods, which are measured again."""
    names = {
        (model, device, *(str(getattr(cell, name)) for name in CELL[2:]), method)
        for cell in wanted
        for method in cell.methods
    }
    rows = read(path)
    path.unlink(missing_ok=True)
    append(path, [row for row in rows if tuple(row[name] for name in (*CELL, "method")) not in names])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the README's lines only")
    parser.add_argument(
        "--round", nargs="+", choices=list(ROUND), metavar="NAME", help=f"cells for a GPU: {', '.join(ROUND)}"
    )
    parser.add_argument(
        "--shared", action="store_true", help="one forward for both models against two models"
    )
    parser.add_argument(
        "--reward",
        help="reward model of every cell: a folder with an adapter of the model, or bundled:NAME",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already holds")
    parser.add_argument(
        "--seconds",
        type=float,
        help="begin no cell later than this; what is left out is named (default: all are run)",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument(
        "--lm", help="path or hub id of the model for both roles (default: the embedded SmolLM2)"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of these sizes instead")
    parser.add_argument("--name", help="name of the models in the file")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.csv")
    return parser


def _models(given: argparse.Namespace, shape: str | None) -> tuple[dict[str, Any], str]:
    """The arguments of `run_bench` that name the models, and their name in the file."""
    if shape:
        models, model = {"shape": shape}, f"{shape} (random weights)"
    elif given.lm:
        models, model = {"lm": given.lm}, Path(given.lm).name
    else:
        models, model = {"lm": str(embedded.default_model(print))}, embedded.NAME
    if given.reward:
        models, model = models | {"rm": given.reward}, f"{model} with {given.reward}"
    return models, given.name or model


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)

    if given.round:
        shapes, cells = zip(*(ROUND[name] for name in given.round), strict=True)
        wanted, shape = list(cells), given.shape or shapes[0]
        if not given.shape and len(set(shapes)) > 1:
            parser.error(
                f"--round {' '.join(given.round)} names models of several sizes: run them one by one"
            )
    else:
        wanted, shape = (
            list(SHARED if given.shared else HEADLINES if given.quick else sweep_cells()),
            given.shape,
        )
    if given.list:
        for cell in wanted:
            print(cell, *cell.methods)
        print(f"{len(wanted)} cells")
        return 0
    try:
        models, model = _models(given, shape)
        if given.fresh:
            _fresh(given.output, wanted, model, given.device)
        start = time.perf_counter()
        about = machine(given.device)
        failed = sweep(
            wanted, given.output, run_bench, models, model, about, given.device, seconds=given.seconds
        )
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(wanted)} cells, {failed} failed, {minutes:.1f} minutes: {given.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
