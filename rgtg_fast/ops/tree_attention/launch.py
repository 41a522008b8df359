"""How the kernels of tree_attention are launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, power_of_two, signature

MAX_D = 256


def reason_against(D: int = 1) -> str:
    """Why the kernels cannot serve these sizes; empty where they can."""
    return f"its Triton kernel takes D <= {MAX_D}, not {D}" if D > MAX_D else ""


# A row's prefix is summed up leaf by leaf. Leaves are folded within a span of slots, then span by span, whichever
# programs do it: so the cut never changes a bit. A leaf of a short row is a half or a quarter of `LEAF`, where as many
# as `TOGETHER` hold the row, and at least twice a block's query rows: their partial sums would outweigh the prefix.
LEAF = 256
TOGETHER = 8
SPAN = LEAF * TOGETHER


def leaf_of(length: int, least: int) -> int:
    """Slots of a leaf in a row of `length`, which the kernels work out by themselves."""
    return max(least, next((n for n in (LEAF // 4, LEAF // 2) if length <= n * TOGETHER), LEAF))


def least_leaf(block_m: int) -> int:
    """Slots of the smallest leaf for a block of query rows."""
    return min(max(2 * block_m, LEAF // 4), LEAF)


# What a new token sees of the new tokens: itself, those of its mask, or itself and those before it.
MODES = ALONE, MASKED, CAUSAL = 0, 1, 2


# By architecture, bytes of a number and largest D: BLOCK_M with its BLOCK_N, warps and stages. Chosen so that the
# accumulators and a block of scores stay in registers (docs/kernels.md), and blocks of keys and values are on their way
# meanwhile. Numbers of 4 bytes are split in two for the tensor cores and need twice the registers.
_BY_D_64 = {16: (64, 4, 3), 64: (64, 4, 3), 128: (32, 8, 4)}
_BY_D_256 = {16: (32, 8, 2), 32: (32, 8, 2)}
_FLOAT32 = {64: {16: (32, 4, 2), 32: (32, 4, 2)}, 128: {16: (32, 4, 2)}, 256: {16: (16, 8, 1)}}
TILES = {
    80: {
        2: {
            64: _BY_D_64,
            128: {16: (64, 4, 3), 64: (64, 8, 3), 128: (32, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
    # With four warps two programs share a multiprocessor, and no two warps compute the same scores.
    90: {
        2: {
            64: _BY_D_64,
            # Masks of a padded head take registers.
            127: {16: (64, 4, 3), 64: (64, 8, 3)},
            128: {16: (64, 4, 3), 64: (32, 4, 3), 128: (64, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
    # Sums lie in the tensor memory here and pass through registers to be scaled: four warps would spill them.
    100: {
        2: {
            64: _BY_D_64,
            127: {16: (64, 4, 3), 64: (32, 8, 3)},
            128: {16: (64, 4, 3), 64: (64, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
}


def configuration(D: int, rows: int, mode: int, dtype: torch.dtype, arch: int = 90) -> dict[str, object]:
    """Block shapes for a head of `D` numbers and so many query rows: new tokens times heads of the group.

    Args:
        arch: compute capability, such as 90; one that is not in `TILES` takes those of the next below.
    """
    table = TILES[max((known for known in TILES if known <= arch), default=min(TILES))]
    tiles = next(tiles for width, tiles in table[dtype.itemsize].items() if width >= D)
    block = next((m for m in tiles if m >= rows), max(tiles))
    block_n, warps, stages = tiles[block]
    return {
        "MODE": mode,
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "BLOCK_M": block,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


def merge_configuration(D: int, leaves: int) -> dict[str, object]:
    """Block shapes of the merge: one program per query row.

    Args:
        D: numbers of a head. leaves: 1 where a partial sum is over a leaf, 0 where it is over a span.
    """
    return {
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "LEAVES": leaves,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }


# Query rows from which their blocks alone fill the device, and partial sums would be the larger part of the memory.
MANY_ROWS = 1024


def cut(programs: int, rows: int, T: int, least: int, multiprocessors: int) -> tuple[int, int]:
    """Slots that one program walks over, 0 for a leaf of its row, and the number of programs side by side.

    A program takes a span where those keep the device busy, a leaf where not, and all slots for many query rows.

    Args:
        programs: programs per split: B · G · blocks of query rows.
        rows: query rows: new tokens times heads of the group.
        T: slots of the cache.
        least: slots of the smallest leaf.
        multiprocessors: of the device.
    """
    if rows >= MANY_ROWS:
        return SPAN * max(1, -(-T // SPAN)), 1
    spans = max(1, -(-T // SPAN))
    if 4 * programs * spans >= 3 * multiprocessors:
        return SPAN, spans
    # As many as any row of up to T slots has.
    return 0, max(min(TOGETHER, -(-T // least)), -(-T // LEAF), 1)


STRIDED = ("q", "k", "v", "k_cache", "v_cache", "out")


def _attention(
    dtype: torch.dtype, D: int, rows: int, mode: int, leaves: int = 1, arch: int = 90
) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {f"p_{name}": pointer for name in STRIDED}
    arguments |= {"p_acc": "*fp32:16", "p_m": "*fp32:16", "p_l": "*fp32:16"}
    arguments |= {"p_tickets": "*i32:16", "p_lengths": "*i64:16"}
    arguments["p_ancestors"] = "*i64:16" if mode == MASKED else "None"
    arguments |= {"scale": "fp32", "G": "i32", "S": "i32", "T": "i32", "R": "i32", "span": "i32"}
    arguments["least"] = "i32"
    for name in STRIDED:
        arguments |= {f"{name}_{letter}": "i64:16" for letter in ("b", "h", "s")}
    return signature(arguments, {**configuration(D, rows, mode, dtype, arch), "LEAVES": leaves})


def _merge(dtype: torch.dtype, D: int, leaves: int = 1) -> dict[str, str]:
    arguments = {"p_acc": "*fp32:16", "p_m": "*fp32:16", "p_l": "*fp32:16", "p_lengths": "*i64:16"}
    arguments |= {"p_out": f"*{TYPES[dtype]}:16", "G": "i32", "S": "i32", "T": "i32", "R": "i32"}
    arguments |= {"span": "i32", "least": "i32", "splits": "i32"}
    arguments |= {f"out_{letter}": "i64:16" for letter in ("b", "h", "s")}
    return signature(arguments, merge_configuration(D, leaves))


def _signatures(arch: int) -> tuple[dict[str, str], ...]:
    """What is launched on an architecture: every block of query rows, walking over a leaf (1) and over a span (0)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    half = [(D, rows) for D, tiles in TILES[arch][2].items() for rows in tiles if D != 127]
    return (
        *(_attention(bf16, D, rows, ALONE, leaves, arch) for D, rows in half for leaves in (1, 0)),
        *(_attention(bf16, D, rows, mode, 0, arch) for D, rows in half for mode in (MASKED, CAUSAL)),
        *(_attention(bf16, D, 64, ALONE, 0, arch) for D in (80, 96)),
        *(_attention(fp16, 128, rows, ALONE, 0, arch) for rows in (16, 64)),
        *(_attention(fp32, 64, rows, ALONE, 0, arch) for rows in (16, 32)),
        *(_attention(fp32, 128, 16, mode, 0, arch) for mode in (ALONE, CAUSAL)),
        _attention(fp32, 256, 16, ALONE, 0, arch),
    )


KERNELS = (
    *(KernelSpec("tree_attention_kernel", _signatures(arch), archs=(arch,)) for arch in TILES),
    KernelSpec(
        "tree_attention_merge_kernel",
        (*(_merge(torch.bfloat16, D) for D in (64, 80, 128, 256)), _merge(torch.bfloat16, 128, 0)),
    ),
)
