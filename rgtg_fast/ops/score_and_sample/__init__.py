"""Op score_and_sample: final norm, score head and resampling: everything after a reward model's last block."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from ..resample import check as check_temperature
from ..resample import reference as resample_reference

__all__ = ["reference", "score_and_sample"]


def reference(
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
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = hidden.to(dtype)  # [B, K, E]
    scale = torch.rsqrt(x.square().mean(-1) + eps)  # [B, K]
    weight = (norm.to(dtype) + offset) * head.to(dtype)
    rewards = scale * (x * weight).sum(-1)
    if bias is not None:
        rewards = rewards + bias.to(dtype)
    choice, logprob = resample_reference(logprobs.to(dtype), rewards, beta, temperature, seed, position)
    return rewards, choice, logprob


def outputs(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, choice and log-probability, not yet filled."""
    (B, K), device = hidden.shape[:2], hidden.device
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        torch.empty((B, K), dtype=dtype, device=device),
        torch.empty((B,), dtype=torch.int64, device=device),
        torch.empty((B,), dtype=dtype, device=device),
    )


register(
    reference,
    outputs,
    name="score_and_sample",
    check=check_temperature,
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
        norm: `[E]`, weight of the RMS norm, same dtype.
        head: `[E]`, weight of the score head, any floating dtype.
        bias: `[1]`, bias of the score head, or None.
        logprobs: `[B, K]` float32 (float64 where hidden is), log-probabilities of the candidates.
        beta: `[B]` float32, weight of the rewards, as in `resample`.
        temperature: `[B]` float32, τ ≥ 0.
        seed: `[B]` int64, the row's seed.
        position: `[B]` int64, index of the token to draw.
        eps: added to the norm's mean square.
        offset: added to the norm's weight (Gemma: 1).

    Returns:
        rewards: `[B, K]`, float32 (float64 for float64 states).
        choice: `[B]` int64, as in `resample`.
        logprob: `[B]`, as in `resample`, dtype of the rewards.

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
