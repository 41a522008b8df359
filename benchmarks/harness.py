"""A sweep of benchmark cells into a CSV: resumable, one row per method, written as soon as the method is complete."""

from __future__ import annotations

import csv
import datetime
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rgtg_fast.bench.methods import METHODS, must_agree
from rgtg_fast.errors import RGTGError

RESULTS = Path(__file__).parent / "results"

PHASES = ("prefill", "lm", "topk", "reward", "resample", "commit", "host")
MACHINE = (
    *("cpu", "isa", "peer_isa", "cores", "threads", "gpu", "driver"),
    *("python", "torch", "triton", "transformers", "rgtg_fast", "commit"),
)
CELL = ("model", "device", "dtype", "prompt_length", "k", "batch", "new_tokens")
COLUMNS = (
    "date",
    *MACHINE,
    "memory_bandwidth_gb_s",
    *CELL,
    "beta",
    "seed",
    "omp_wait_policy",
    "method",
    "engine",
    "tokens_per_second",
    "ms_per_token",
    "decode_ms_per_token",
    *(f"{phase}_ms_per_token" for phase in PHASES),
    "cache_resident_lm_bytes",
    "cache_resident_reward_bytes",
    "cache_peak_lm_bytes",
    "cache_peak_reward_bytes",
    "memory_beyond_weights_bytes",
    "equal_to_reference",
    "reference",
    "tokens_compared",
    "first_difference_position",
    "first_difference_score_gap",
    "runs",
    "tokens_measured",
    "rows_measured",
    "time_is",
    "weight_bytes_per_token",
    "floor_ms_per_token",
    "achieved_over_floor",
)


@dataclass(frozen=True)
class Cell:
    """One configuration and the methods that are timed in it, together."""

    prompt_length: int
    k: int
    batch: int
    dtype: str
    methods: tuple[str, ...]
    new_tokens: int = 64
    repeats: int = 1
    seconds_per_run: float = 10.0

    @property
    def place(self) -> tuple[str, int, int, int]:
        """Its place in the tables: dtype, B, P, k."""
        return self.dtype, self.batch, self.prompt_length, self.k

    def __str__(self) -> str:
        return f"{self.dtype} B={self.batch} P={self.prompt_length} k={self.k} N={self.new_tokens}"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_machine(row: dict[str, str], here: dict[str, Any]) -> bool:
    """Whether a row was measured on this machine with this instruction set.

    A row that names no instruction set is older than that column and counts as measured with this one.

    Args:
        row: of a results file.
        here: `rgtg_fast.bench.roofline.machine()`.
    """
    same = all(row[name] == str(shown(here[name])) for name in ("cpu", "cores", "threads", "gpu"))
    return same and row.get("isa", "") in ("", shown(here["isa"]))


