"""How the Triton kernels of tree_attention cut their work: blocks of rows and keys, leaves and spans of the prefix."""

from __future__ import annotations

import torch

from .._triton import power_of_two

# A row's prefix is summed leaf by leaf. Leaves are folded within a span of positions, then span by span, whichever
# programs do it, so the split never changes a bit. A leaf of a short row is a half or a quarter of `LEAF` where at most
# `MAX_PARTS` leaves cover the row, and at least twice a block's query rows: partial sums would have more bytes than the
# prefix.
LEAF = 256
MAX_PARTS = 8
SPAN = LEAF * MAX_PARTS


def leaf_of(length: int, least: int) -> int:
    """Positions of a leaf in a row of `length`; the kernels compute the same."""
    return max(least, next((n for n in (LEAF // 4, LEAF // 2) if length <= n * MAX_PARTS), LEAF))


def least_leaf(block_m: int) -> int:
    """Positions of the smallest leaf for a block of query rows."""
    return min(max(2 * block_m, LEAF // 4), LEAF)


# New tokens that are visible to a new token: itself, those of its mask, or itself and those before it.
MODES = ALONE, MASKED, CAUSAL = 0, 1, 2


# By architecture, bytes of a number and largest D: BLOCK_M with its BLOCK_N, warps and stages. Chosen so that the
# accumulators and a block of scores stay in registers (docs/kernels.md) while the next blocks of keys and values load.
# 4-byte numbers are split in two for the tensor cores and need twice the registers.
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
    # With four warps, two programs share a multiprocessor, and no two warps compute the same scores.
    90: {
        2: {
            64: _BY_D_64,
            # Masks of a padded head need registers.
            127: {16: (64, 4, 3), 64: (64, 8, 3)},
            128: {16: (64, 4, 3), 64: (32, 4, 3), 128: (64, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
    # Here the accumulators are in tensor memory and pass through registers to be scaled: four warps would spill them.
    100: {
        2: {
            64: {16: (64, 4, 3), 64: (64, 8, 3), 128: (32, 8, 4)},
            127: {16: (64, 4, 3), 64: (32, 8, 3)},
            128: {16: (64, 4, 3), 64: (64, 8, 3)},
            256: _BY_D_256,
        },
        4: _FLOAT32,
    },
}


def configuration(D: int, rows: int, mode: int, dtype: torch.dtype, arch: int = 90) -> dict[str, object]:
    """Block shapes for a head of `D` numbers.

    Args:
        D: numbers of a head.
        rows: query rows: new tokens times heads of the group.
        mode: which new tokens are visible, of `MODES`.
        dtype: dtype of queries, keys and values.
        arch: compute capability, such as 90; one that is not in `TILES` takes the blocks of the next lower.
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
        D: numbers of a head.
        leaves: 1 where a partial sum is over a leaf, 0 where it is over a span.
    """
    return {
        "D": D,
        "BLOCK_D": power_of_two(D, 16),
        "LEAVES": leaves,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }


# From this many query rows on, their blocks alone fill the device, and partial sums would take most of the memory.
MANY_ROWS = 1024


def split_prefix(programs: int, rows: int, T: int, least: int, multiprocessors: int) -> tuple[int, int]:
    """Positions of the prefix that one program reads (0: a leaf of its row), and the number of such splits.

    A program reads a span where spans fill the device, else a leaf, and all positions for many query rows.

    Args:
        programs: programs per split: B · G · blocks of query rows.
        rows: query rows: new tokens times heads of the group.
        T: the largest number of positions that a row reads.
        least: positions of the smallest leaf.
        multiprocessors: multiprocessors of the device.
    """
    if rows >= MANY_ROWS:
        return SPAN * max(1, -(-T // SPAN)), 1
    spans = max(1, -(-T // SPAN))
    if 4 * programs * spans >= 3 * multiprocessors:
        return SPAN, spans
    # The largest number of leaves that a row of up to T positions can have.
    return 0, max(min(MAX_PARTS, -(-T // least)), -(-T // LEAF), 1)
