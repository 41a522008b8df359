"""Op partial_bt_loss: the Bradley-Terry loss over all prefixes of packed preference pairs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...deprecation import warn_renamed
from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import LIBRARY, register

__all__ = ["MODES", "WEIGHTS", "partial_bt_loss", "partial_bt_terms", "reference"]

# In the order of the numbers by which the kernels know them.
MODES = ("eos", "repeat_last", "truncate")
WEIGHTS = ("prefix", "pair")


def _current_mode(mode: str) -> str:
    """The present name of a mode: `"hold"` is now `"repeat_last"`."""
    if mode != "hold":
        return mode
    warn_renamed("mode='hold'", "mode='repeat_last'", stacklevel=4)
    return "repeat_last"


def reference(
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    mode: str,
    weight: str,
    normalizer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    # The gradient is computed here, by its formula, so that rewards that are not read have none.
    rewards = rewards.detach().to(dtype)  # [M]
    ends = offsets.tolist()
    loss, gradient = rewards.new_zeros(()), torch.zeros_like(rewards)
    count = 0
    for pair in range(len(ends) // 2):
        chosen, rejected = slice(*ends[2 * pair : 2 * pair + 2]), slice(*ends[2 * pair + 1 : 2 * pair + 3])
        n_chosen, n_rejected = chosen.stop - chosen.start, rejected.stop - rejected.start
        n = min(n_chosen, n_rejected) if mode == "truncate" else max(n_chosen, n_rejected)
        # The last reward of the shorter answer stands for all that would come after it.
        term = torch.arange(n, device=rewards.device)
        i, j = term.clamp(max=n_chosen - 1), term.clamp(max=n_rejected - 1)
        margin = rewards[chosen][i] - rewards[rejected][j]
        share = 1 / n if weight == "pair" else 1.0
        loss -= share * F.logsigmoid(margin).sum()
        slope = -share * torch.sigmoid(-margin)
        gradient[chosen].index_add_(0, i, slope)
        gradient[rejected].index_add_(0, j, -slope)
        count += 1 if weight == "pair" else n
    total = count if normalizer is None else normalizer.to(dtype)
    return loss / total, gradient / total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def outputs(rewards: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, not yet filled."""
    dtype, device = _wide(rewards.dtype), rewards.device
    loss = torch.empty((), dtype=dtype, device=device)
    return loss, torch.empty(rewards.shape, dtype=dtype, device=device)


def _lengths(op: str, offsets: torch.Tensor, mode: str) -> list[int]:
    """Number of tokens of every answer."""
    # In Python's integers: a difference of two int64 may overflow.
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
                    "equally long ones: pad the shorter with EOS, or use 'repeat_last' or 'truncate'"
                )
    return lengths


def check(rewards: torch.Tensor, offsets: torch.Tensor, mode: str) -> None:
    """Refuses offsets that are not those of answers."""
    op, M, first, last = "partial_bt_loss", rewards.shape[0], int(offsets[0]), int(offsets[-1])
    if first != 0 or last != M:
        raise RGTGError(
            f"{op}: offsets go from {first} to {last}: they must go from 0 to M={M}, the number of rewards"
        )
    _lengths(op, offsets, mode)


register(
    reference,
    outputs,
    name="partial_bt_loss",
    check=check,
    cpp_dtypes=frozenset({torch.float64, *DTYPE_CODES}),
    cpp_arguments=lambda rewards, offsets, mode, weight, normalizer: (
        # The kernel reads float32 or float64.
        rewards.to(_wide(rewards.dtype)),
        offsets,
        MODES.index(mode),
        weight == "pair",
        None if normalizer is None else float(normalizer),
    ),
    triton_dtypes=frozenset(DTYPE_CODES),
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


def _check_names(op: str, mode: str, weight: str) -> None:
    for name, value, known in (("mode", mode, MODES), ("weight", weight, WEIGHTS)):
        if value not in known:
            raise RGTGError(f"{op}: there is no {name} {value!r}: use one of {', '.join(known)}")


def _pairs(op: str, offsets: torch.Tensor) -> int:
    """The number of pairs, from the shape of the offsets."""
    if offsets.ndim != 1 or offsets.shape[0] % 2 == 0:
        raise RGTGError(f"{op}: offsets have shape {list(offsets.shape)}: use [2N + 1] for N pairs")
    _checks.of_dtype(op, "offsets", offsets, torch.int64)
    return offsets.shape[0] // 2


def partial_bt_terms(offsets: torch.Tensor, mode: str = "eos", weight: str = "prefix") -> float:
    """Returns the number that `partial_bt_loss` divides by: the terms of a batch, or its pairs.

        Z = Σ_pairs n   for weight "prefix",      Z = N   for weight "pair"

    n is the number of terms of a pair: the longer answer's length, for mode "truncate" the shorter one's. Add the
    numbers of all batches of one optimizer step, and pass the sum as `normalizer`. Reads `offsets` on the host.

    Args:
        offsets: `[2N + 1]` int64, as for `partial_bt_loss`.
        mode: `"eos"`, `"repeat_last"` or `"truncate"`.
        weight: `"prefix"` or `"pair"`.

    Returns:
        Z.

    Raises:
        RGTGError: the shape or dtype does not fit, offsets do not rise, or a name is unknown.

    Source:
        The mean over pairs and prefixes in PARGS's loss (arXiv 2406.07780).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import partial_bt_terms
        >>> partial_bt_terms(torch.tensor([0, 3, 5]), mode="repeat_last")
        3.0
    """
    op = "partial_bt_terms"
    mode = _current_mode(mode)
    _check_names(op, mode, weight)
    N = _pairs(op, offsets)
    if weight == "pair":
        return float(N)
    lengths = _lengths(op, offsets, "repeat_last")
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

    Past the end of the shorter answer, mode "eos" reads rewards of padding EOS tokens (both answers have equal
    length), "repeat_last" repeats the shorter answer's last reward, and "truncate" stops. Weight "prefix" counts every
    term once (w = 1, Z = number of terms), "pair" every pair (w = 1/n, Z = N). The gradient is computed together with
    the loss, in one pass; it cannot be differentiated again.

    Args:
        rewards: `[M]`, rewards of all answer tokens, any floating dtype: chosen answer of pair 0, rejected answer of
            pair 0, chosen answer of pair 1, …
        offsets: `[2N + 1]` int64, index of each answer's first reward, then M.
        mode: `"eos"`, `"repeat_last"` or `"truncate"`.
        weight: `"prefix"` or `"pair"`.
        normalizer: scalar tensor Z, a constant; None: Z of this batch (see `partial_bt_terms`).

    Returns:
        The loss, a scalar, float32 (float64 for float64 rewards).

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
        >>> loss = partial_bt_loss(rewards, torch.tensor([0, 2, 3]), mode="repeat_last")
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", rewards.grad)
        0.4100 tensor([-0.2500, -0.0596,  0.3096])
    """
    op = "partial_bt_loss"
    mode = _current_mode(mode)
    _check_names(op, mode, weight)
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
