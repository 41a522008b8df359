"""Which configurations are measured."""

from __future__ import annotations

from benchmarks.harness import Cell

ALL = ("ours", "args_replicated", "pargs_serial", "unguided")
BATCHED = ("ours", "args_replicated", "unguided")
ENGINES = ("ours", "ours_transformers", "args_replicated", "pargs_serial", "unguided")

# The lines of the README: more repeats than the rest, and longer runs before fewer tokens are taken.
HEADLINES = (
    Cell(512, 10, 1, "float32", ENGINES, repeats=3, seconds_per_run=25),
    Cell(2048, 10, 1, "float32", ALL, repeats=3, seconds_per_run=25),
    Cell(512, 10, 8, "float32", BATCHED, repeats=3, seconds_per_run=30),
    Cell(128, 10, 1, "bfloat16", ENGINES, repeats=5, seconds_per_run=15),
)

# An adapter as guide in the base model's own forward, beside the same guide as a model of its own.
TRUNK = ("shared_trunk", "two_models", "ours_unguided", "args_replicated", "unguided")
SHARED = (
    Cell(128, 10, 1, "bfloat16", TRUNK, repeats=5, seconds_per_run=15),
    Cell(128, 10, 1, "float32", TRUNK, repeats=5, seconds_per_run=15),
    Cell(512, 10, 1, "bfloat16", TRUNK, repeats=3, seconds_per_run=15),
    Cell(512, 10, 8, "bfloat16", TRUNK, repeats=3, seconds_per_run=15),
)

# The same on a GPU, and compiled in a cell of its own.
SHARED_GPU = (
    Cell(512, 10, 1, "bfloat16", TRUNK, repeats=3, seconds_per_run=8),
    Cell(
        *(512, 10, 1, "bfloat16"),
        ("shared_trunk", "shared_compiled", "ours_unguided", "ours_unguided_compiled"),
        repeats=3,
        seconds_per_run=8,
    ),
    Cell(128, 10, 1, "bfloat16", TRUNK, repeats=3, seconds_per_run=8),
    Cell(512, 10, 8, "bfloat16", TRUNK, repeats=3, seconds_per_run=8),
)

# Where a GPU's time goes first, (P, k, B): the headline, then batch, length and k.
GPU_PLACES = ((512, 10, 1), (512, 10, 32), (4096, 10, 1), (128, 10, 1), (512, 10, 8), (512, 40, 1))


def _gpu_methods(prompt_length: int, k: int, batch: int) -> tuple[str, ...]:
    """What is timed in a cell on a GPU; nothing again that does not depend on k, or that a batch does not change."""
    methods = ["ours", "ours_eager", "args_replicated"]
    if k == 10:
        if batch == 1:
            methods.append("pargs_serial")
        if batch in (1, 32):
            methods += ["genarm_published", "ours_genarm"]
        methods += ["unguided", "ours_unguided"]
    return tuple(methods)


def _gpu_cells() -> tuple[Cell, ...]:
    """P of 128, 512, 4096, k of 10, 40, B of 1, 8, 32 in bfloat16, what matters most first, and one cell in float32."""
    first, rest = [], []
    for prompt_length, k, batch in GPU_PLACES:
        methods = _gpu_methods(prompt_length, k, batch)
        first.append(Cell(prompt_length, k, batch, "bfloat16", methods, repeats=3, seconds_per_run=8))
    # Compiling takes tens of seconds a cell: in cells of its own, what needs none of it is written by then.
    compiled = [
        Cell(*place, "bfloat16", ("ours", "ours_compiled"), repeats=3, seconds_per_run=8)
        for place in GPU_PLACES[:2]
    ]
    # In float32 the tokens must be equal.
    rest.append(Cell(512, 10, 1, "float32", ("ours", "args_replicated"), repeats=1, seconds_per_run=4))
    for k in (10, 40):
        for prompt_length in (512, 4096, 128):
            for batch in (1, 8, 32):
                if (prompt_length, k, batch) not in GPU_PLACES:
                    methods = _gpu_methods(prompt_length, k, batch)
                    rest.append(
                        Cell(prompt_length, k, batch, "bfloat16", methods, repeats=1, seconds_per_run=4)
                    )
    return (first[0], compiled[0], first[1], compiled[1], *first[2:], *rest)


GPU = _gpu_cells()


# Further lines of the CPU's tables, out of the sweep.
HALF = (
    Cell(512, 10, 1, "bfloat16", BATCHED),
    Cell(2048, 10, 1, "bfloat16", BATCHED),
    Cell(512, 10, 8, "bfloat16", BATCHED),
)


def shown_places(device: str) -> list[tuple[str, int, int, int]]:
    """The places that a table of this device shows, in its order."""
    if device == "cuda":
        return [("bfloat16", batch, prompt_length, k) for prompt_length, k, batch in GPU_PLACES]
    return list(dict.fromkeys(cell.place for cell in (*HEADLINES, *HALF)))


def sweep_cells() -> list[Cell]:
    """The headlines first, then P of 16, 512, 2048, k of 5, 10, 40, B of 1, 8 and both dtypes, once each.

    What would only repeat another cell is left out: `unguided` does not depend on k, `pargs_serial` costs k
    times one candidate (other k at P=16 only), and neither it nor `args_replicated` (k=10 only) gains
    anything from a batch.
    """
    every = list(HEADLINES)
    taken = {cell.place for cell in HEADLINES}
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            for prompt_length in (16, 512, 2048):
                for k in (10, 5, 40):
                    methods = ["ours"]
                    if batch == 1 or k == 10:
                        methods.append("args_replicated")
                    if batch == 1 and (k == 10 or prompt_length == 16):
                        methods.append("pargs_serial")
                    if k == 10:
                        methods.append("unguided")
                    cell = Cell(prompt_length, k, batch, dtype, tuple(methods))
                    if cell.place not in taken:
                        every.append(cell)
    return every
