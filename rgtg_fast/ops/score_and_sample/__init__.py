"""Op score_and_sample: final norm, score head and the draw of a candidate: all that follows a reward model's blocks."""

from __future__ import annotations

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from ..resample import _check_values as _check_draw
from .reference import reference
from .spec import SPEC

__all__ = ["SPEC", "reference", "score_and_sample"]


def _fake(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    B, K = hidden.shape[:2]
    return (
        hidden.new_empty((B, K), dtype=dtype),
        hidden.new_empty((B,), dtype=torch.int64),
        hidden.new_empty((B,), dtype=dtype),
    )


def _check_values(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> None:
    _check_draw(logprobs, logprobs, beta, temperature, seed, position)


register(
    SPEC,
    "(Tensor hidden, Tensor norm, Tensor head, Tensor? bias, Tensor logprobs, Tensor beta, Tensor temperature, "
    "Tensor seed, Tensor position, float eps, float offset=0.0) -> (Tensor, Tensor, Tensor)",
    _fake,
    _check_values,
    cpp=None,
    cpp_dtypes=frozenset(),
    triton_dtypes=frozenset(DTYPE_CODES),
)


def score_and_sample(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final norm, score head and reward-guided draw of every row's candidates, in one launch.

        reward_j = Σ_e x_je (norm_e + offset) head_e / √(mean_e x_je² + eps) + bias
        choice   ~ softmax( (logprobs + β · reward) / τ ),      as in `resample`

    Args:
        hidden: `[B, K, E]`, the candidates' states after a reward model's last block, before its final norm, any
            floating dtype.
        norm: `[E]`, weight of the RMS norm, same dtype. head: `[E]`, weight of the score head, any floating dtype.
        bias: `[1]`, of the score head, or None.
        logprobs: `[B, K]` float32 (float64 where hidden is), log-probabilities of the candidates.
        beta, temperature, seed, position: `[B]`, as in `resample`.
        eps: the norm's. offset: added to its weight (Gemma: 1).

    Returns:
        `rewards [B, K]`, and `choice [B]` and `logprob [B]` as in `resample`; float32, float64 for float64 states.

    Raises:
        RGTGError: shapes or dtypes do not fit, or, on the CPU, a temperature is negative, infinite or NaN.

    Source:
        RMS norm: Zhang and Sennrich (arXiv 1910.07467), eq. 4; the decoding rule of PARGS (arXiv 2406.07780).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import score_and_sample
        >>> states, weights = torch.tensor([[[3.0, 4.0], [4.0, 3.0]]]), torch.tensor([1.0, 0.0])
        >>> logprobs, one, zero = torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.int64)
        >>> rewards, choice, _ = score_and_sample(
        ...     states, torch.ones(2), weights, None, logprobs, one, 0 * one, zero, zero, eps=0.0
        ... )
        >>> rewards, choice
        (tensor([[0.8485, 1.1314]]), tensor([1]))
    """
    op = "score_and_sample"
    if hidden.ndim != 3 or 0 in hidden.shape[1:]:
        raise RGTGError(f"{op}: hidden has shape {list(hidden.shape)}: use [B, K, E] with K, E >= 1")
    for name, x in (("hidden", hidden), ("head", head)):
        _checks.floating(op, name, x)
    B, K, E = hidden.shape
    for name, x in (("norm", norm), ("head", head)):
        _checks.shaped(op, name, x, "[E]", (E,))
    _checks.of_dtype(op, "norm", norm, hidden.dtype)
    if bias is not None:
        _checks.shaped(op, "bias", bias, "[1]", (1,))
    _checks.shaped(op, "logprobs", logprobs, "[B, K]", (B, K))
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    _checks.of_dtype(op, "logprobs", logprobs, wide)
    for name, x in (("beta", beta), ("temperature", temperature)):
        _checks.shaped(op, name, x, "[B]", (B,))
        _checks.of_dtype(op, name, x, torch.float32)
    for name, x in (("seed", seed), ("position", position)):
        _checks.shaped(op, name, x, "[B]", (B,))
        _checks.of_dtype(op, name, x, torch.int64)
    others = {"norm": norm, "head": head, "bias": bias, "logprobs": logprobs, "beta": beta}
    _checks.together(op, hidden, **others, temperature=temperature, seed=seed, position=position)
    return torch.ops.rgtg_fast.score_and_sample(
        hidden, norm, head, bias, logprobs, beta, temperature, seed, position, eps, offset
    )
