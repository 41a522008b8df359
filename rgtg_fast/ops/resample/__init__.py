"""Room of resample: one candidate per row, drawn from the reward-tilted distribution by counted noise."""

from __future__ import annotations

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from .cpp import cpp
from .reference import reference
from .spec import SPEC

__all__ = ["SPEC", "reference", "resample"]


def _fake(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    B = logprobs.shape[0]
    return logprobs.new_empty((B,), dtype=torch.int64), logprobs.new_empty((B,), dtype=dtype)


def _check_values(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> None:
    for row, tau in enumerate(temperature.tolist()):
        if not 0 <= tau < float("inf"):
            raise RGTGError(
                f"resample: temperature[{row}]={tau} is not a finite number >= 0: use 0 for greedy"
            )


register(
    SPEC,
    "(Tensor logprobs, Tensor rewards, Tensor beta, Tensor temperature, Tensor seed, Tensor position) "
    "-> (Tensor, Tensor)",
    _fake,
    _check_values,
    cpp,
    frozenset(DTYPE_CODES),
    frozenset(DTYPE_CODES),
)


def resample(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one candidate of every row from the reward-guided distribution.

        choice ~ softmax( (logprobs + β · rewards) / τ ),      at τ = 0 the argmax, ties by lowest index

    The draw is the Gumbel trick, argmax_j score_j/τ + noise_j, over noise from Philox4x32-10: the key is the
    seed, the counter is (j // 4, position, 0), candidate j takes word j mod 4. A row's draw depends on its
    own seed and position alone, so the same row gives the same choice in any batch and on any backend.

    Args:
        logprobs: `[B, K]`, log-probabilities of the candidates, any floating dtype; −inf is never chosen.
        rewards: `[B, K]`, their rewards, same dtype.
        beta: `[B]` float32, weight of the rewards. A row with 0 ignores its rewards, even where they are inf
            or NaN.
        temperature: `[B]` float32, τ ≥ 0.
        seed: `[B]` int64, the row's seed.
        position: `[B]` int64, index of the token that is drawn.

    Returns:
        `choice [B]` int64, index of the candidate, and `logprob [B]`, log-softmax of score/τ there (0 at τ =
        0), float32 (float64 for float64 inputs). A row whose best score is not finite (a NaN, an infinite
        reward, every candidate excluded) has no distribution: choice −1 and logprob NaN.

    Raises:
        RGTGError: shapes or dtypes do not fit, or, on the CPU, a temperature is negative, infinite or NaN
            (elsewhere such a row gets −1 and NaN).

    Source:
        The decoding rule of PARGS (arXiv 2406.07780); Philox: Salmon et al., "Parallel random numbers: as
        easy as 1, 2, 3" (SC 2011).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import resample
        >>> logprobs, rewards = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.0, 2.0, 0.0]])
        >>> one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        >>> resample(logprobs, rewards, one, 0 * one, seed=zero, position=zero)
        (tensor([1]), tensor([0.]))
    """
    op = "resample"
    if logprobs.ndim != 2 or logprobs.shape[1] < 1:
        raise RGTGError(f"{op}: logprobs have shape {list(logprobs.shape)}: use [B, K] with K >= 1")
    _checks.floating(op, "logprobs", logprobs)
    B, K = logprobs.shape
    _checks.shaped(op, "rewards", rewards, "[B, K]", (B, K))
    _checks.of_dtype(op, "rewards", rewards, logprobs.dtype)
    for name, x in (("beta", beta), ("temperature", temperature)):
        _checks.shaped(op, name, x, "[B]", (B,))
        _checks.of_dtype(op, name, x, torch.float32)
    for name, x in (("seed", seed), ("position", position)):
        _checks.shaped(op, name, x, "[B]", (B,))
        _checks.of_dtype(op, name, x, torch.int64)
    _checks.together(
        op, logprobs, rewards=rewards, beta=beta, temperature=temperature, seed=seed, position=position
    )
    return torch.ops.rgtg_fast.resample(logprobs, rewards, beta, temperature, seed, position)
