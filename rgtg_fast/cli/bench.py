"""`rgtg-fast bench`: times the decoder and the published algorithms."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rgtg_fast.bundled import default_model
from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import Setup, quiet
from rgtg_fast.cli.terminal import console, print_json, status
from rgtg_fast.config import option


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time the decoder against the published algorithms in one run, after comparing their outputs."""

    setup: Setup = include("lm device")
    rm: str | None = option(
        "Reward model: path or hub id, or an adapter of the language model (a folder, bundled:NAME).",
        None,
        flags=("--rm", "--reward"),
        shown="the language model with a random reward head",
    )
    shape: str | None = option(
        "Sizes of models with random weights, in place of --lm: smollm2-135m, llama-1b or llama-8b.", None
    )
    prompt_length: int = option("Tokens of each prompt.", 128)
    k: int = option("Candidates per token.", 10)
    batch: int = option("Prompts at once.", 1)
    new_tokens: int = option("Tokens of each answer.", 32)
    dtype: str = option("float32, bfloat16 or float16.", "float32")
    repeats: int = option("Timed runs of each method; the median is reported.", 3)
    methods: str = option(
        "Methods to time, separated by commas: ours, ours_transformers, ours_eager (no CUDA graphs), ours_compiled "
        "(torch.compile), shared_trunk, shared_compiled, two_models, args_replicated, pargs_serial, unguided "
        "(transformers' own loop), ours_unguided, ours_unguided_compiled; guided by a second language model: "
        "ours_genarm, genarm_published.",
        "ours,args_replicated,pargs_serial,unguided",
    )
    seed: int = option("Seed of the weights and prompts.", 0)
    threads: int | None = option("CPU threads.", None, shown="torch's own number")
    json: bool = json_option()

    def run(self) -> None:
        """Times the methods, by default with the embedded model."""
        quiet()
        names = (
            "rm",
            "shape",
            "prompt_length",
            "k",
            "batch",
            "new_tokens",
            "dtype",
            "repeats",
            "seed",
            "threads",
        )
        options = {name: getattr(self, name) for name in names}
        options["methods"] = [name.strip() for name in self.methods.split(",") if name.strip()]
        lm = self.setup.lm
        with status("Loading") as progress:
            if lm is None and self.shape is None:
                lm = str(default_model(progress))
            from rgtg_fast.bench.run import run_bench

            result = run_bench(lm=lm, device=self.setup.device, **options, progress=progress)
        if self.json:
            print_json(result)
        else:
            _show(result, console())


def _show(result: dict[str, Any], console: Console) -> None:
    rows = result["methods"]
    table = Table(header_style="bold")
    table.add_column("method", no_wrap=True)
    for name in ("tokens/s", "ms/token", "weights", "cache kept", "cache at most", "same tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['ms_per_token']:.1f}",
            _mib(row["weight_bytes"]),
            _mib(row["cache_resident_bytes"]),
            _mib(row["cache_peak_bytes"]),
            {True: "yes", False: "no", None: "–"}[row["equal_to_reference"]],
        )
    console.print(table)
    phases = Table(header_style="bold", title="ms per token by phase", title_justify="left")
    phases.add_column("phase", no_wrap=True)
    for row in rows:
        phases.add_column(row["method"], justify="right")
    for phase in dict.fromkeys(name for row in rows for name in row["phases"]):
        phases.add_row(phase, *(_milliseconds(row["phases"].get(phase)) for row in rows))
    console.print(phases)
    extrapolated = [row["method"] for row in rows if row["extrapolated"]]
    if extrapolated:
        console.print(f"measured on part of the job and extrapolated: {', '.join(extrapolated)}", style="dim")
    for name, reason in result["left_out"].items():
        console.print(f"left out: {name}: {reason}")


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _mib(count: int | dict[str, int]) -> str:
    total = sum(count.values()) if isinstance(count, dict) else count
    return f"{total / 2**20:.1f} MiB"
