"""How the kernels of tree_attention are launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, power_of_two, signature

MAX_D = 256


def reason_against(D: int = 1) -> str:
    """Why the kernels cannot serve these sizes; empty where they can."""
    return f"its Triton kernel takes D <= {MAX_D}, not {D}" if D > MAX_D else ""


# Slots whose attention is summed up by itself. Results are folded leaf by leaf within a span of slots, then
# span by span, whichever programs do it: so the cut never changes a bit.
LEAF = 256
SPAN = 2048

# What a new token sees of the new tokens: itself, those of its mask, or itself and those before it.
ALONE, MASKED, CAUSAL = 0, 1, 2


# By bytes of a number and largest D: BLOCK_M with its BLOCK_N, warps and stages. Chosen so that two accumulators and a
# block of scores stay in registers on every architecture of docs/kernels.md, and blocks of keys and values are on
# their way meanwhile. Numbers of 4 bytes are split in two for the tensor cores and need twice the registers.
TILES = {
    2: {
        64: {16: (64, 4, 3), 64: (64, 4, 3), 128: (32, 8, 4)},
        128: {16: (64, 4, 3), 64: (64, 8, 3)},
        256: {16: (32, 8, 2), 32: (32, 8, 2)},
    },
    4: {64: {16: (32, 4, 2), 32: (32, 4, 2)}, 128: {16: (32, 4, 2)}, 256: {16: (16, 8, 1)}},
}


def configuration(D: int, rows: int, mode: int, dtype: torch.dtype) -> dict[str, object]:
    """Block shapes for a head of `D` numbers and so many query rows: new tokens times heads of the group."""
    tiles = next(tiles for width, tiles in TILES[dtype.itemsize].items() if width >= D)
    block = next((m for m in tiles if m >= rows), max(tiles))
    block_n, warps, stages = tiles[block]
    return {
        "MODE": mode,
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "BLOCK_M": block,
        "BLOCK_N": block_n,
        "LEAF": LEAF,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


def merge_configuration(D: int, span: int) -> dict[str, object]:
    """Block shapes of the merge: one program per query row.

    Args:
        D: numbers of a head. span: slots that each partial sum is over: a leaf or a span.
    """
    return {
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "LEAVES": int(span < SPAN),
        # The leaves of a span are folded into one sum, that into the others'; spans are just read by as many.
        "TOGETHER": SPAN // LEAF,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }


# Query rows from which their blocks alone fill the device, and partial sums would be the larger part of the memory.
MANY_ROWS = 1024


def span_of(programs: int, rows: int, T: int, multiprocessors: int) -> int:
    """Slots that one program walks over: a span where those fill the device, a leaf where not, all for many rows.

    Args:
        programs: programs per split: B · G · blocks of query rows.
        rows: query rows: new tokens times heads of the group.
        T: slots of the cache.
        multiprocessors: of the device.
    """
    if rows >= MANY_ROWS:
        return max(1, -(-T // LEAF)) * LEAF
    return SPAN if programs * max(1, -(-T // SPAN)) >= 2 * multiprocessors else LEAF


STRIDED = ("q", "k", "v", "k_cache", "v_cache", "out")


def _split(dtype: torch.dtype, D: int, rows: int, mode: int) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {f"p_{name}": pointer for name in STRIDED}
    arguments |= {"p_sums": "*fp32:16", "p_peaks": "*fp32:16", "p_totals": "*fp32:16", "p_lengths": "*i64:16"}
    arguments["p_ancestors"] = "*i64:16" if mode == MASKED else "None"
    arguments |= {"scale": "fp32", "G": "i32", "S": "i32", "T": "i32", "R": "i32", "span": "i32"}
    for name in STRIDED:
        arguments |= {f"{name}_{letter}": "i64:16" for letter in ("b", "h", "s")}
    return signature(arguments, configuration(D, rows, mode, dtype))


def _merge(dtype: torch.dtype, D: int, span: int = LEAF) -> dict[str, str]:
    arguments = {"p_sums": "*fp32:16", "p_peaks": "*fp32:16", "p_totals": "*fp32:16", "p_lengths": "*i64:16"}
    arguments |= {"p_out": f"*{TYPES[dtype]}:16", "G": "i32", "S": "i32", "T": "i32", "R": "i32"}
    arguments |= {"span": "i32", "splits": "i32"}
    arguments |= {f"out_{letter}": "i64:16" for letter in ("b", "h", "s")}
    return signature(arguments, merge_configuration(D, span))


MODES = (ALONE, MASKED, CAUSAL)

KERNELS = (
    KernelSpec(
        "split_kernel",
        (
            *(_split(torch.bfloat16, 64, rows, mode) for rows in (16, 64, 128) for mode in MODES),
            *(_split(torch.bfloat16, 128, rows, mode) for rows in (16, 64) for mode in MODES),
            *(_split(torch.bfloat16, 256, rows, mode) for rows in (16, 32) for mode in MODES),
            *(_split(torch.bfloat16, D, 64, ALONE) for D in (80, 96)),
            *(_split(torch.float16, 128, rows, ALONE) for rows in (16, 64)),
            *(_split(torch.float32, 64, rows, ALONE) for rows in (16, 32)),
            _split(torch.float32, 128, 16, ALONE),
            _split(torch.float32, 128, 16, CAUSAL),
            _split(torch.float32, 256, 16, ALONE),
        ),
    ),
    KernelSpec(
        "merge_kernel",
        (*(_merge(torch.bfloat16, D) for D in (64, 80, 128, 256)), _merge(torch.bfloat16, 128, SPAN)),
    ),
)
