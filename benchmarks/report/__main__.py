"""Makes the figures and the tables of README and docs from results/*.csv: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.report import decoding, gpu, training
from benchmarks.report.blocks import BLOCKS, PAGES, STUDY, ReportData, all_rows, table
from benchmarks.report.pages import ROOT, write_block


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+", help="default: benchmarks/results/decode*.csv")
    for name, path in PAGES.items():
        parser.add_argument(f"--{name}", type=Path, default=path)
    parser.add_argument("--study", type=Path, default=STUDY, help="summary.csv of `rgtg-fast evaluate`")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    given = parser.parse_args(arguments)
    results = ReportData(all_rows(given.results), given.study)
    if not results.decode:
        print("there are no results: python -m benchmarks.decode measures them", file=sys.stderr)
        return 2
    for path in (
        *decoding.draw(results.decode, given.figures),
        *training.draw_accuracy(table("accuracy"), given.figures),
        *gpu.draw_gpu(results.gpus, given.figures),
    ):
        print(path)
    for block in BLOCKS:
        page = getattr(given, block.page)
        changed = write_block(page, block.text(results), block.name)
        print(page, block.name, "changed" if changed else "unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
