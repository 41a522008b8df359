"""The specification of resample in plain PyTorch."""

from __future__ import annotations

import torch

# Multipliers and Weyl increments of Philox4x32 (Salmon et al. 2011, table 2).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four 32-bit words out of a counter of four and a key of two, all held in int64."""
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
    # An excluded candidate stays excluded whatever its reward; only NaN is never hidden.
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
    chosen = scaled.log_softmax(-1).gather(-1, choice[:, None])[:, 0]
    chosen = torch.where(greedy[:, 0], 0, chosen)
    return torch.where(defined, choice, -1), torch.where(defined, chosen, float("nan"))
