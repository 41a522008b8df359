"""Settings of a run: frozen dataclasses that validate themselves."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from rgtg_fast.deprecation import RenamedAttribute, renamed_keywords
from rgtg_fast.errors import RGTGError, shown

SUPPORTS = ("lm", "combined", "all")
# Settings of `Segments`, old name -> new name.
RENAMED_SETTINGS = {"shortest": "min_tokens", "longest": "max_tokens", "rejections": "max_rejections"}
# Settings go to the device in float32.
LARGEST = 3.4028234663852886e38
# Panels of the command line's help.
MODELS, GUIDANCE, LENGTH, OUTPUT = "Models", "Guidance", "Length and batch", "Output"
DATA, OBJECTIVE, TRAINED, STEPS = "Data", "Objective", "What is trained", "Steps"


def option(
    help: str,
    default: Any = MISSING,
    panel: str | None = None,
    *,
    flags: Iterable[str] = (),
    shown: str | None = None,
    min: int | None = None,
    before: str | None = None,
    **settings: Any,
) -> Any:
    """A field of a dataclass that is an option of the command line too; without a default it is required.

    Args:
        help: one sentence or two for `--help`.
        default: the value where the option is not given.
        panel: heading in the help.
        flags: names on the command line; by default `--field-name`, and `--no-field-name` too for a boolean that is
            not False by default.
        shown: the default in words, where the value does not say it.
        min: smallest value.
        before: name of the option that this one comes before in the help; by default it comes last.
        settings: further arguments of `dataclasses.field`.
    """
    metadata = {
        "help": help,
        "panel": panel,
        "flags": tuple(flags),
        "shown": shown,
        "min": min,
        "before": before,
    }
    return field(default=default, metadata=metadata, **settings)


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
        weights: weights of the rewards of a `MixtureReward`, for this request alone; None for the mixture's own.
        gate_entropy: the reward is used only where the base model's next-token entropy, in nats, is at least this
            (sparse guidance, SIA, arXiv 2602.21215); None uses it everywhere.

    Raises:
        RGTGError: a value out of its range.

    Example:
        >>> Guidance(k=10, beta=2.0, temperature=0)
        Guidance(k=10, beta=2.0, temperature=0.0, support='lm', weights=None, gate_entropy=None)
    """

    k: int = 10
    beta: float = 1.0
    temperature: float = 1.0
    support: str = "lm"
    weights: tuple[float, ...] | None = None
    gate_entropy: float | None = None

    def __post_init__(self) -> None:
        k = whole("k", self.k)
        if k < 1:
            raise RGTGError(
                f"k={k} is below 1: use k >= 1 (k=1 with temperature=0 is the base model's greedy)"
            )
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "beta", number("beta", self.beta))
        object.__setattr__(self, "temperature", _temperature(self.temperature))
        if not isinstance(self.support, str) or self.support not in SUPPORTS:
            raise RGTGError(
                f"support={shown(self.support)} is unknown: use one of {', '.join(map(repr, SUPPORTS))}"
            )
        if self.weights is not None:
            object.__setattr__(self, "weights", as_weights(self.weights))
        if self.gate_entropy is not None:
            object.__setattr__(self, "gate_entropy", number("gate_entropy", self.gate_entropy))
            if self.gate_entropy < 0:
                raise RGTGError(
                    f"gate_entropy={self.gate_entropy} is below 0: use nats such as 1.0, None for no gate"
                )


@dataclass(frozen=True)
class BestOfN:
    """Samples n answers of the base model and keeps the one whose whole answer has the highest reward.

    Args:
        n: answers per prompt.
        temperature: τ >= 0 of the samples.
        top_k: samples from the k most probable tokens, None for the whole vocabulary.

    Raises:
        RGTGError: a value out of its range.

    Example:
        >>> BestOfN(n=8).temperature
        1.0
    """

    n: int = 4
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, "n", 1)
        _sampling(self)


