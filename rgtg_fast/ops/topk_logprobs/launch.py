"""How the kernels of topk_logprobs are launched; plain Python, so that specs need no Triton."""

from __future__ import annotations

import torch

from .._registry import KernelSpec
from .._triton import TYPES, signature

MAX_K = 256
# Logits of one program: the shortest that leave few enough candidates.
SEGMENTS = (2048, 4096, 8192)
MAX_SEGMENTS = 256
# Candidates that one program merges in registers: 32 a thread.
MAX_CANDIDATES = 8192
MAX_V = SEGMENTS[-1] * MAX_SEGMENTS


def most(V: int) -> int:
    """The largest k for a vocabulary: 256 up to V = 262144."""
    return min(MAX_K, MAX_CANDIDATES // -(-V // SEGMENTS[-1]))


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


def segment_configuration(V: int, k: int) -> dict[str, object]:
    """The shortest segment that can be merged; it depends on nothing but V and k."""
    for segment in SEGMENTS:
        segments = -(-V // segment)
        if segments <= MAX_SEGMENTS and segments * k <= MAX_CANDIDATES:
            break
    # 16 logits a thread: 32 bytes of bfloat16, two wide loads.
    return {"SEGMENT": segment, "num_warps": segment // 512, "enable_fp_fusion": False}


# Candidates of the merge, with its warps.
MERGES = {1024: 4, 4096: 8, MAX_CANDIDATES: 8}
CHOSEN = (16, 64, MAX_K)


def merge_configuration(candidates: int, k: int) -> dict[str, object]:
    """Block shapes for merging so many candidates of a row."""
    block = next(n for n in MERGES if candidates <= n)
    return {
        "BLOCK_C": block,
        "BLOCK_K": next(n for n in CHOSEN if k <= n),
        "BLOCK_S": MAX_SEGMENTS,
        "num_warps": MERGES[block],
        "enable_fp_fusion": False,
    }


def _segment(dtype: torch.dtype, V: int, k: int, guided: bool) -> dict[str, str]:
    arguments = {"p_logits": f"*{TYPES[dtype]}:16"}
    arguments |= dict.fromkeys(("p_guidance", "p_beta"), "*fp32:16" if guided else "None")
    arguments |= {"p_keys": "*i32:16", "p_tokens": "*i32:16", "p_statistics": "*fp32:16"}
    arguments |= {"V": "i32:16", "k": "i32", "bits": "i32", "stride_logits": "i64:16"}
    arguments |= {"stride_guidance": "i64:16" if guided else "i32:16"}
    return signature(arguments, segment_configuration(V, k))


def _merge(dtype: torch.dtype, candidates: int, k: int) -> dict[str, str]:
    arguments = {"p_logits": f"*{TYPES[dtype]}:16", "p_keys": "*i32:16", "p_tokens": "*i32:16"}
    arguments |= {
        "p_statistics": "*fp32:16",
        "p_best_key": "*i32:16",
        "p_best_place": "*i32:16",
        "p_logprobs": "*fp32:16",
    }
    arguments |= {"p_chosen": "*i64:16", "p_entropy": "*fp32:16"}
    arguments |= {"segments": "i32", "k": "i32", "bits": "i32", "stride_logits": "i64:16"}
    return signature(arguments, merge_configuration(candidates, k))


KERNELS = (
    KernelSpec(
        "segment_kernel",
        (
            _segment(torch.bfloat16, 128256, 10, False),
            _segment(torch.float16, 128256, 10, True),
            _segment(torch.float32, 128256, 10, False),
            _segment(torch.bfloat16, 262144, 128, False),
            _segment(torch.float32, 262144, 128, True),
            _segment(torch.bfloat16, 262144, 256, False),
            _segment(torch.float32, 262144, 256, True),
        ),
    ),
    KernelSpec(
        "merge_kernel",
        (
            _merge(torch.float16, 1024, 16),
            _merge(torch.float32, 4096, 64),
            *(_merge(torch.bfloat16, C, k) for C in MERGES for k in CHOSEN),
        ),
    ),
)
