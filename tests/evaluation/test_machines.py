"""Results of several machines: a block for each, and no figure of one in the place of another's. Invented numbers."""

import pytest

from benchmarks import decode, harness
from benchmarks.cells import ADAPTER, GOALS, HALF, HEADLINES, SHARED, TRUNK_GOALS, Cell
from benchmarks.harness import COLUMNS, same_machine
from benchmarks.report import decoding, goals, pages, servers, training, weights
from benchmarks.report.pages import Machine, by_machine
from rgtg_fast.bundled import embedded

AMD = {"cpu": "AMD EPYC", "isa": "", "peer_isa": ""}
INTEL = {
    "cpu": "Intel(R) Xeon(R) Processor",
    "isa": "amx",
    "peer_isa": "bf16 brg_matmul:x_amx; fp32 mkl:avx512",
}
ON_INTEL = (
    "Intel(R) Xeon(R) Processor, 2 threads, instruction set amx (torch's own products: bf16 brg_matmul:x_amx; fp32 "
    "mkl:avx512)"
)
SPEED = {
    "ours": 12.0,
    "ours_transformers": 8.0,
    "args_replicated": 3.0,
    "pargs_serial": 0.03,
    "unguided": 25.0,
    "ours_unguided": 24.0,
    "shared_trunk": 18.0,
    "two_models": 12.0,
}


def row(machine: dict[str, str], cell: Cell, method: str, model: str = embedded.NAME, **more: object):
    known = machine | {"cores": 2, "threads": 2, "device": "cpu", "model": model, "method": method}
    known |= {name: getattr(cell, name) for name in ("dtype", "batch", "prompt_length", "k", "new_tokens")}
    known |= {"tokens_per_second": SPEED[method], "memory_bandwidth_gb_s": 40, "time_is": "measured"}
    known |= {"torch": "2", "transformers": "5", "rgtg_fast": "0.1", "commit": "abc", "reference": ""}
    known |= {"prefill_ms_per_token": 10.0, "lm_ms_per_token": 20.0, "reward_ms_per_token": 30.0}
    known |= {"weight_bytes_per_token": 1e9, "floor_ms_per_token": 25.0, "achieved_over_floor": 1.5}
    return {**dict.fromkeys(COLUMNS, ""), **{name: str(value) for name, value in (known | more).items()}}


def rows_of(machine: dict[str, str], cells, model: str = embedded.NAME, **more: object):
    return [row(machine, cell, method, model, **more) for cell in cells for method in cell.methods]


def trunk(machine: dict[str, str], speed: float):
    """The shared trunk at this speed, where unguided decoding has 24 tokens a second."""
    cell = SHARED[0]
    rows = rows_of(machine, [cell], f"{embedded.NAME} with {ADAPTER}")
    return [
        each | {"tokens_per_second": str(speed)} if each["method"] == "shared_trunk" else each
        for each in rows
    ]


def test_every_machine_has_a_block_of_its_own_in_the_order_of_names():
    both = [*rows_of(INTEL, HEADLINES), *rows_of(AMD, HEADLINES)]
    text = decoding.speed_block(both)
    assert text.count("Tokens per second,") == 2
    assert text.index("AMD EPYC, 2 threads, 40 GB/s") < text.index(f"{ON_INTEL}, 40 GB/s")
    assert text.count(decoding.NOTES) == 1
    assert text.count("| **12.0** |") == 2 * len(HEADLINES)
    trunks = decoding.trunk_block([*trunk(INTEL, 12), *trunk(AMD, 18)])
    assert trunks.index("| **18.0** |") < trunks.index(ON_INTEL) < trunks.index("| **12.0** |")
    phases = decoding.phases_block(both)
    amd, intel, notes = phases.split("\n\n")
    assert amd.count("| AMD EPYC | native |") == intel.count("Xeon(R) Processor | native |") == len(HEADLINES)
    assert "Milliseconds per token" in notes


def test_one_machine_has_the_text_that_it_has_alone():
    alone = rows_of(AMD, (*HEADLINES, *HALF))
    with_other = [*alone, *rows_of(INTEL, HEADLINES)]
    for block in (decoding.speed_block, decoding.phases_block):
        table = block(alone).split("\n\nMilli")[0].removesuffix(decoding.NOTES)
        assert block(with_other).startswith(table)
    assert "instruction set" not in decoding.speed_block(alone), "where no row names one"


