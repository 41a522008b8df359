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

# An adapter that runs in the base model's forward, beside the same adapter run as a model of its own.
TRUNK = ("shared_trunk", "two_models", "ours_unguided", "args_replicated", "unguided")
SHARED = (
    Cell(128, 10, 1, "bfloat16", TRUNK, repeats=5, seconds_per_run=15),
    Cell(128, 10, 8, "bfloat16", TRUNK, repeats=3, seconds_per_run=15),
    Cell(128, 10, 1, "float32", TRUNK, repeats=5, seconds_per_run=15),
    Cell(512, 10, 1, "bfloat16", TRUNK, repeats=3, seconds_per_run=15),
    Cell(512, 10, 8, "bfloat16", TRUNK, repeats=3, seconds_per_run=15),
)

# The goals for a CPU with AMX: two models, and of the shared trunk those with short prompts.
PEERS = ("ours", "ours_transformers", "ours_unguided", "args_replicated", "unguided")
GOALS = (
    Cell(2048, 10, 1, "bfloat16", PEERS, new_tokens=32, repeats=3),
    Cell(512, 10, 8, "bfloat16", PEERS, new_tokens=32, repeats=3, seconds_per_run=30),
    Cell(512, 10, 1, "float32", PEERS, repeats=3, seconds_per_run=25),
)
# The reward model of the following ones.
ADAPTER = "bundled:pargs"
TRUNK_GOALS = tuple(cell for cell in SHARED if (cell.dtype, cell.prompt_length) == ("bfloat16", 128))

# The cells of a round on a GPU by name: sizes of the models, and what is timed together. Compiling takes tens of
# seconds, so compiled methods have a cell of their own. A peer's run is cut to the tokens that fit `seconds_per_run`.
ROUND: dict[str, tuple[str, Cell]] = {
    "8b": (
        "llama-8b",
        Cell(
            *(512, 10, 1, "bfloat16"),
            ("ours", "args_replicated", "unguided", "ours_unguided", "ours_transformers"),
            repeats=3,
            seconds_per_run=2,
        ),
    ),
    "8b-shared": (
        "llama-8b",
        Cell(
            512,
            10,
            1,
            "bfloat16",
            ("shared_trunk", "two_models", "ours_unguided"),
            repeats=3,
            seconds_per_run=2,
        ),
    ),
    "8b-compiled": (
        "llama-8b",
        Cell(512, 10, 1, "bfloat16", ("ours", "ours_compiled"), repeats=3, seconds_per_run=2),
    ),
    "8b-rows": (
        "llama-8b",
        Cell(512, 10, 32, "bfloat16", ("ours", "args_replicated"), repeats=2, seconds_per_run=2),
    ),
    "1b": (
        "llama-1b",
        Cell(
            *(512, 10, 1, "bfloat16"),
            ("ours", "args_replicated", "unguided", "ours_unguided", "ours_transformers", "ours_compiled"),
            repeats=3,
            seconds_per_run=2,
        ),
    ),
}


# Further lines of the tables of CPUs; the sweep has them.
HALF = (
    Cell(512, 10, 1, "bfloat16", BATCHED),
    Cell(2048, 10, 1, "bfloat16", BATCHED),
    Cell(512, 10, 8, "bfloat16", BATCHED),
)


def shown_places(device: str) -> list[tuple[str, int, int, int]]:
    """The places that a table of this device shows, in order."""
    if device == "cuda":
        return list(dict.fromkeys(cell.place for _, cell in ROUND.values()))
    return list(dict.fromkeys(cell.place for cell in (*HEADLINES, *HALF)))


def sweep_cells() -> list[Cell]:
    """The headlines first, then P of 16, 512, 2048, k of 5, 10, 40, B of 1, 8 and both dtypes, once each.

    Cells that would repeat another one are left out: `unguided` does not depend on k, `pargs_serial` costs k
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
