"""Settings of a run: frozen dataclasses that validate themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rgtg_fast.errors import RGTGError

SUPPORTS = ("lm", "combined", "all")


@dataclass(frozen=True)
class Guidance:
    """How a reward steers the choice of the next token.

    With C the support, the next token is drawn from softmax over v in C of
    `(log π(v | x, y_<i) + beta * r(v)) / temperature` (PARGS, arXiv 2406.07780, equation 5; ARGS, arXiv 2402.01694).

    Args:
        k: number of candidates, 1 <= k <= vocabulary. Ignored by `support="all"`.
        beta: weight of the reward, any finite number; 0 is the base model.
        temperature: τ >= 0; 0 takes the candidate with the highest score (greedy: ARGS, PARGS-G).
        support: `"lm"`: the k tokens most probable under the base model; `"combined"`: the k with the highest
            combined score (FaRMA); `"all"`: the whole vocabulary (GenARM). The last two need a reward that scores
            the whole vocabulary at once.
        weights: of the guides of a `MixtureReward`, for this request alone; None for the mixture's own.

    Raises:
        RGTGError: a value out of its range.

    Example:
        >>> Guidance(k=10, beta=2.0, temperature=0)
        Guidance(k=10, beta=2.0, temperature=0.0, support='lm', weights=None)
    """

    k: int = 10
    beta: float = 1.0
    temperature: float = 1.0
    support: str = "lm"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise RGTGError(f"k={self.k!r} is not a whole number: use k >= 1")
        if self.k < 1:
            raise RGTGError(
                f"k={self.k} is below 1: use k >= 1 (k=1 with temperature=0 is the base model's greedy)"
            )
        object.__setattr__(self, "beta", _number("beta", self.beta))
        object.__setattr__(self, "temperature", _number("temperature", self.temperature))
        if not math.isfinite(self.beta):
            raise RGTGError(f"beta={self.beta} is not finite: use a number such as 1.0 (0 is the base model)")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise RGTGError(
                f"temperature={self.temperature} is not a number >= 0: use 0 for greedy, 1 to sample"
            )
        if self.support not in SUPPORTS:
            raise RGTGError(
                f"support={self.support!r} is unknown: use one of {', '.join(map(repr, SUPPORTS))}"
            )
        if self.weights is not None:
            object.__setattr__(self, "weights", as_weights(self.weights))


def as_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of a mixture's guides as finite numbers.

    Raises:
        RGTGError: something else.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise RGTGError(f"weights={weights!r} is no list of numbers: use for example weights=(0.7, 0.3)")
    checked = tuple(_number(f"weights[{j}]", weight) for j, weight in enumerate(weights))
    for j, weight in enumerate(checked):
        if not math.isfinite(weight):
            raise RGTGError(
                f"weights[{j}]={weight} is not finite: use a number such as 1.0 (0 takes a guide out)"
            )
    return checked


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RGTGError(f"{name}={value!r} is not a number: use for example {name}=1.0")
    return float(value)