def test_a_rerun_replaces_the_rows_of_its_machine_alone():
    new = AMD | {"isa": "avx512bf16", "peer_isa": "bf16 some"}
    cells = HEADLINES[:1]
    rows = [*rows_of(AMD, HEADLINES[:2]), *rows_of(INTEL, cells)]
    text = decoding.speed_block([*rows, *rows_of(new, cells, tokens_per_second=99)])
    assert text.count("Tokens per second,") == 2
    assert "AMD EPYC, 2 threads, instruction set avx512bf16 (torch's own products: bf16 some), 40" in text
    assert text.count("| **99.0** |") == 1
    assert text.count("| **12.0** |") == 2, "what was not measured again, and the other machine's"


def test_rows_without_an_instruction_set_join_the_only_one_that_is_named():
    def about(cpu, isa):
        return {"cpu": cpu, "threads": "2", "gpu": "", "isa": isa}

    found = by_machine([about("B", ""), about("A", ""), about("B", "amx"), {**about("A", "")}])
    assert found.keys() == {Machine("A", "", "2", ""), Machine("B", "amx", "2", "")}
    assert list(found) == sorted(found)
    several = by_machine([about("B", ""), about("B", "avx2"), about("B", "amx")])
    assert [machine.isa for machine in several] == ["", "amx", "avx2"]
    older = {name: value for name, value in about("C", "").items() if name != "isa"}
    assert list(by_machine([older])) == [Machine("C", "", "2", "")]


def test_the_processor_is_told_with_its_instructions():
    one = {"cpu": "A", "threads": "1", "gpu": "", "isa": "", "peer_isa": ""}
    assert pages.processor([one]) == "A, 1 thread"
    assert pages.processor([one | {"isa": "avx2"}, one]) == "A, 1 thread, instruction set avx2"
    assert pages.processor([one | {"gpu": "Some GPU", "isa": "avx2"}]) == "Some GPU"


def test_the_readmes_range_is_that_of_all_machines():
    assert "reaches 0.8 times the speed" in decoding.range_block(trunk(AMD, 18))
    both = [*trunk(AMD, 18), *trunk(INTEL, 9)]
    assert "reaches 0.4 to 0.8 times the speed of unguided decoding" in decoding.range_block(both)
    on_gpu = [each | {"device": "cuda", "gpu": "Some GPU"} for each in trunk(AMD, 2)]
    assert decoding.range_block([*both, *on_gpu]) == decoding.range_block(both)
    assert "Not measured" in decoding.range_block([])


@pytest.mark.parametrize(
    ("peers", "ratio"),
    [
        ({"args_replicated": 30}, 3.0),
        ({"args_replicated": 30, "ours_transformers": 25}, 2.5),
        ({"args_replicated": 30, "unguided": 12}, 2.4),
        ({"args_replicated": ""}, None),
        ({}, None),
    ],
    ids=["args", "own-blocks", "twice-unguided", "unknown", "none"],
)
def test_the_prefill_is_compared_with_the_shortest_one(peers, ratio):
    cell = {"ours": 10, **peers}
    rows = {name: {"prefill_ms_per_token": str(ms)} for name, ms in cell.items()}
    assert decoding.prefill_ratio(rows) == ratio
    assert decoding.prefill_ratio({name: each for name, each in rows.items() if name != "ours"}) is None


def goal_rows(machine):
    return [*rows_of(machine, GOALS), *rows_of(machine, TRUNK_GOALS, f"{embedded.NAME} with {ADAPTER}")]


def test_goals_stand_beside_what_a_machine_with_amx_measured():
    text = goals.goals_block([*goal_rows(INTEL), *goal_rows(AMD | {"isa": "avx512bf16"})])
    assert text.startswith(f"{ON_INTEL}, 40 GB/s of memory bandwidth")
    lines = [line for line in text.splitlines() if "| ≥ " in line or "| ≤ " in line]
    assert len(lines) == len(goals.TARGETS), "of one machine: the other has no tiles"
    assert "| bfloat16 | 1 | 2048 | 32 | ≥ 0.95 | 1.00 |" in lines[0]
    assert lines[3] == "| two models: tokens/s ÷ ARGS's | bfloat16 | 8 | 512 | 32 | ≥ 5.5 | 4.00 |"
    assert lines[5].endswith("| bfloat16 | 1 | 128 | 64 | ≥ 0.8 | 0.75 |")
    assert lines[7].endswith("| bfloat16 | 1 | 128 | 64 | ≤ 1.25 | 1.50 |")
    assert goals.NOT_YET not in text
    half = goals.goals_block(rows_of(INTEL, GOALS))
    assert half.count(goals.NOT_YET) == 3
    assert goals.goals_block(goal_rows(AMD)) == goals.NO_GOALS


