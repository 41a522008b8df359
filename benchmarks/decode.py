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

from benchmarks.cells import ADAPTER, GOALS, HEADLINES, ROUND, SHARED, TRUNK_GOALS, sweep_cells
from benchmarks.harness import CELL, RESULTS, Cell, append, read, same_machine, sweep
from rgtg_fast.bench.models import SHAPES
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bench.run import run_bench
from rgtg_fast.bundled import embedded
from rgtg_fast.errors import RGTGError


def _fresh(path: Path, wanted: list[Cell], model: str, device: str, here: dict[str, Any]) -> None:
    """Drop this machine's rows of these cells' methods, which are measured again."""
    names = {
        (model, device, *(str(getattr(cell, name)) for name in CELL[2:]), method)
        for cell in wanted
        for method in cell.methods
    }
    rows = read(path)
    path.unlink(missing_ok=True)
    kept = [
        row
        for row in rows
        if tuple(row[name] for name in (*CELL, "method")) not in names or not same_machine(row, here)
    ]
    append(path, kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the README's lines only")
    parser.add_argument(
        "--goals", action="store_true", help="the goals for a CPU: two models, then the bundled adapter"
    )
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


def _models(given: argparse.Namespace, shape: str | None, reward: str | None) -> tuple[dict[str, Any], str]:
    """The arguments of `run_bench` that name the models, and their name in the file."""
    if shape:
        models, model = {"shape": shape}, f"{shape} (random weights)"
    elif given.lm:
        models, model = {"lm": given.lm}, Path(given.lm).name
    else:
        models, model = {"lm": str(embedded.default_model(print))}, embedded.NAME
    if reward:
        models, model = models | {"rm": reward}, f"{model} with {reward}"
    return models, given.name or model


def _wanted(
    given: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[str | None, list[tuple[str | None, list[Cell]]]]:
    """The shape of the models, and the cells of each reward model."""
    if given.round:
        shapes, cells = zip(*(ROUND[name] for name in given.round), strict=True)
        if not given.shape and len(set(shapes)) > 1:
            parser.error(
                f"--round {' '.join(given.round)} names models of several sizes: run them one by one"
            )
        return given.shape or shapes[0], [(given.reward, list(cells))]
    if given.goals:
        adapter = given.reward or (None if given.shape or given.lm else ADAPTER)
        return given.shape, [(None, list(GOALS)), (adapter, list(TRUNK_GOALS))]
    cells = SHARED if given.shared else HEADLINES if given.quick else sweep_cells()
    return given.shape, [(given.reward, list(cells))]


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    shape, parts = _wanted(given, parser)
    count = sum(len(cells) for _, cells in parts)
    if given.list:
        for cell in (cell for _, cells in parts for cell in cells):
            print(cell, *cell.methods)
        print(f"{count} cells")
        return 0
    start, failed = time.perf_counter(), 0
    try:
        about = machine(given.device)
        for reward, cells in parts:
            models, model = _models(given, shape, reward)
            if given.fresh:
                _fresh(given.output, cells, model, given.device, about)
            failed += sweep(
                *(cells, given.output, run_bench, models, model, about, given.device),
                seconds=given.seconds,
                began=start,
            )
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    minutes = (time.perf_counter() - start) / 60
    print(f"{count} cells, {failed} failed, {minutes:.1f} minutes: {given.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
