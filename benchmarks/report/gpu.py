"""Results of GPUs: the figures to reach, ops beside their peers, roofline and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.pages import LINES, STYLE, Row, save_figure
from rgtg_fast.bench.methods import METHODS

NOT_YET = "not measured yet"
NONE = (
    "No GPU has been at hand: these figures are still to come, and nothing here is a promise. `bash benchmarks/gpu.sh` "
    "measures them."
)
NO_OPS = "Not measured yet: run `bash benchmarks/gpu.sh` on a machine with a GPU."
# Our decoder's ways to run a step; the fastest that was measured counts.
OURS = ("ours", "ours_compiled")
LARGE, SMALL = "llama-8b (random weights)", "llama-1b (random weights)"
OP_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class GpuResults:
    """Rows of one GPU: decoding, ops and profiled steps, the latest of equals last."""

    decode: Sequence[Row]
    ops: Sequence[Row]
    steps: Sequence[Row]

    def decoded(self, model: str, method: str, batch: int, length: int = 512, k: int = 10) -> Row | None:
        """The row of a method in bfloat16."""
        wanted = (model, method, "bfloat16", str(batch), str(length), str(k))
        names = ("model", "method", "dtype", "batch", "prompt_length", "k")
        return next((row for row in reversed(self.decode) if tuple(row[n] for n in names) == wanted), None)

    def timed(self, op: str, dtype: str = "bfloat16", **sizes: int) -> list[dict[str, Row]]:
        """Rows of an op by who ran it, one dictionary for each of the shapes that have these sizes."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.ops:
            if (row["op"], row["dtype"]) == (op, dtype) and sizes.items() <= shape_of(row).items():
                found.setdefault(row["shape"], {})[row["who"]] = row
        return list(found.values())


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        what: is measured.
        goal: as it is printed.
        form: format of the measured number.
        value: from a GPU's results; None where it was not measured.
    """

    what: str
    goal: str
    form: str
    value: Callable[[GpuResults], float | None]


def shape_of(row: Row) -> dict[str, int]:
    """The sizes of an op's row.

    Example:
        >>> shape_of({"shape": "B=1 mode=hold T=4096"})
        {'B': 1, 'T': 4096}
    """
    parts = (part.partition("=") for part in row["shape"].split())
    return {name: int(size) for name, _, size in parts if size.isdigit()}


def _of_floor(model: str, batch: int, method: str) -> Callable[[GpuResults], float | None]:
    def value(results: GpuResults) -> float | None:
        row = results.decoded(model, method, batch)
        return 1 / float(row["achieved_over_floor"]) if row else None

    return value


def _over_replicated(model: str, batch: int) -> Callable[[GpuResults], float | None]:
    def value(results: GpuResults) -> float | None:
        theirs = results.decoded(model, "args_replicated", batch)
        rows = [results.decoded(model, name, batch) for name in OURS]
        speeds = [float(row["tokens_per_second"]) for row in rows if row]
        return max(speeds) / float(theirs["tokens_per_second"]) if theirs and speeds else None

    return value


def _shared_trunk(results: GpuResults) -> float | None:
    def fastest(*methods: str) -> float | None:
        rows = [results.decoded(LARGE, method, 1) for method in methods]
        return max((float(row["tokens_per_second"]) for row in rows if row), default=None)

    shared = fastest("shared_trunk", "shared_compiled")
    alone = fastest("ours_unguided", "ours_unguided_compiled")
    return shared / alone if shared and alone else None


def _long_attention(results: GpuResults, candidates: int) -> list[dict[str, Row]]:
    """Attention over 4,096 slots and more, with 64 and more pairs of row and key-value head."""
    found = []
    for by_who in results.timed("tree_attention", S=candidates):
        sizes = shape_of(next(iter(by_who.values())))
        if sizes["T"] >= 4096 and sizes["B"] * sizes["G"] >= 64 and "ours" in by_who:
            found.append(by_who)
    return found


def _attention_of_copy(results: GpuResults) -> float | None:
    return min((float(rows["ours"]["of_copy"]) for rows in _long_attention(results, 10)), default=None)


def _over(rows: Iterable[dict[str, Row]], peer: str) -> float | None:
    """Our smallest lead over the peer whose name begins with this."""
    leads = []
    for by_who in rows:
        theirs = next((row for who, row in by_who.items() if who.startswith(peer)), None)
        if theirs is not None and "ours" in by_who:
            leads.append(float(theirs["us_p50"]) / float(by_who["ours"]["us_p50"]))
    return min(leads, default=None)


def _cache_share(results: GpuResults) -> float | None:
    ours, theirs = (results.decoded(LARGE, name, 1) for name in ("ours", "args_replicated"))
    if not ours or not theirs:
        return None
    return float(ours["cache_resident_reward_bytes"]) / float(theirs["cache_resident_reward_bytes"])


def _synchronizations(results: GpuResults) -> float | None:
    counts = [row["synchronizations_per_step"] for row in results.steps if row["mode"] != "eager"]
    return max((float(count) for count in counts if count), default=None)


TARGETS = (
    Target(
        "8B + 8B, B = 1, P = 512: two-model floor ÷ time, graphed",
        "≥ 0.75",
        ".2f",
        _of_floor(LARGE, 1, "ours"),
    ),
    Target("the same, compiled", "≥ 0.80", ".2f", _of_floor(LARGE, 1, "ours_compiled")),
    Target("the same: tokens/s ÷ ARGS's", "≥ 4", ".1f", _over_replicated(LARGE, 1)),
    Target("1B + 1B, B = 1, P = 512: tokens/s ÷ ARGS's", "≥ 8", ".1f", _over_replicated(SMALL, 1)),
    Target(
        "8B + 8B, B = 32, P = 512: tokens/s ÷ ARGS's, one row at a time",
        "≥ 80",
        ".0f",
        _over_replicated(LARGE, 32),
    ),
    Target(
        "8B, reward model in the same forward, B = 1, P = 512: tokens/s ÷ unguided",
        "≥ 0.90",
        ".2f",
        _shared_trunk,
    ),
    Target(
        "`tree_attention`, T ≥ 4096, B·G ≥ 64: of the measured copy bandwidth",
        "≥ 0.85",
        ".2f",
        _attention_of_copy,
    ),
    Target(
        "the same ÷ SDPA with packed query rows over one prefix",
        "≥ 1",
        ".2f",
        lambda results: _over(_long_attention(results, 10), "torch SDPA, packed"),
    ),
    Target(
        "`topk_logprobs`, V = 128256, B = 32 ÷ log_softmax + topk",
        "≥ 4",
        ".1f",
        lambda results: _over(results.timed("topk_logprobs", V=128256, B=32, k=10), "torch"),
    ),
    Target("synchronizations of the stream, a step", "0", ".2g", _synchronizations),
    Target("reward model's cache, resident ÷ ARGS's", "≈ 0.10", ".2f", _cache_share),
)


def _op_us(op: str, **sizes: int) -> Callable[[GpuResults], float | None]:
    def value(results: GpuResults) -> float | None:
        rows = results.timed(op, **sizes)
        return min((float(row["ours"]["us_p50"]) for row in rows if "ours" in row), default=None)

    return value


def _product_share(M: int) -> Callable[[GpuResults], float | None]:
    def value(results: GpuResults) -> float | None:
        rows = results.timed("linear", M=M)
        return min(
            (float(row["torch linear"]["of_copy"]) for row in rows if "torch linear" in row), default=None
        )

    return value


def _ms(model: str, method: str) -> Callable[[GpuResults], float | None]:
    def value(results: GpuResults) -> float | None:
        row = results.decoded(model, method, 1)
        return float(row["decode_ms_per_token"]) if row else None

    return value


# For every line of results/predicted.csv, which was written before the first round, the measured value.
MEASURED: dict[str, Callable[[GpuResults], float | None]] = {
    **{
        f"tree_attention B={B} T={T} S=10": _op_us("tree_attention", B=B, T=T, S=10)
        for B, T in ((1, 512), (1, 4096), (8, 4096), (32, 512), (32, 4096))
    },
    "topk_logprobs B=32 k=10": _op_us("topk_logprobs", B=32, k=10),
    "linear M=1, share of copy, least": _product_share(1),
    "linear M=10, share of copy, least": _product_share(10),
    "add_rms_norm B=1 S=10 E=4096": _op_us("add_rms_norm", B=1, S=10, E=4096),
    "rope_and_store B=1 S=10 H=32 G=8 D=128": _op_us("rope_and_store", B=1, S=10, H=32, G=8, D=128),
    "act_and_mul B=1 S=10 F=14336": _op_us("act_and_mul", B=1, S=10, F=14336),
    "8B + 8B B=1 graphed, Triton engine": _ms(LARGE, "ours"),
    "8B + 8B B=1 graphed, the model's own blocks": _ms(LARGE, "ours_transformers"),
    "8B + 8B B=1 compiled": _ms(LARGE, "ours_compiled"),
    "1B + 1B B=1 graphed, Triton engine": _ms(SMALL, "ours"),
    "1B + 1B B=1 graphed, the model's own blocks": _ms(SMALL, "ours_transformers"),
    "1B + 1B B=1 compiled": _ms(SMALL, "ours_compiled"),
}


def predicted_block(predicted: Sequence[Row], found: dict[str, GpuResults]) -> str:
    """What was predicted for an H100 before any GPU had run this, beside what was measured on every GPU."""
    names = list(found) or ["measured"]
    lines = [
        f"| predicted for an H100, before a GPU was at hand | unit | floor | predicted | {' | '.join(names)} |",
        f"|---|---|--:|--:|{'--:|' * len(names)}",
    ]
    for row in predicted:
        values = [MEASURED[row["what"]](results) for results in found.values()] or [None]
        shown = " | ".join(NOT_YET if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {row['what']} | {row['unit']} | {row['floor']} | {row['predicted']} | {shown} |")
    return "\n".join(lines)


def by_gpu(decode: Sequence[Row], ops: Sequence[Row], steps: Sequence[Row]) -> dict[str, GpuResults]:
    """The rows that a GPU made, by its name."""
    names = dict.fromkeys(row["gpu"] for row in (*decode, *ops, *steps) if row["gpu"])
    return {
        name: GpuResults(*([row for row in rows if row["gpu"] == name] for rows in (decode, ops, steps)))
        for name in names
    }


def targets_block(found: dict[str, GpuResults]) -> str:
    """The figures to reach, and what every GPU reached."""
    names = list(found) or ["measured"]
    lines = [
        f"| bfloat16, k = 10 | goal | {' | '.join(names)} |",
        f"|---|--:|{'--:|' * len(names)}",
    ]
    for target in TARGETS:
        values = [target.value(results) for results in found.values()] or [None]
        shown = [NOT_YET if value is None else format(value, target.form) for value in values]
        lines.append(f"| {target.what} | {target.goal} | {' | '.join(shown)} |")
    notes = [] if found else [NONE, ""]
    return "\n".join([*notes, *lines])


def ops_block(found: dict[str, GpuResults]) -> str:
    """Every op beside its peers, a table for each GPU."""
    parts = []
    for name, results in found.items():
        if not results.ops:
            continue
        first = results.ops[0]
        lines = [
            f"{name}, driver {first['driver']}, torch {first['torch']}, triton {first['triton']}, rgtg-fast "
            f"{first['commit']}; a device copy moves {float(first['copy_gb_per_s']):.0f} GB/s. Microseconds of one run "
            "with a cold second-level cache, median and the quantiles 0.2 and 0.8 over replays. *Of copy*: bytes that "
            "anyone must move, over that time and the copy's bandwidth.",
            "",
            "| op | shape | dtype | who | µs | of copy | ÷ ours |",
            "|---|---|---|---|--:|--:|--:|",
        ]
        ours = {(row["op"], row["shape"], row["dtype"]): row for row in results.ops if row["who"] == "ours"}
        for row in results.ops:
            own = ours.get((row["op"], row["shape"], row["dtype"]))
            ratio = "–" if own is None else f"{float(row['us_p50']) / float(own['us_p50']):.2f}"
            lines.append(
                f"| `{row['op']}` | {row['shape']} | {row['dtype']} | {row['who']} "
                f"| {float(row['us_p50']):.1f} ({float(row['us_p20']):.1f} to {float(row['us_p80']):.1f}) "
                f"| {float(row['of_copy']):.2f} | {ratio} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_OPS


def draw_gpu(found: dict[str, GpuResults], folder: Path) -> list[Path]:
    """Roofline of the ops, and tokens per second over k, P and B for every model, as far as they were measured."""
    if not found:
        return []
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    drawn = []
    for name, results in found.items():
        about = name.lower().replace("nvidia ", "").replace(" ", "_")
        if results.ops:
            drawn.append(_draw_roofline(name, results.ops, folder / f"roofline_{about}.svg"))
        for model in dict.fromkeys(row["model"] for row in results.decode):
            rows = [row for row in results.decode if row["model"] == model and row["dtype"] == "bfloat16"]
            if any(row["method"] == "ours" for row in rows):
                kind = model.partition(" ")[0].lower()
                drawn.append(_draw_speed(f"{model}, {name}", rows, folder / f"gpu_{kind}_{about}.svg"))
    return drawn


def _draw_roofline(title: str, rows: Sequence[Row], path: Path) -> Path:
    figure, axis = _figure(1, (6.4, 4.2))
    axis = axis[0]
    bandwidth, product = (float(rows[0][name]) for name in ("copy_gb_per_s", "product_tflop_per_s"))
    counted = [row for row in rows if float(row["operations"]) > 0]
    intensities = [float(row["operations"]) / float(row["bytes"]) for row in counted]
    ends = (min(intensities) / 2, max(*intensities, 2e3 * product / bandwidth))
    ridge = 1e3 * product / bandwidth
    points = sorted({ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]})
    axis.plot(
        points,
        [min(bandwidth * x / 1e3, product) for x in points],
        color="black",
        lw=1,
        label=f"copy {bandwidth:.0f} GB/s, product {product:.0f} TFLOP/s (measured)",
    )
    for number, op in enumerate(dict.fromkeys(row["op"] for row in counted)):
        for ours in (True, False):
            of_op = [
                (
                    float(row["operations"]) / float(row["bytes"]),
                    float(row["operations"]) / float(row["us_p50"]),
                )
                for row in counted
                if row["op"] == op and (row["who"] == "ours") is ours
            ]
            if of_op:
                x, y = zip(*((at, rate / 1e6) for at, rate in of_op), strict=True)
                colour = OP_COLOURS[number % len(OP_COLOURS)]
                axis.plot(
                    x,
                    y,
                    "o",
                    ms=4,
                    color=colour,
                    markerfacecolor=colour if ours else "none",
                    label=f"{op}, {'ours' if ours else 'peers'}",
                )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must be moved",
        ylabel="TFLOP/s",
        title=title,
    )
    axis.grid(alpha=0.3)
    return save_figure(figure, path, columns=2, fontsize=7)


def _draw_speed(title: str, rows: Sequence[Row], path: Path) -> Path:
    figure, axes = _figure(3, (10.5, 3.6))
    panels = (
        ("k", "candidates k", "P=512, B=1"),
        ("prompt_length", "prompt length P", "k=10, B=1"),
        ("batch", "rows B", "P=512, k=10"),
    )
    usual = {"k": "10", "prompt_length": "512", "batch": "1"}
    for axis, (varied, label, at_usual) in zip(axes, panels, strict=True):
        fixed = {name: value for name, value in usual.items() if name != varied}
        for method, (colour, style) in LINES.items():
            at = {
                int(row[varied]): float(row["tokens_per_second"])
                for row in rows
                if row["method"] == method and all(row[name] == value for name, value in fixed.items())
            }
            if at:
                points = zip(*sorted(at.items()), strict=True)
                axis.plot(*points, style, marker="o", ms=3, color=colour, label=METHODS[method].label)
        axis.set(xscale="log", yscale="log", xlabel=label, title=at_usual)
        ticks = sorted({int(row[varied]) for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens per second")
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path, columns=4, fontsize=7)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]
