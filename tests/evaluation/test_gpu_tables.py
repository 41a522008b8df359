"""What becomes of a GPU's results: the figures to reach, tables, roofline and speed. The numbers here are invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import COLUMNS, RESULTS, read
from benchmarks.ops import gpu_ops
from benchmarks.profile_step import COLUMNS as STEP_COLUMNS
from benchmarks.report.blocks import OF_GPU, matching
from benchmarks.report.gpu import (
    LARGE,
    MEASURED,
    NO_OPS,
    NOT_YET,
    SMALL,
    TARGETS,
    GpuResults,
    by_gpu,
    draw_gpu,
    ops_block,
    predicted_block,
    targets_block,
)

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA Imaginary"


def decoded(model: str, method: str, speed: float, batch: int = 1, **more: object) -> dict[str, str]:
    known = {
        "model": model,
        "method": method,
        "dtype": "bfloat16",
        "batch": batch,
        "prompt_length": 512,
        "k": 10,
    }
    known |= {
        "tokens_per_second": speed,
        "decode_ms_per_token": 1e3 / speed,
        "gpu": GPU,
        "device": "cuda",
        "time_is": "measured",
    }
    return {**dict.fromkeys(COLUMNS, ""), **{name: str(value) for name, value in (known | more).items()}}


def timed(op: str, who: str, us: float, of_copy: float, **sizes: int) -> dict[str, str]:
    shape = " ".join(f"{name}={size}" for name, size in sizes.items())
    known = {"op": op, "who": who, "shape": shape, "dtype": "bfloat16", "gpu": GPU, "of_copy": of_copy}
    known |= {f"us_p{p}": us + p / 100 for p in (20, 50, 80)}
    known |= {
        "bytes": 8_000_000,
        "operations": 0 if op == "commit" else 16_000_000,
        "driver": "1.2",
        "torch": "2",
    }
    known |= {"triton": "3", "commit": "abc", "copy_gb_per_s": 4000, "product_tflop_per_s": 700}
    assert known.keys() <= {*gpu_ops.COLUMNS, *gpu_ops.MACHINE}
    return {name: str(value) for name, value in known.items()}


def attention(who: str, us: float, of_copy: float, T: int, S: int = 10, B: int = 1) -> dict[str, str]:
    return timed("tree_attention", who, us, of_copy, B=B, H=32, G=8, S=S, T=T, D=128)


DECODE = [
    decoded(LARGE, "ours", 90, achieved_over_floor=1.6, cache_resident_reward_bytes=12),
    decoded(LARGE, "ours", 100, achieved_over_floor=1.25, cache_resident_reward_bytes=10),
    decoded(LARGE, "ours_compiled", 120, achieved_over_floor=1.125),
    decoded(LARGE, "args_replicated", 20, cache_resident_reward_bytes=100),
    decoded(LARGE, "ours", 2000, batch=32, achieved_over_floor=1.5),
    decoded(LARGE, "args_replicated", 20, batch=32),
    decoded(LARGE, "shared_trunk", 190),
    decoded(LARGE, "ours_unguided", 195),
    decoded(LARGE, "ours_unguided_compiled", 200),
    decoded(LARGE, "shared_compiled", 150),
    decoded(SMALL, "ours", 500, achieved_over_floor=1.2),
    decoded(SMALL, "ours", 400, achieved_over_floor=1.2, k=40),
    decoded(SMALL, "args_replicated", 40),
]
OPS = [
    attention("ours", 7, 0.3, 4096),
    attention("ours", 10, 0.5, 4096, B=8),
    attention("torch SDPA, packed query rows, prefix only", 8, 0.6, 4096, B=8),
    attention("torch SDPA, replicated prefix", 40, 0.1, 4096, B=8),
    attention("ours", 20, 0.9, 8192, B=8),
    attention("torch SDPA, packed query rows, prefix only", 60, 0.3, 8192, B=8),
    attention("torch SDPA, replicated prefix", 160, 0.1, 8192, B=8),
    attention("ours", 2, 0.01, 512),
    attention("ours", 9, 0.02, 4096, S=1),
    timed("topk_logprobs", "ours", 10, 0.4, B=32, V=128256, k=10),
    timed("topk_logprobs", "torch log_softmax + topk", 60, 0.1, B=32, V=128256, k=10),
    timed("topk_logprobs", "ours", 1, 0.4, B=1, V=128256, k=10),
    timed("commit", "ours", 3, 0.4, L=32, B=1),
]


def stepped(mode: str, waits: float) -> dict[str, str]:
    return {
        **dict.fromkeys(STEP_COLUMNS, ""),
        "mode": mode,
        "synchronizations_per_step": str(waits),
        "gpu": GPU,
    }


STEPS = [stepped("eager", 7), stepped("graphed", 0), stepped("compiled", 0.5)]


@pytest.fixture
def found() -> dict[str, GpuResults]:
    return by_gpu(DECODE, OPS, STEPS)


def test_every_goal_is_taken_from_the_rows_that_it_is_about(found: dict[str, GpuResults]) -> None:
    lines = targets_block(found).splitlines()
    assert lines[0] == f"| bfloat16, k = 10 | goal | {GPU} |"
    measured = [line.rsplit("| ", 2)[-1].strip(" |") for line in lines[2:]]
    # Floor over time of the later row, and compiled; 120 / 20; 500 / 40; 2000 / 20; 190 / 200; the worst long prefix of
    # eight rows; 8.5 / 10.5, the smaller lead of two; 60.5 / 10.5; the worst captured mode; 10 of 100 bytes.
    assert measured == ["0.80", "0.89", "6.0", "12.5", "100", "0.95", "0.50", "0.81", "5.8", "0.5", "0.10"]
    assert len(measured) == len(TARGETS)


def test_what_is_not_there_is_not_measured_yet() -> None:
    text = targets_block({})
    assert text.startswith("No GPU has been at hand")
    assert text.count(NOT_YET) == len(TARGETS)
    some = targets_block(by_gpu(DECODE[:1], [], []))
    assert some.count(NOT_YET) == len(TARGETS) - 1
    assert "No GPU" not in some
    assert ops_block(by_gpu(DECODE, [], [])) == NO_OPS
    assert by_gpu([decoded(SMALL, "ours", 1, gpu="")], [], []) == {}


def test_ops_stand_beside_their_peers(found: dict[str, GpuResults]) -> None:
    lines = ops_block(found).splitlines()
    assert lines[0].startswith(
        f"{GPU}, driver 1.2, torch 2, triton 3, rgtg-fast abc; a device copy moves 4000 GB/s"
    )
    assert (
        "| `tree_attention` | B=8 H=32 G=8 S=10 T=4096 D=128 | bfloat16 | ours | 10.5 (10.2 to 10.8) | 0.50 | 1.00 |"
        in lines
    )
    assert lines[-3].endswith("| torch log_softmax + topk | 60.5 (60.2 to 60.8) | 0.10 | 5.76 |")
    assert len([line for line in lines if line.startswith("| `")]) == len(OPS)


def test_predictions_stand_beside_what_was_measured(found: dict[str, GpuResults]) -> None:
    predicted = read(RESULTS / "predicted.csv")
    assert [row["what"] for row in predicted] == list(MEASURED), "each has a line and a measurement"
    assert all(float(row["predicted"]) > 0 and float(row["floor"]) > 0 for row in predicted)
    lines = predicted_block(predicted, found).splitlines()
    assert lines[0].endswith(f"| unit | floor | predicted | {GPU} |")
    assert "| tree_attention B=8 T=4096 S=10 | us | 45 | 49 | 10.5 |" in lines
    assert "| topk_logprobs B=32 k=10 | us | 2.7 | 8 | 10.5 |" in lines
    assert predicted_block(predicted, {}).count(NOT_YET) == len(predicted)


def test_figures_are_drawn_once_there_are_rows(found: dict[str, GpuResults], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib (the bench extra)")
    assert draw_gpu({}, tmp_path / "none") == []
    first = [(path.name, path.read_bytes()) for path in draw_gpu(found, tmp_path / "a")]
    assert [name for name, _ in first] == [
        "roofline_imaginary.svg",
        "gpu_llama-8b_imaginary.svg",
        "gpu_llama-1b_imaginary.svg",
    ]
    assert first == [(path.name, path.read_bytes()) for path in draw_gpu(found, tmp_path / "b")]
    roofline, speed = first[0][1].decode(), first[2][1].decode()
    assert "copy 4000 GB/s, product 700 TFLOP/s (measured)" in roofline
    assert "tree_attention, peers" in roofline
    assert "commit" not in roofline, "it does no arithmetic"
    assert "candidates k" in speed
    assert "ARGS, k copies of the cache" in speed


def test_the_results_of_gpus_name_their_gpu() -> None:
    assert all(row["gpu"] for pattern in OF_GPU for row in matching(pattern)), "no GPU made these"
