"""Op topk_logprobs: the k most probable next tokens and the entropy, from one read of the logits."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["reference", "topk_logprobs"]

# Logits of a segment, which one Triton program reads, and of a group within it.
SEGMENTS = {1024: 32, 2048: 64, 4096: 64}
MAX_SEGMENTS = 512
MAX_V = max(SEGMENTS) * MAX_SEGMENTS
MAX_K = 256
# Groups of the best segments, or tokens of the best groups, that a Triton program selects from in registers.
MAX_ENTRIES = 8192


def reference(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None,
    beta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = logits if logits.dtype == torch.float64 else logits.float()  # [B, V]
    logprobs = x.log_softmax(-1)
    # Ordering by logit is ordering by log-probability without the rounding of the subtraction: candidates
    # that differ never tie, on any backend.
    score = x
    if guidance is not None and beta is not None:
        weight = beta.to(x.dtype)[:, None]
        score = torch.where(weight == 0, x, x + weight * guidance.to(x.dtype))
    # Stable: ties go to the lowest token id. NaN counts as the largest, so it is seen and not lost.
    tokens = score.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    p = logprobs.exp()
    entropy = -torch.where(p == 0, 0, p * logprobs).sum(-1)
    return logprobs.gather(-1, tokens), tokens, entropy


def outputs(logits: torch.Tensor, k: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, tokens and entropy, not yet filled."""
    B, device = logits.shape[0], logits.device
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        torch.empty((B, k), dtype=dtype, device=device),
        torch.empty((B, k), dtype=torch.int64, device=device),
        torch.empty((B,), dtype=dtype, device=device),
    )


def segment_of(V: int) -> int:
    """Logits of a segment: the fewest that cut a row into at most `MAX_SEGMENTS`. They follow from V alone."""
    return next(n for n in SEGMENTS if -(-V // n) <= MAX_SEGMENTS)


def largest_k(V: int) -> int:
    """The largest k that the Triton kernels take for a vocabulary: 256 up to V = 524288, then 128."""
    segment = segment_of(V)
    return min(MAX_K, MAX_ENTRIES // max(SEGMENTS[segment], segment // SEGMENTS[segment]))


def triton_limit(k: int = 1, V: int = 1) -> str:
    """Why the Triton kernels cannot serve these sizes; empty where they can."""
    if V > MAX_V:
        return f"its Triton kernel takes V <= {MAX_V}, not {V}"
    if k > largest_k(V):
        place = f" for V={V}" if largest_k(V) < MAX_K else ""
        return f"its Triton kernel takes k <= {largest_k(V)}{place}, not {k}"
    return ""


register(
    reference,
    outputs,
    name="topk_logprobs",
    cpp_dtypes=frozenset(DTYPE_CODES),
    triton_dtypes=frozenset(DTYPE_CODES),
    triton_limit=triton_limit,
    sizes=lambda logits, k, *_: {"k": k, "V": logits.shape[1]},
)


def topk_logprobs(
    logits: torch.Tensor, k: int, guidance: torch.Tensor | None = None, beta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects the k best next tokens of every row, with their log-probabilities and the row's entropy.

    With log π = log_softmax(logits) over the whole vocabulary:

        tokens   = the k tokens v of the largest log π(v) + β · guidance(v), best first, ties by lowest id
        logprobs = log π(tokens), without the guidance
        entropy  = − Σ_v π(v) log π(v)

    The logits are read from memory once.

    Args:
        logits: `[B, V]`, any floating dtype; rows may be strided. −inf excludes a token.
        k: number of candidates, 1 ≤ k ≤ V.
        guidance: `[B, V]` float32, a reward for every token (the "combined" support), or None.
        beta: `[B]` float32, weight of the guidance; required with guidance. A row with 0 ignores its guidance, even
            where that is inf or NaN.

    Returns:
        logprobs: `[B, k]` in nats, float32 (float64 for float64 logits).
        tokens: `[B, k]` int64. A NaN score counts as the largest, so that it is selected and not lost.
        entropy: `[B]` in nats, same dtype as logprobs.

    Raises:
        RGTGError: k is below 1 or above V, or shapes or dtypes do not fit.

    Source:
        Top-k support: ARGS (arXiv 2402.01694), §2.2; combined support: FaRMA (arXiv 2502.04517).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import topk_logprobs
        >>> logprobs, tokens, entropy = topk_logprobs(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), k=2)
        >>> tokens
        tensor([[1, 3]])
        >>> logprobs
        tensor([[-0.9176, -0.9176]])
        >>> entropy
        tensor([1.1727])
    """
    if logits.ndim != 2:
        raise RGTGError(f"topk_logprobs: logits have shape {list(logits.shape)}: use [B, V]")
    _checks.floating("topk_logprobs", "logits", logits)
    B, V = logits.shape
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise RGTGError(f"k={k!r} is not a whole number: use 1 to V")
    if k < 1:
        raise RGTGError(f"k={k} is not positive: use k >= 1")
    if k > V:
        raise RGTGError(f"k={k} exceeds the vocabulary (V={V}): use k <= {V}")
    if (guidance is None) != (beta is None):
        raise RGTGError("topk_logprobs: guidance and beta come together: give both or neither")
    if guidance is not None and beta is not None:
        _checks.shaped("topk_logprobs", "guidance", guidance, "[B, V]", (B, V))
        _checks.shaped("topk_logprobs", "beta", beta, "[B]", (B,))
        _checks.of_dtype("topk_logprobs", "guidance", guidance, torch.float32)
        _checks.of_dtype("topk_logprobs", "beta", beta, torch.float32)
        _checks.together("topk_logprobs", logits, guidance=guidance, beta=beta)
    return torch.ops.rgtg_fast.topk_logprobs(logits, k, guidance, beta)