@dataclass(frozen=True)
class Segments:
    """Segment-level rejection sampling (CARDS, arXiv 2406.16306).

    A segment of the base model's samples ends where the next token's entropy reaches `entropy`. It is accepted with
    probability min(1, exp((r − τ_t)/beta)), where r is the reward of the answer up to it, t its length in tokens and

        τ_t = min(target, r0 + t·(target − r0)/max_new_tokens),    r0 = (1 − alpha)·r(x) + alpha·target

    and sampled anew otherwise; after `max_rejections` rejections the best segment seen is kept.

    Args:
        target: r*, the reward to reach, on the reward model's own scale (8.5 in the paper, for its Llama on HH).
        alpha: where between r(x) and the target the threshold begins, 0 to 1.
        beta: temperature of the acceptance, > 0.
        entropy: in nats; a segment ends where the next token's reaches it.
        min_tokens: smallest number of tokens of a segment.
        max_tokens: largest number of tokens of a segment.
        max_rejections: largest number of rejections of one segment.
        temperature: temperature of the samples, as in `BestOfN`.
        top_k: k of the samples, as in `BestOfN`.

    Raises:
        RGTGError: a value out of its range.
    """

    target: float = 8.5
    alpha: float = 0.5
    beta: float = 0.7
    entropy: float = 3.0
    min_tokens: int = 4
    max_tokens: int = 64
    max_rejections: int = 20
    temperature: float = 1.0
    top_k: int | None = None
    shortest = RenamedAttribute("min_tokens")
    longest = RenamedAttribute("max_tokens")
    rejections = RenamedAttribute("max_rejections")

    def __post_init__(self) -> None:
        for name in ("target", "alpha", "beta", "entropy"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        if not 0 <= self.alpha <= 1:
            raise RGTGError(f"alpha={self.alpha} is outside of 0 to 1: use for example 0.5")
        if self.beta <= 0:
            raise RGTGError(f"beta={self.beta} is not above 0: use for example 0.7")
        _at_least(self, "min_tokens", 1)
        _at_least(self, "max_tokens", self.min_tokens)
        _at_least(self, "max_rejections", 0)
        _sampling(self)


@dataclass(frozen=True)
class Blocks:
    """Blockwise best-of-K (controlled decoding, arXiv 2310.17022): K sampled blocks, of which the best is kept.

    Args:
        k: blocks to choose from.
        length: tokens of a block.
        temperature: temperature of the samples, as in `BestOfN`.
        top_k: k of the samples, as in `BestOfN`.

    Raises:
        RGTGError: a value out of its range.
    """

    k: int = 4
    length: int = 16
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, "k", 1)
        _at_least(self, "length", 1)
        _sampling(self)


Segments.__init__ = renamed_keywords(**RENAMED_SETTINGS)(Segments.__init__)

Strategy = BestOfN | Segments | Blocks


def whole(name: str, value: Any, least: int | None = None, example: int = 4) -> int:
    """A setting that is a whole number: Python's, numpy's or torch's.

    Raises:
        RGTGError: something else, true and false among it, or a number below `least`.
    """
    plain = _scalar(value)
    if not isinstance(plain, numbers.Integral) or (least is not None and plain < least):
        bound = "" if least is None else f" >= {least}"
        raise RGTGError(f"{name}={shown(value)} is not a whole number{bound}: use for example {example}")
    return int(plain)


def number(name: str, value: Any) -> float:
    """A setting that is a number, as finite in float32 as the device needs it: Python's, numpy's or torch's.

    Raises:
        RGTGError: something else, true and false among it, NaN, or a number beyond float32.
    """
    plain = _scalar(value)
    if not isinstance(plain, numbers.Real):
        raise RGTGError(f"{name}={shown(value)} is not a number: use for example {name}=1.0")
    try:
        converted = float(plain)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted):
        raise RGTGError(f"{name}={shown(value)} is not finite: use a number such as 1.0")
    if abs(converted) > LARGEST:
        raise RGTGError(f"{name}={converted:g} is beyond float32 ({LARGEST:.3g}): use a number such as 1.0")
    return converted


def _scalar(value: Any) -> Any:
    """The number in an array without dimensions; None for what is not a number."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, bool) else value


def _at_least(strategy: Strategy, name: str, least: int) -> None:
    value = whole(name, getattr(strategy, name), least, max(least, 4))
    object.__setattr__(strategy, name, value)


def _temperature(value: Any) -> float:
    temperature = number("temperature", value)
    if temperature < 0:
        raise RGTGError(f"temperature={temperature} is not a number >= 0: use 0 for greedy, 1 to sample")
    return temperature


def _sampling(strategy: Strategy) -> None:
    object.__setattr__(strategy, "temperature", _temperature(strategy.temperature))
    if strategy.top_k is not None:
        _at_least(strategy, "top_k", 1)


def as_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of a mixture's rewards as numbers that float32 holds.

    Raises:
        RGTGError: something else.
    """
    given: Any = weights
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise RGTGError(
            f"weights={shown(weights)} is not a list of numbers: use for example weights=(0.7, 0.3)"
        )
    return tuple(number(f"weights[{j}]", weight) for j, weight in enumerate(given))