def append(path: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a results file, in one go.

    Raises:
        RGTGError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != list(columns):
            raise RGTGError(f"{path} has other columns than this version writes: move it away and start anew")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def flatten(result: dict[str, Any], model: str, methods: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of the results file that `run_bench` measured.

    Args:
        result: what `run_bench` returns.
        model: name of the models, free of local paths.
        methods: those to keep; None: all.
    """
    config, machine = result["config"], result["machine"]
    common = {name: machine[name] for name in MACHINE}
    common |= {name: config[name] for name in (*CELL, "beta", "seed", "omp_wait_policy") if name != "model"}
    common |= {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "model": model,
        "memory_bandwidth_gb_s": machine["memory_bandwidth_gb_s"],
    }
    rows = []
    for entry in result["methods"]:
        if methods is not None and entry["method"] not in methods:
            continue
        difference, floor = entry["first_difference"] or {}, entry.get("floor") or {}
        row = common | {
            name: entry[name]
            for name in (
                "method",
                "engine",
                "tokens_per_second",
                "ms_per_token",
                "decode_ms_per_token",
                "memory_beyond_weights_bytes",
                "equal_to_reference",
                "tokens_compared",
                "runs",
                "tokens_measured",
                "rows_measured",
            )
        }
        row |= {f"{phase}_ms_per_token": entry["phases"].get(phase) for phase in PHASES}
        for kind in ("resident", "peak"):
            for owner in ("lm", "reward"):
                row[f"cache_{kind}_{owner}_bytes"] = entry[f"cache_{kind}_bytes"].get(owner)
        row |= {
            name: floor.get(name)
            for name in ("weight_bytes_per_token", "floor_ms_per_token", "achieved_over_floor")
        }
        row["reference"] = entry["reference"]
        row["first_difference_position"] = difference.get("position")
        row["first_difference_score_gap"] = difference.get("score_gap")
        # How a run on fewer tokens or rows is extended to the whole job: prefill once a row, the rest per token.
        row["time_is"] = (
            "extrapolated: prefill once a row + decoding per token" if entry["extrapolated"] else "measured"
        )
        rows.append({name: shown(row[name]) for name in COLUMNS})
    return rows


def shown(value: Any) -> Any:
    """A value as the results files hold it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


@dataclass(frozen=True)
class _Sweep:
    """Where the rows of a sweep go, and what measures them; the fields are `sweep`'s arguments."""

    path: Path
    bench: Callable[..., dict[str, Any]]
    models: dict[str, Any]
    model: str
    machine: dict[str, Any]
    device: str
    progress: Callable[[str], None]

    def missing(self, cell: Cell) -> list[str]:
        """The methods of a cell that have no row in the file."""
        here = {"model": self.model, "device": self.device}
        wanted = [str(here[name] if name in here else getattr(cell, name)) for name in CELL]
        present = {
            row["method"]
            for row in read(self.path)
            if same_machine(row, self.machine) and [row[name] for name in CELL] == wanted
        }
        return [method for method in cell.methods if method not in present]

    def measure(self, cell: Cell, missing: Sequence[str], at: str) -> bool:
        """Measure the missing methods of a cell, beside those that their tokens are compared with.

        Args:
            cell: the configuration.
            missing: methods that get a row.
            at: begins the lines about the cell.

        Returns:
            Whether it succeeded.
        """
        methods = [m for m in cell.methods if m in missing or (METHODS[m].anchor and must_agree(m, missing))]
        self.progress(f"{at}: {', '.join(methods)}")
        start, reason, result = time.perf_counter(), None, None
        written: set[str] = set()

        def write(result: dict[str, Any]) -> None:
            rows = [row for row in flatten(result, self.model, missing) if row["method"] not in written]
            append(self.path, rows)
            for row in rows:
                written.add(row["method"])
                note = f" (of {row['tokens_measured']} tokens, {row['rows_measured']} rows)"
                self.progress(f"    {row['method']:18} {float(row['tokens_per_second']):9.2f} tokens/s{note}")

        names = ("prompt_length", "k", "batch", "new_tokens", "dtype", "repeats", "seconds_per_run")
        sizes = {name: getattr(cell, name) for name in names}
        try:
            result = self.bench(**self.models, **sizes, methods=methods, device=self.device, each=write)
        except RGTGError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "the models do not fit into the device's memory"
        except RuntimeError as error:
            # For example torch.compile's: the other cells are measured all the same.
            traceback.print_exc()
            reason = type(error).__name__
        # Outside of the handlers, where no traceback holds the cell's tensors any more.
        gc.collect()
        torch.cuda.empty_cache()
        if result is None:
            print(f"{at}: {reason}", file=sys.stderr)
            return False
        for name, why in result["left_out"].items():
            print(f"{at}: {name} is left out: {why}", file=sys.stderr)
        write(result)
        self.progress(f"    {time.perf_counter() - start:.0f} s")
        return True


def sweep(
    cells: Sequence[Cell],
    path: Path,
    bench: Callable[..., dict[str, Any]],
    models: dict[str, Any],
    model: str,
    machine: dict[str, Any],
    device: str,
    progress: Callable[[str], None] = print,
    seconds: float | None = None,
    began: float | None = None,
) -> int:
    """Measure every cell that the file does not hold yet.

    A method's row is written as soon as it is complete. A method that fails gets no row, which is reported, and the
    others do.

    Args:
        cells: what to measure, in this order.
        path: results file.
        bench: `run_bench`.
        models: its arguments that name the models.
        model: their name in the file.
        machine: `rgtg_fast.bench.roofline.machine()`, for finding rows of this machine.
        device: "cpu" or "cuda".
        progress: receives lines about the progress.
        seconds: no cell is begun later than this after the start; those left out are named. None: all are measured.
        began: the start, of `time.perf_counter`; None: now.

    Returns:
        The number of cells that failed; they are reported and the rest goes on.
    """
    failed, began = 0, time.perf_counter() if began is None else began
    work = _Sweep(path, bench, models, model, machine, device, progress)
    for number, cell in enumerate(cells, 1):
        at, missing = f"[{number}/{len(cells)}] {cell}", work.missing(cell)
        if not missing:
            progress(f"{at}: present")
        elif seconds is not None and time.perf_counter() - began > seconds:
            progress(f"{at}: left out, {seconds:g} s are over: {', '.join(missing)}")
        else:
            failed += not work.measure(cell, missing, at)
    return failed
