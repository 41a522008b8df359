"""Room of partial_bt_loss: the Bradley-Terry loss over all prefixes of packed preference pairs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import LIBRARY, register
from .cpp import cpp
from .launch import MODES, WEIGHTS
from .reference import reference
from .spec import SPEC

__all__ = ["MODES", "SPEC", "WEIGHTS", "partial_bt_loss", "partial_bt_terms", "reference"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(
    rewards: torch.Tensor, offsets: torch.Tensor, mode: str, weight: str, normalizer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _wide(rewards.dtype)
    return rewards.new_empty((), dtype=dtype), torch.empty_like(rewards, dtype=dtype)


def _lengths(op: str, offsets: torch.Tensor, mode: str) -> list[int]:
    """Tokens of every answer."""
    # Python's own numbers: a difference of two tensors may overflow.
    lengths = [end - start for start, end in pairwise(offsets.tolist())]
    for answer, length in enumerate(lengths):
        if length < 1:
            raise RGTGError(
                f"{op}: the {('chosen', 'rejected')[answer % 2]} answer of pair {answer // 2} has {length} "
                "tokens: every answer needs at least one, its EOS"
            )
    if mode == "eos":
        for pair, (chosen, rejected) in enumerate(zip(lengths[::2], lengths[1::2], strict=True)):
            if chosen != rejected:
                raise RGTGError(
                    f"{op}: pair {pair} has answers of {chosen} and {rejected} tokens, and mode 'eos' compares "
                    "equally long ones: pad the shorter with EOS, or use 'hold' or 'truncate'"
                )
    return lengths


def _check_values(
    rewards: torch.Tensor, offsets: torch.Tensor, mode: str, weight: str, normalizer: torch.Tensor | None
) -> None:
    op, M, first, last = "partial_bt_loss", rewards.shape[0], int(offsets[0]), int(offsets[-1])
    if first != 0 or last != M:
        raise RGTGError(
            f"{op}: offsets go from {first} to {last}: they must go from 0 to M={M}, the number of rewards"
        )
    _lengths(op, offsets, mode)


register(
    SPEC,
    "(Tensor rewards, Tensor offsets, str mode, str weight, Tensor? normalizer) -> (Tensor, Tensor)",
    _fake,
    _check_values,
    cpp,
    frozenset({torch.float64, *DTYPE_CODES}),
    frozenset(DTYPE_CODES),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (grad_loss * gradient).to(ctx.dtype), None, None, None, None


torch.library.register_autograd(
    "rgtg_fast::partial_bt_loss", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _named(op: str, mode: str, weight: str) -> None:
    for name, value, known in (("mode", mode, MODES), ("weight", weight, WEIGHTS)):
        if value not in known:
            raise RGTGError(f"{op}: there is no {name} {value!r}: use one of {', '.join(known)}")


def _pairs(op: str, offsets: torch.Tensor) -> int:
    """The number of pairs that the offsets name."""
    if offsets.ndim != 1 or offsets.shape[0] % 2 == 0:
        raise RGTGError(f"{op}: offsets have shape {list(offsets.shape)}: use [2N + 1] for N pairs")
    _checks.of_dtype(op, "offsets", offsets, torch.int64)
    return offsets.shape[0] // 2


def partial_bt_terms(offsets: torch.Tensor, mode: str = "eos", weight: str = "prefix") -> float:
    """Counts what `partial_bt_loss` divides by: the terms of a batch, or its pairs.

        Z = Σ_pairs n   for weight "prefix",      Z = N   for weight "pair"

    n is the number of terms of a pair: the longer answer's length, for mode "truncate" the shorter one's. Add the
    counts of all batches that one optimizer step sees, and pass the sum as `normalizer`. Reads `offsets` on the host.

    Args:
        offsets: `[2N + 1]` int64, as for `partial_bt_loss`.
        mode: `"eos"`, `"hold"` or `"truncate"`.
        weight: `"prefix"` or `"pair"`.

    Returns:
        The count.

    Raises:
        RGTGError: the shape or dtype does not fit, offsets do not rise, or a name is unknown.

    Source:
        The mean over pairs and prefixes in PARGS's loss (arXiv 2406.07780).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import partial_bt_terms
        >>> partial_bt_terms(torch.tensor([0, 3, 5]), mode="hold")
        3.0
    """
    op = "partial_bt_terms"
    _named(op, mode, weight)
    N = _pairs(op, offsets)
    if weight == "pair":
        return float(N)
    lengths = _lengths(op, offsets, "hold")
    longer_or_shorter = min if mode == "truncate" else max
    return float(sum(map(longer_or_shorter, lengths[::2], lengths[1::2])))


def partial_bt_loss(
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    mode: str = "eos",
    weight: str = "prefix",
    normalizer: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bradley-Terry loss over every prefix of both answers of every pair, differentiable in the rewards.

        L = 1/Z · Σ_pairs w Σ_{i=1..n} −log σ( r(x, y^w_{1:i}) − r(x, y^l_{1:i}) )

    Past the end of the shorter answer, mode "eos" finds rewards of padding EOS tokens (both answers come equally
    long), "hold" carries the shorter answer's last reward on, and "truncate" stops. Weight "prefix" counts every
    term once (w = 1, Z = number of terms), "pair" every pair (w = 1/n, Z = N). The gradient is computed together with
    the loss, in one pass; it cannot be differentiated again.

    Args:
        rewards: `[M]`, the rewards of all answer tokens, floating: chosen answer of pair 0, rejected answer of pair 0,
            chosen answer of pair 1, …
        offsets: `[2N + 1]` int64, where the answers begin, and M.
        mode: `"eos"`, `"hold"` or `"truncate"`.
        weight: `"prefix"` or `"pair"`.
        normalizer: scalar tensor Z, a constant; None for this batch's own (see `partial_bt_terms`).

    Returns:
        The loss, a scalar in float32 (float64 for float64 rewards).

    Raises:
        RGTGError: shapes or dtypes do not fit, a name is unknown, there is no pair and no normalizer, or, on the CPU,
            offsets do not rise from 0 to M by at least one, or answers differ in length in mode "eos" (elsewhere the
            loss is NaN then).

    Source:
        PARGS (arXiv 2406.07780), the partial-sequence Bradley-Terry loss; mode "eos" with weight "prefix" is what its
        published trainer computes.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import partial_bt_loss
        >>> rewards = torch.tensor([0.0, 2.0, 0.0], requires_grad=True)
        >>> loss = partial_bt_loss(rewards, torch.tensor([0, 2, 3]), mode="hold")
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", rewards.grad)
        0.4100 tensor([-0.2500, -0.0596,  0.3096])
    """
    op = "partial_bt_loss"
    _named(op, mode, weight)
    if rewards.ndim != 1:
        raise RGTGError(
            f"{op}: rewards have shape {list(rewards.shape)}: use [M], the answers one after another"
        )
    _checks.floating(op, "rewards", rewards)
    N = _pairs(op, offsets)
    if normalizer is None:
        if N == 0:
            raise RGTGError(f"{op}: there is no pair to average over: give at least one, or a normalizer")
    else:
        _checks.shaped(op, "normalizer", normalizer, "a scalar", ())
        normalizer = normalizer.detach().to(_wide(rewards.dtype))
    _checks.together(op, rewards, offsets=offsets, normalizer=normalizer)
    return torch.ops.rgtg_fast.partial_bt_loss(rewards, offsets, mode, weight, normalizer)[0]
