"""How the kernels of topk_logprobs are launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, power_of_two, signature

MAX_K = 256
# Logits of a segment, which a program reads, with those of a group within it.
SEGMENTS = {1024: 32, 2048: 64, 4096: 64}
MAX_SEGMENTS = 512
# Groups of the best segments, or tokens of the best groups, that a program chooses from in registers.
MAX_ENTRIES = 8192
MAX_V = max(SEGMENTS) * MAX_SEGMENTS


def segment_of(V: int) -> int:
    """Logits of a segment: the fewest of which not too many make up a row. They follow from V alone."""
    return next(n for n in SEGMENTS if -(-V // n) <= MAX_SEGMENTS)


def most(V: int) -> int:
    """The largest k for a vocabulary: 256 up to V = 524288, then 128."""
    segment = segment_of(V)
    return min(MAX_K, MAX_ENTRIES // max(SEGMENTS[segment], segment // SEGMENTS[segment]))


def reason_against(k: int = 1, V: int = 1) -> str:
    """Why the kernels cannot serve these sizes; empty where they can."""
    if V > MAX_V:
        return f"its Triton kernel takes V <= {MAX_V}, not {V}"
    if k > most(V):
        place = f" for V={V}" if most(V) < MAX_K else ""
        return f"its Triton kernel takes k <= {most(V)}{place}, not {k}"
    return ""


# Leading bits of a float32 that differ between scores: numbers of 16 bits need no more steps than they have.
KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}


def key_bits(dtype: torch.dtype, guided: bool) -> int:
    """Bits that order the scores of logits of this dtype."""
    return 32 if guided else KEY_BITS[dtype]


def segment_configuration(V: int) -> dict[str, object]:
    """A warp for 1024 logits, 32 a thread: one warp alone never waits for another."""
    segment = segment_of(V)
    return {
        "SEGMENT": segment,
        "GROUP": SEGMENTS[segment],
        "num_warps": segment // 1024,
        "enable_fp_fusion": False,
    }


# Best segments, groups and tokens that a row may keep: a little room above k ends the search for them early.
CHOSEN = (16, 64, 128, MAX_K)


def merge_configuration(V: int, k: int) -> dict[str, object]:
    """Block shapes for finding the k best of a row."""
    segment = segment_of(V)
    group = SEGMENTS[segment]
    block = next(n for n in CHOSEN if k <= n)
    # 16 entries a thread: few registers, and one warp, which waits for nobody, for small k.
    warps = block * max(group, segment // group) // 512
    return {
        "SEGMENT": segment,
        "GROUP": group,
        "BLOCK_S": power_of_two(-(-V // segment), 128),
        "BLOCK_K": block,
        "THREADS": 32 * warps,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }


def _arguments(dtype: torch.dtype, guided: bool, **others: str) -> dict[str, str]:
    arguments = {"p_logits": f"*{TYPES[dtype]}:16"}
    arguments |= dict.fromkeys(("p_guidance", "p_beta"), "*fp32:16" if guided else "None")
    arguments |= {"p_segment_keys": "*i32:16", "p_group_keys": "*i32:16", "p_statistics": "*fp32:16"}
    arguments |= {**others, "bits": "i32", "stride_logits": "i64:16"}
    return {**arguments, "stride_guidance": "i64:16" if guided else "i32:16"}


def _segment(dtype: torch.dtype, V: int, guided: bool = False) -> dict[str, str]:
    return signature(_arguments(dtype, guided, V="i32:16"), segment_configuration(V))


def _merge(dtype: torch.dtype, V: int, k: int, guided: bool = False) -> dict[str, str]:
    pointers = {
        "p_picks": "*i32:16",
        "p_logprobs": "*fp32:16",
        "p_chosen": "*i64:16",
        "p_entropy": "*fp32:16",
    }
    sizes = {"V": "i32:16", "segments": "i32", "k": "i32"}
    return signature(_arguments(dtype, guided, **pointers, **sizes), merge_configuration(V, k))


# Sizes at which a merge configuration begins: every length and number of segments, with every block of k.
_SIZES = sorted({(V, min(k, most(V))) for V in (1, 131073, 262145, 524289, 1048577) for k in CHOSEN})

KERNELS = (
    KernelSpec(
        "topk_segment_kernel",
        (
            _segment(torch.float16, 1024),
            _segment(torch.float32, 1024),
            *(_segment(torch.bfloat16, n * MAX_SEGMENTS) for n in SEGMENTS),
            *(_segment(torch.float32, n * MAX_SEGMENTS, guided=True) for n in SEGMENTS),
        ),
    ),
    KernelSpec(
        "topk_merge_kernel",
        (
            _merge(torch.float16, 1, 16, guided=True),
            _merge(torch.float32, 262145, MAX_K, guided=True),
            *(_merge(torch.bfloat16, V, k) for V, k in _SIZES),
        ),
    ),
)