def test_one_command_measures_every_goal(capsys):
    assert decode.main(["--goals", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "5 cells"
    assert [line.partition(" k=")[0] for line in lines[:-1]] == [
        "bfloat16 B=1 P=2048",
        "bfloat16 B=8 P=512",
        "float32 B=1 P=512",
        "bfloat16 B=1 P=128",
        "bfloat16 B=8 P=128",
    ]
    for goal in goals.TARGETS:
        assert goal.value({name: row(INTEL, goal.cell, name) for name in goal.cell.methods}) is not None


HERE = {**INTEL, "cores": 2, "threads": 2, "gpu": None}


def test_fresh_rows_of_one_machine_leave_those_of_others(tmp_path):
    path, cells = tmp_path / "decode.csv", list(GOALS[:1])
    others = [*rows_of(AMD, cells), *rows_of(INTEL | {"isa": "avx512bf16"}, cells)]
    harness.append(path, [*others, *rows_of(INTEL, GOALS[:2])])
    decode._fresh(path, cells, embedded.NAME, "cpu", HERE)
    assert harness.read(path) == [*others, *rows_of(INTEL, GOALS[1:2])]


def test_an_older_row_counts_as_this_machines():
    of_amd = HERE | {"cpu": "AMD EPYC", "isa": "avx512bf16"}
    old = row(AMD, GOALS[0], "ours")
    assert same_machine(old, of_amd)
    assert same_machine(old | {"isa": "avx512bf16"}, of_amd)
    assert not same_machine(old | {"isa": "avx2"}, of_amd)
    assert not same_machine(old, HERE)
    assert not same_machine(old | {"threads": "1"}, of_amd)
    assert same_machine({name: value for name, value in old.items() if name != "isa"}, of_amd)


def test_other_tables_keep_machines_apart_and_show_the_latest():
    about = {"threads": "2", "gpu": "", "rgtg_fast": "0", "commit": "abc", "model": "M", "dtype": "float32"}
    fork = about | {
        "data": "D",
        "pairs": "7",
        "objective": "o",
        "prompt_length": "1",
        "k": "2",
        "new_tokens": "3",
    }
    fork |= {"accuracy_0.5": ".5", "accuracy_1": ".6", "ci95_low_1": ".55", "ci95_high_1": ".65"}
    fork |= {
        "adapter_bytes": "1",
        "two_models_tokens_per_second": "40",
        "ours_unguided_tokens_per_second": "80",
    }
    fork |= {"fork_layer": "20", "shared_trunk_tokens_per_second": "60"}
    rows = [fork | AMD, fork | INTEL, fork | AMD | {"shared_trunk_tokens_per_second": "72"}]
    text = training.fork_block(rows)
    assert text.count("| 20 |") == 2
    assert "| 60.0 | 0.75 | 1.50 |" in text.partition("AMD EPYC")[2].partition(ON_INTEL)[2]
    assert "| 72.0 | 0.90 | 1.80 |" in text.partition(ON_INTEL)[0]

    served = about | {
        "vllm": "1",
        "reward": "r",
        "k": "2",
        "support": "lm",
        "concurrency": "1",
        "new_tokens": "3",
    }
    names = ("unguided_tokens_per_second", "guided_tokens_per_second", "guided_over_unguided")
    served |= dict.fromkeys((*names, "lowest_ratio", "highest_ratio"), "0.5") | {"equal_to_decoder": "True"}
    text = servers.vllm_block([served | INTEL, served | AMD, served | INTEL])
    assert text.count("in 1 of 1 rows") == 2
    assert text.index("AMD EPYC, 2 threads, rgtg-fast") < text.index(f"{ON_INTEL}, rgtg-fast")

    names = (
        "weights",
        "engine",
        "rank_correlation",
        "tokens",
        "equal_tokens",
        "data",
        "max_length",
        "k",
        "steps",
    )
    rounded = about | dict.fromkeys((*names, "lm", "guide", "equal_verdicts"), "1")
    rounded |= {
        "weight_bytes": "1e6",
        "bytes_per_token": "1e6",
        "tokens_per_second": "2",
        "pairs": "",
        "accuracy": "",
    }
    rounded["reward_weights"] = "int8"
    rounded |= {"ci95_low": "", "ci95_high": ""}
    text = weights.weights_block([rounded | INTEL, rounded | AMD])
    assert text.count("| base | reward | engine |") == 2
    assert text.index("AMD EPYC") < text.index(ON_INTEL)
