"""Op resample: draws one candidate per row from the reward-guided distribution, with counter-based noise."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register

__all__ = ["reference", "resample"]

# Multipliers and Weyl increments of Philox4x32 (Salmon et al. 2011, table 2).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two, all stored in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps around in int64, which keeps all of its 64 bits.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & MASK, (p1 >> 32) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & MASK, high0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + INCREMENTS[0]) & MASK, (k1 + INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def gumbel(seed: torch.Tensor, position: torch.Tensor, K: int) -> torch.Tensor:
    """Standard Gumbel noise, `[B, K]` float32, for `[B]` seeds and positions."""
    blocks = torch.arange((K + 3) // 4, device=seed.device).expand(len(seed), -1)
    zero = torch.zeros_like(blocks)
    low, high = (position & MASK)[:, None] + zero, ((position >> 32) & MASK)[:, None] + zero
    key = (seed & MASK)[:, None] + zero, ((seed >> 32) & MASK)[:, None] + zero
    bits = torch.stack(philox((blocks, low, high, zero), key), -1).flatten(1)[:, :K]
    # v is uniform in (0, 1); e = −log(1 − v) is exponential, by way of w because 1 − v rounds for small v.
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    w = 1 - v
    e = torch.where(w == 1, v, -w.log() * v / (1 - w))
    return -e.log()


def reference(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    logprobs, rewards = logprobs.to(dtype), rewards.to(dtype)  # [B, K]
    weight, tau = beta.to(dtype)[:, None], temperature.to(dtype)[:, None]
    score = torch.where(weight == 0, logprobs, logprobs + weight * rewards)
    # An excluded candidate stays excluded whatever its reward, except that NaN propagates.
    hidden = torch.where((weight != 0) & rewards.isnan(), float("nan"), float("-inf")).to(dtype)
    score = torch.where(logprobs == float("-inf"), hidden, score)
    # amax is NaN where any score is; a row without a finite best score has no distribution.
    best = score.amax(-1, keepdim=True)
    defined = (best.isfinite() & (tau >= 0) & tau.isfinite())[:, 0]

    greedy = tau == 0
    # Differences first: the best candidate is at 0 for every temperature, however small.
    scaled = (score - best) / torch.where(greedy, 1, tau)
    noisy = torch.where(greedy, scaled, scaled + gumbel(seed, position, logprobs.shape[1]).to(dtype))
    # argmax of the comparison, because argmax itself promises no order among ties.
    choice = (noisy == noisy.amax(-1, keepdim=True)).int().argmax(-1)
    chosen_logprob = scaled.log_softmax(-1).gather(-1, choice[:, None])[:, 0]
    chosen_logprob = torch.where(greedy[:, 0], 0, chosen_logprob)
    return torch.where(defined, choice, -1), torch.where(defined, chosen_logprob, float("nan"))


def outputs(logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Choice and log-probability, not yet filled."""
    B, device = logprobs.shape[0], logprobs.device
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    choice = torch.empty((B,), dtype=torch.int64, device=device)
    return choice, torch.empty((B,), dtype=dtype, device=device)


def check(temperature: torch.Tensor) -> None:
    """Refuses temperatures that define no distribution."""
    for row, tau in enumerate(temperature.tolist()):
        if not 0 <= tau < float("inf"):
            raise RGTGError(
                f"resample: temperature[{row}]={tau} is not a finite number >= 0: use 0 for greedy"
            )


register(
    reference,
    outputs,
    name="resample",
    check=check,
    cpp_dtypes=frozenset(DTYPE_CODES),
    triton_dtypes=frozenset(DTYPE_CODES),
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
        position: `[B]` int64, index of the token to draw.

    Returns:
        choice: `[B]` int64, index of the candidate.
        logprob: `[B]`, log-softmax of score/τ at the choice (0 at τ = 0), float32 (float64 for float64 inputs).

        A row whose best score is not finite (a NaN, an infinite reward, every candidate excluded) has no distribution:
        choice −1 and logprob NaN.

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
