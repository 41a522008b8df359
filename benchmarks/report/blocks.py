"""Which table goes where: one entry per marked section of README and docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.harness import RESULTS, read
from benchmarks.report import decoding, goals, gpu, methods, models, servers, study, training, weights
from benchmarks.report.pages import ROOT, Row
from benchmarks.study.budgets import BUDGETS
from rgtg_fast.evaluation.study.summary import PAIRWISE

STUDY = ROOT / "benchmarks" / "study" / "results" / "summary.csv"
CONTROL = STUDY.parent.parent / "control" / "summary.csv"
# Results of GPUs beside decode*.csv: the ops, and single steps.
OF_GPU = ("gpu_ops*.csv", "profile*.csv")
# The pages by name, which is also their option on the command line.
PAGES = {
    "readme": ROOT / "README.md",
    "performance": ROOT / "docs" / "performance.md",
    "training": ROOT / "docs" / "training.md",
    "trunk": ROOT / "docs" / "shared-trunk.md",
    "methods": ROOT / "docs" / "methods" / "README.md",
    "evaluation": ROOT / "docs" / "evaluation.md",
    "models": ROOT / "docs" / "models.md",
    "vllm": ROOT / "docs" / "integrations" / "vllm.md",
}


def all_rows(paths: list[Path] | None = None) -> list[Row]:
    """The rows of the given results files, by default of every decode*.csv (one for each machine, say)."""
    return [row for path in paths for row in read(path)] if paths else matching("decode*.csv")


def matching(pattern: str) -> list[Row]:
    """The rows of the results files whose names match."""
    return [row for path in sorted(RESULTS.glob(pattern)) for row in read(path)]


@dataclass(frozen=True)
class ReportData:
    """The rows of all results files.

    Attributes:
        decode: rows of decode*.csv.
        summary: summary.csv of a study.
    """

    decode: list[Row]
    summary: Path = STUDY

    @cached_property
    def gpus(self) -> dict[str, gpu.GpuResults]:
        """What every GPU made: its rows of decoding, and the results of ops and steps."""
        cuda = [row for row in self.decode if row["device"] == "cuda"]
        return gpu.by_gpu(cuda, *map(matching, OF_GPU))

    @property
    def study(self) -> list[Row]:
        """A row for every method, setting and judge of the study."""
        return read(self.summary)

    @property
    def pairs(self) -> list[Row]:
        """A row for every two methods and judge of the study."""
        return read(self.summary.parent / PAIRWISE)


def table(name: str) -> list[Row]:
    """The rows of one results file."""
    return read(RESULTS / f"{name}.csv")


@dataclass(frozen=True)
class Block:
    """A marked section of a page.

    Attributes:
        page: in `PAGES`.
        name: in the section's markers.
        text: makes the table from the data.
    """

    page: str
    name: str
    text: Callable[[ReportData], str]


BLOCKS = (
    Block("readme", "range", lambda data: decoding.range_block(data.decode)),
    Block("readme", "shared-trunk", lambda data: decoding.trunk_block(data.decode)),
    Block("performance", "benchmarks", lambda data: decoding.speed_block(data.decode)),
    Block("performance", "cpu-goals", lambda data: goals.goals_block(data.decode)),
    Block("performance", "gpu-targets", lambda data: gpu.targets_block(data.gpus)),
    Block("performance", "phases", lambda data: decoding.phases_block(data.decode)),
    Block("performance", "gpu-decoding", lambda data: decoding.speed_block(data.decode, "cuda")),
    Block("performance", "gpu-ops", lambda data: gpu.ops_block(data.gpus)),
    # What was expected of a GPU before any had run this.
    Block("performance", "gpu-predicted", lambda data: gpu.predicted_block(table("predicted"), data.gpus)),
    Block("performance", "weights", lambda data: weights.weights_block(table("weights"))),
    Block("training", "accuracy", lambda data: training.accuracy_block(table("accuracy"))),
    Block("training", "training-cost", lambda data: training.cost_block(table("train"))),
    Block("trunk", "fork", lambda data: training.fork_block(table("fork"))),
    Block("methods", "costs", lambda data: methods.cost_blocks(table("method_costs"))),
    Block("methods", "evidence", lambda data: methods.evidence_block(data.study, data.pairs)),
    Block("evaluation", "study", lambda data: study.study_block(data.study)),
    Block(
        "evaluation",
        "study-training",
        lambda data: study.budgets_block(read(data.summary.parent / BUDGETS)),
    ),
    Block("evaluation", "study-control", lambda data: study.study_block(read(CONTROL))),
    Block("evaluation", "study-headline", lambda data: study.headline_block(data.study, data.pairs)),
    Block("models", "language-models", lambda data: models.kinds_block(table("models"), "language model")),
    Block("models", "reward-models", lambda data: models.kinds_block(table("models"), "reward model")),
    Block("models", "file-formats", lambda data: models.kinds_block(table("models"), "file format")),
    Block("vllm", "vllm", lambda data: servers.vllm_block(table("vllm"))),
)
