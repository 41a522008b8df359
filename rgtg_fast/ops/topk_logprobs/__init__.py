"""Room of topk_logprobs: the k best next tokens and the entropy, from one read of the logits."""

from __future__ import annotations

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from .cpp import cpp
from .launch import reason_against
from .reference import reference
from .spec import SPEC

__all__ = ["SPEC", "reference", "topk_logprobs"]


def _fake(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    B = logits.shape[0]
    return (
        logits.new_empty((B, k), dtype=dtype),
        logits.new_empty((B, k), dtype=torch.int64),
        logits.new_empty((B,), dtype=dtype),
    )


def _check_values(
    logits: torch.Tensor,
    k: int,
    guidance: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> None:
    """Every value of the arguments is legal."""


register(
    SPEC,
    "(Tensor logits, SymInt k, Tensor? guidance=None, Tensor? beta=None) -> (Tensor, Tensor, Tensor)",
    _fake,
    _check_values,
    cpp,
    frozenset(DTYPE_CODES),
    frozenset(DTYPE_CODES),
    triton_against=reason_against,
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
        beta: `[B]` float32, weight of the guidance; needed with guidance. A row with 0 ignores its guidance,
            even where that is inf or NaN.

    Returns:
        `logprobs [B, k]` and `entropy [B]` in nats, float32 (float64 for float64 logits), and `tokens [B,
        k]` int64. A NaN score counts as the largest, so that it is selected and seen.

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
        raise RGTGError(f"k={k!r} is no whole number: use 1 to V")
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
