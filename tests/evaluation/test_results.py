"""From a measurement to the CSV, the figures and the README's table, and back."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import decode, harness
from benchmarks.cells import HEADLINES, ROUND, SHARED, shown_places, sweep_cells
from benchmarks.harness import COLUMNS, Cell
from benchmarks.report import decoding, training
from benchmarks.report.__main__ import main as report
from benchmarks.report.blocks import BLOCKS, PAGES, ReportData, all_rows
from benchmarks.report.pages import current_block, write_block
from rgtg_fast.bench import roofline
from rgtg_fast.bench.run import BenchmarkMismatchError
from rgtg_fast.errors import RGTGError

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
MACHINE = {
    "cpu": "Some CPU",
    "isa": "avx2",
    "peer_isa": "bf16 some:avx2; fp32 mkl",
    "cores": 2,
    "threads": 2,
    "gpu": None,
    "driver": None,
    "triton": None,
    "memory_bandwidth_gb_s": 40.25,
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "rgtg_fast": "0.1.0",
    "commit": "abc",
}
SPEED = {
    "ours": 12.3,
    "ours_transformers": 8.0,
    "args_replicated": 3.05,
    "pargs_serial": 0.031,
    "unguided": 25.0,
    "ours_unguided": 24.0,
    "shared_trunk": 18.0,
    "two_models": 12.0,
    "ours_eager": 9.0,
    "genarm_published": 5.0,
    "ours_genarm": 10.0,
}


def fake_bench(**given):
    """What run_bench returns, with invented numbers."""
    rows = []
    for name in given["methods"]:
        ms = 1e3 / SPEED[name]
        guided = name != "unguided"
        lossy = given["dtype"] == "bfloat16" and name == "ours"
        row = {
            "method": name,
            "engine": "native" if name == "ours" else "transformers",
            "tokens_per_second": SPEED[name],
            "ms_per_token": ms,
            "decode_ms_per_token": 0.9 * ms,
            "phases": {"prefill": 0.1 * ms, "lm": 0.5 * ms, "reward": 0.4 * ms}
            if guided
            else {"prefill": 1.0},
            "cache_resident_bytes": {"lm": 100, "reward": 2**20 * (10 if name == "args_replicated" else 1)},
            "cache_peak_bytes": {"lm": 110},
            "memory_beyond_weights_bytes": 12345 if name == "ours" else None,
            "reference": "args_replicated" if guided else None,
            "equal_to_reference": (not lossy) if guided else None,
            "tokens_compared": 64 if guided else 0,
            "first_difference": {"position": 23, "score_gap": 0.0123} if lossy else None,
            "runs": 3,
            "tokens_measured": 2 if name == "pargs_serial" else given["new_tokens"],
            "rows_measured": 1,
            "extrapolated": name == "pargs_serial",
        }
        if name == "ours":
            row["floor"] = {
                "weight_bytes_per_token": 1e9,
                "floor_ms_per_token": 25.0,
                "achieved_over_floor": 1.71,
            }
        rows.append(row)
    config = {
        name: given[name] for name in ("prompt_length", "k", "batch", "new_tokens", "dtype", "device")
    } | {"beta": 1.0, "seed": 0, "omp_wait_policy": None}
    return {"methods": rows, "left_out": {}, "config": config, "machine": MACHINE}


def sweep(cells, path, bench=fake_bench, machine=MACHINE, said=None, seconds=None):
    progress = (said if said is not None else []).append
    return harness.sweep(cells, path, bench, {}, "Some-Model", machine, "cpu", progress, seconds)


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "decode.csv"
    assert sweep(HEADLINES, path) == 0
    return path


def test_every_method_of_every_cell_becomes_a_row(results):
    rows = harness.read(results)
    assert len(rows) == sum(len(cell.methods) for cell in HEADLINES)
    assert tuple(rows[0]) == COLUMNS
    serial = next(row for row in rows if row["method"] == "pargs_serial")
    assert serial["tokens_measured"] == "2"
    assert serial["time_is"].startswith("extrapolated: prefill once a row")
    ours = next(row for row in rows if row["method"] == "ours" and row["dtype"] == "bfloat16")
    assert (ours["equal_to_reference"], ours["first_difference_position"]) == ("False", "23")
    assert ours["first_difference_score_gap"] == "0.0123"
    assert (ours["reference"], ours["memory_beyond_weights_bytes"]) == ("args_replicated", "12345")
    assert (serial["memory_beyond_weights_bytes"], serial["first_difference_score_gap"]) == ("", "")


def test_a_broken_sweep_goes_on_where_it_stopped(tmp_path):
    path, asked = tmp_path / "decode.csv", []

    def bench(**given):
        asked.append(given["prompt_length"])
        return fake_bench(**given)

    cells = [Cell(length, 10, 1, "float32", ("ours", "unguided")) for length in (1, 2, 3)]
    sweep(cells[:2], path, bench)
    sweep(cells, path, bench)
    assert asked == [1, 2, 3]
    # another machine's rows do not count, and a method added later is measured alone beside the reference
    sweep(cells[:1], path, bench, machine=MACHINE | {"cpu": "Another"})
    sweep([Cell(1, 10, 1, "float32", ("ours", "args_replicated", "unguided"))], path, bench)
    assert asked == [1, 2, 3, 1, 1]
    assert [row["method"] for row in harness.read(path)][-1] == "args_replicated"
    assert len(harness.read(path)) == 3 * 2 + 2 + 1


def test_a_failing_cell_is_told_and_the_rest_goes_on(tmp_path, capsys):
    def bench(**given):
        if given["prompt_length"] == 1:
            raise BenchmarkMismatchError("ours differs from args_replicated")
        return fake_bench(**given)

    cells = [Cell(length, 10, 1, "float32", ("ours",)) for length in (1, 2)]
    assert sweep(cells, tmp_path / "decode.csv", bench) == 1
    assert "ours differs from args_replicated" in capsys.readouterr().err
    assert [row["prompt_length"] for row in harness.read(tmp_path / "decode.csv")] == ["2"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the models do not fit into the device's memory"),
        (RuntimeError("the compiler failed"), "RuntimeError"),
    ],
)
def test_a_cell_that_fails_on_the_device_is_told_and_the_rest_goes_on(tmp_path, capsys, error, message):
    def bench(**given):
        if given["prompt_length"] == 1:
            raise error
        return fake_bench(**given)

    cells = [Cell(length, 10, 1, "float32", ("ours",)) for length in (1, 2)]
    assert sweep(cells, tmp_path / "decode.csv", bench) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [row["prompt_length"] for row in harness.read(tmp_path / "decode.csv")] == ["2"]


def test_a_method_that_was_left_out_is_told_and_asked_for_again(tmp_path, capsys):
    asked = []

    def bench(**given):
        asked.append(given["methods"])
        names = [name for name in given["methods"] if name != "args_replicated"]
        return fake_bench(**{**given, "methods": names}) | {"left_out": {"args_replicated": "no memory"}}

    path, cells = (
        tmp_path / "decode.csv",
        [Cell(1, 10, 1, "float32", ("ours", "args_replicated", "unguided"))],
    )
    assert sweep(cells, path, bench) == 0
    assert "args_replicated is left out: no memory" in capsys.readouterr().err
    assert [row["method"] for row in harness.read(path)] == ["ours", "unguided"]
    sweep(cells, path, bench)
    assert asked[1] == ["ours", "args_replicated"]
    assert len(harness.read(path)) == 2


def test_a_method_is_written_as_soon_as_it_is_done(tmp_path):
    """A cell that fails later keeps what it has measured, and only the rest is asked for again."""
    asked, path = [], tmp_path / "decode.csv"

    def bench(each, **given):
        asked.append(given["methods"])
        each(fake_bench(**{**given, "methods": ["ours"]}))
        assert [row["method"] for row in harness.read(path)] == ["ours"]
        if len(asked) == 1:
            raise RGTGError("the rest fails")
        return fake_bench(**given)

    cells = [Cell(1, 10, 1, "bfloat16", ("ours", "unguided"))]
    assert sweep(cells, path, bench) == 1
    assert sweep(cells, path, bench) == 0
    assert asked == [["ours", "unguided"], ["unguided"]]
    assert [row["method"] for row in harness.read(path)] == ["ours", "unguided"]


def test_each_cell_gives_its_memory_back(tmp_path, monkeypatch):
    class Model:
        def __init__(self):
            self.itself = self

        def __del__(self):
            events.append("freed")

    def bench(**given):
        events.append(given["prompt_length"])
        model = Model()
        if given["prompt_length"] == 2:
            raise RGTGError(f"{model}")
        return fake_bench(**given)

    events = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    cells = [Cell(length, 10, 1, "float32", ("ours",)) for length in (1, 2, 3)]
    sweep(cells, tmp_path / "decode.csv", bench)
    assert events == [event for length in (1, 2, 3) for event in (length, "freed", "emptied")]


def test_no_cell_is_begun_when_the_time_is_over(tmp_path, monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def bench(**given):
        clock[0] += 60
        return fake_bench(**given)

    path = tmp_path / "decode.csv"
    cells = [Cell(length, 10, 1, "float32", ("ours", "unguided")) for length in (1, 2, 3, 4)]
    assert sweep(cells, path, bench, said=said, seconds=100) == 0
    assert [row["prompt_length"] for row in harness.read(path)] == ["1", "1", "2", "2"]
    left_out = [line for line in said if "left out, 100 s are over: ours, unguided" in line]
    assert [line[:5] for line in left_out] == ["[3/4]", "[4/4]"]
    # what the file already holds costs nothing
    assert sweep(cells, path, bench, seconds=100) == 0
    assert len(harness.read(path)) == 8


def test_a_method_measured_later_stands_beside_what_it_must_agree_with(tmp_path):
    asked = []

    def bench(**given):
        asked.append(tuple(given["methods"]))
        return fake_bench(**given)

    path, first = tmp_path / "decode.csv", ("ours", "args_replicated", "genarm_published")
    sweep([Cell(1, 10, 1, "float32", first)], path, bench)
    for later in ("unguided", "ours_eager", "ours_genarm"):
        sweep([Cell(1, 10, 1, "float32", (*first, later))], path, bench)
    assert asked[1:] == [
        ("unguided",),
        ("ours", "args_replicated", "ours_eager"),
        ("genarm_published", "ours_genarm"),
    ]


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "decode.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RGTGError, match="other columns"):
        harness.append(path, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_the_sweep_covers_what_it_promises():
    cells = sweep_cells()
    places = [cell.place for cell in cells]
    assert len(set(places)) == len(places)
    promised = {
        (dtype, batch, length, k)
        for dtype in ("float32", "bfloat16")
        for batch in (1, 8)
        for length in (16, 512, 2048)
        for k in (5, 10, 40)
    }
    assert promised <= set(places)
    assert all("ours" in cell.methods for cell in cells)


def test_a_round_on_a_gpu_measures_every_goal_and_compiles_apart():
    timed = {(shape, cell.batch): set() for shape, cell in ROUND.values()}
    for shape, cell in ROUND.values():
        assert (cell.prompt_length, cell.k, cell.dtype) == (512, 10, "bfloat16")
        timed[shape, cell.batch] |= set(cell.methods)
    assert timed["llama-8b", 1] >= {
        "ours",
        "ours_compiled",
        "args_replicated",
        "shared_trunk",
        "ours_unguided",
    }
    assert timed["llama-8b", 32] >= {"ours", "args_replicated"}
    assert timed["llama-1b", 1] >= {"ours", "ours_compiled", "args_replicated"}
    for name, (shape, cell) in ROUND.items():
        if shape == "llama-8b":
            assert any("compiled" in method for method in cell.methods) is (name == "8b-compiled")
    assert shown_places("cuda") == [("bfloat16", 1, 512, 10), ("bfloat16", 32, 512, 10)]
    assert ROUND["8b-shared"][1].place in {cell.place for cell in SHARED}, "the table shows these"


def test_the_readme_block_shows_every_headline_and_hides_no_difference(results):
    text = decoding.speed_block(harness.read(results))
    lines = [line for line in text.splitlines() if line.startswith(("| float32", "| bfloat16"))]
    assert len(lines) == len(HEADLINES)
    assert (
        "**12.3** | 3.05 | ≈ 0.03 | 25.0 | 4.0× | 397× | 1.0 : 10.0 MiB | all 64 | 1.71 | 0.2× |" in lines[0]
    )
    assert "first 23, then scores 0.012 apart" in next(line for line in lines if "bfloat16" in line)
    on = "Some CPU, 2 threads, instruction set avx2 (torch's own products: bf16 some:avx2; fp32 mkl), 40 GB/s"
    assert on in text


def test_the_shared_trunk_stands_beside_two_models_and_no_guide(tmp_path):
    path = tmp_path / "decode.csv"
    assert sweep(SHARED[:1], path) == 0
    text = decoding.trunk_block(harness.read(path))
    assert "| bfloat16 | 1 | 128 | 10 | 24.0 | **18.0** | 12.0 | 3.05 | 0.8× | 1.5× | 5.9× |" in text
    assert "Not measured" in decoding.trunk_block([])


def test_later_rows_replace_earlier_ones(results):
    rows = harness.read(results)
    newer = dict(rows[0], tokens_per_second="99.9")
    assert "**99.9**" in decoding.speed_block([*rows, newer])


def test_the_block_goes_between_the_markers_and_twice_is_once(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    text = decoding.speed_block(harness.read(results))
    assert write_block(readme, text, "benchmarks")
    once = readme.read_text(encoding="utf-8")
    assert not write_block(readme, text, "benchmarks")
    assert readme.read_text(encoding="utf-8") == once
    assert once.startswith(f"before\n{BEGIN}\n")
    assert once.endswith(f"{END}\nafter\n")
    assert current_block(readme, "benchmarks") == text
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="benchmarks:begin"):
        write_block(readme, text, "benchmarks")


def test_figures_are_the_same_files_every_time(results, tmp_path):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib (the bench extra)")
    rows = harness.read(results)
    first = [path.read_bytes() for path in decoding.draw(rows, tmp_path / "a")]
    second = [path.read_bytes() for path in decoding.draw(rows, tmp_path / "b")]
    assert first == second
    assert all(image.startswith(b"<?xml") for image in first)


def test_the_commands_work_from_one_end_to_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib (the bench extra)")
    monkeypatch.setattr(decode, "HEADLINES", (Cell(6, 3, 1, "float32", ("ours", "unguided"), new_tokens=3),))
    monkeypatch.setattr(roofline, "memory_bandwidth", lambda device="cpu": 10e9)
    output = tmp_path / "decode.csv"
    command = ["--quick", "--shape", "tiny", "--output", str(output)]
    assert decode.main(command) == 0
    assert decode.main(command) == 0
    assert "present" in capsys.readouterr().out
    nothing = tmp_path / "nothing.csv"
    assert decode.main([*command[:-1], str(nothing), "--seconds", "0"]) == 0
    assert "left out, 0 s are over: ours, unguided" in capsys.readouterr().out
    assert not nothing.exists()
    assert len(harness.read(output)) == 2
    assert decode.main([*command, "--fresh"]) == 0
    with output.open(newline="") as file:
        assert len(list(csv.reader(file))) == 3
    arguments = ["--results", str(output), "--study", str(tmp_path / "none.csv")]
    arguments += ["--figures", str(tmp_path / "figures")]
    for page in PAGES:
        names = [block.name for block in BLOCKS if block.page == page]
        markers = "\n".join(f"<!-- {name}:begin --><!-- {name}:end -->" for name in names)
        (tmp_path / f"{page}.md").write_text(markers, encoding="utf-8")
        arguments += [f"--{page}", str(tmp_path / f"{page}.md")]
    assert report(arguments) == 0
    methods = (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert "Not measured yet: run `python -m benchmarks.study`" in methods
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn >= {"decode_phases.svg", "decode_speed.svg"}


def test_the_committed_results_have_the_columns_that_are_written():
    for path in harness.RESULTS.glob("decode*.csv"):
        assert all(tuple(row) == COLUMNS for row in harness.read(path)), path


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}-{block.name}")
def test_the_pages_show_what_the_results_hold(block):
    page, rows = PAGES[block.page], all_rows()
    if not page.exists() or not rows:
        pytest.skip(f"no {page.name} or no benchmarks/results/decode*.csv in this checkout")
    assert current_block(page, block.name) == block.text(ReportData(rows)), "run python -m benchmarks.report"


def test_forks_are_shown_from_the_lowest_layer_to_the_head_alone():
    names = ("cpu", "threads", "gpu", "model", "dtype", "data", "pairs", "objective", "prompt_length", "k")
    row = dict.fromkeys((*names, "new_tokens", "rgtg_fast", "commit"), "x")
    row |= {"accuracy_0.5": ".5", "accuracy_1": ".6", "ci95_low_1": ".55", "ci95_high_1": ".65"}
    row |= {"adapter_bytes": str(2**20), "shared_trunk_tokens_per_second": "60"}
    row |= {"two_models_tokens_per_second": "40", "ours_unguided_tokens_per_second": "80"}
    lines = training.fork_block([row | {"fork_layer": f} for f in ("20", "none", "5")]).splitlines()
    assert lines[-3] == "| 5 | 0.500 | 0.600 [0.550, 0.650] | 1.0 | 60.0 | 0.75 | 1.50 |"
    assert lines[-2].startswith("| 20 |")
    assert lines[-1].startswith("| score head alone |")


def test_tables_about_training_say_what_the_rows_hold():
    row = {"data": "pairs", "pairs": "7", "dtype": "float32", "rgtg_fast": "0", "commit": "abc", "other": ""}

    def judged(figure, value, guide="", other=""):
        numbers = {"value": str(value), "ci95_low": str(value - 0.1), "ci95_high": str(value + 0.1)}
        return row | {"figure": figure, "guide": guide, "other": other, "fraction": "0.5"} | numbers

    text = training.accuracy_block(
        [
            judged("longer_wins", 0.55),
            judged("accuracy", 0.625, "one"),
            judged("above_longer_wins", 0.075, "one"),
            judged("accuracy", 0.5, "two"),
            judged("above_longer_wins", -0.05, "two"),
            judged("difference", 0.125, "one", "two"),
        ]
    )
    assert "| `one` | 0.625 [0.525, 0.725] |" in text
    assert "| `two` − longer wins | -0.050 [-0.150, +0.050] |" in text
    assert "| `one` − `two` | +0.125 [+0.025, +0.225] |" in text
    assert "chosen one in 0.550 [0.450, 0.650]" in text
    assert "Not measured" in training.accuracy_block([])
    assert "Not measured" in training.cost_block([])
