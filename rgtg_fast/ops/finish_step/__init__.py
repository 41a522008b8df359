"""Op finish_step: what a step has decided goes into the slots for the next one, and packed to the host."""

from __future__ import annotations

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from .reference import NO_CANDIDATE, OK, reference
from .spec import SPEC

__all__ = ["NO_CANDIDATE", "OK", "SPEC", "finish_step", "reference"]


def _fake(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    candidates: torch.Tensor,
    choice: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    limit: torch.Tensor,
    widths: torch.Tensor | None,
    eos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B = logprobs.shape[0]
    return logprobs.new_empty((5, B), dtype=torch.float64), choice.new_empty((B,))


def _check_values(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    candidates: torch.Tensor,
    choice: torch.Tensor,
    *rest: torch.Tensor | None,
) -> None:
    K = logprobs.shape[1]
    for row, chosen in enumerate(choice.tolist()):
        if not -1 <= chosen < K:
            raise RGTGError(f"finish_step: choice[{row}]={chosen} is no candidate (K={K}): use -1 to {K - 1}")


register(
    SPEC,
    "(Tensor logprobs, Tensor rewards, Tensor candidates, Tensor choice, Tensor drawn, Tensor(a!) tokens, "
    "Tensor(b!) position, Tensor limit, Tensor? widths, Tensor eos) -> (Tensor, Tensor)",
    _fake,
    _check_values,
    cpp=None,
    cpp_dtypes=frozenset(),
    triton_dtypes=frozenset(DTYPE_CODES),
)


def finish_step(
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    candidates: torch.Tensor,
    choice: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    limit: torch.Tensor,
    widths: torch.Tensor | None,
    eos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends a decoding step: the chosen tokens become the newest ones, rows end, and the host gets one small tensor.

        kept        = choice, or −1 where tokens[b] < 0: a row that has ended stands still
        tokens[b]   = candidates[b, choice[b]], or −1 where that ends the row or it had ended
        position[b] += 1

    A row ends at a token of `eos`, or when `position + 1` reaches its limit. A choice of −1 stands for candidate 0.

    Args:
        logprobs: `[B, K]`, log-probabilities of the candidates, any floating dtype. rewards: `[B, K]`, same dtype.
        candidates: `[B, K]` int64, their tokens.
        choice: `[B]` int64, the candidate drawn, or −1. drawn: `[B]`, its log-probability after guidance, any floating
            dtype; both as `resample` gives them.
        tokens: `[B]` int64, each row's newest token, −1 where it has ended; written in place.
        position: `[B]` int64, index of the answer token that is decided here; written in place.
        limit: `[B]` int64, answer tokens that end a row.
        widths: `[B]` int64, candidates that a row has; None: all K.
        eos: `[Z]` int64, tokens that end a row.

    Returns:
        `packed [5, B]` float64: token, logprob, reward and drawn of the chosen candidate, and the row's fault: the
        first candidate whose reward is NaN or +inf, else `NO_CANDIDATE` (−2) where choice is −1, else `OK` (−1).
        `kept [B]` int64, what the caches commit.

    Raises:
        RGTGError: shapes or dtypes do not fit, or, on the CPU, a choice is below −1 or not below K.

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import advance
        >>> scores, candidates, one = torch.zeros(1, 2), torch.tensor([[7, 9]]), torch.tensor([1])
        >>> tokens, position = torch.tensor([5]), torch.tensor([0])
        >>> packed, kept = advance(
        ...     scores, scores, candidates, one, torch.zeros(1), tokens, position, 8 * one, None, torch.tensor([2])
        ... )
        >>> packed.T, kept, tokens, position
        (tensor([[ 9.,  0.,  0.,  0., -1.]], dtype=torch.float64), tensor([1]), tensor([9]), tensor([1]))
    """
    op = "finish_step"
    if logprobs.ndim != 2 or logprobs.shape[1] == 0:
        raise RGTGError(f"{op}: logprobs has shape {list(logprobs.shape)}: use [B, K] with K >= 1")
    for name, x in (("logprobs", logprobs), ("drawn", drawn)):
        _checks.floating(op, name, x)
    B, K = logprobs.shape
    for name, x in (("rewards", rewards), ("candidates", candidates)):
        _checks.shaped(op, name, x, "[B, K]", (B, K))
    _checks.of_dtype(op, "rewards", rewards, logprobs.dtype)
    _checks.shaped(op, "drawn", drawn, "[B]", (B,))
    rows = {"choice": choice, "tokens": tokens, "position": position, "limit": limit}
    if widths is not None:
        rows["widths"] = widths
    for name, x in rows.items():
        _checks.shaped(op, name, x, "[B]", (B,))
    if eos.ndim != 1:
        raise RGTGError(f"{op}: eos has shape {list(eos.shape)}: use [Z]")
    for name, x in {**rows, "candidates": candidates, "eos": eos}.items():
        _checks.of_dtype(op, name, x, torch.int64)
    for name, x in (("tokens", tokens), ("position", position)):
        if not x.is_contiguous():
            raise RGTGError(f"{op}: {name} is written in place: it must be contiguous")
    _checks.together(op, logprobs, rewards=rewards, candidates=candidates, drawn=drawn, eos=eos, **rows)
    return torch.ops.rgtg_fast.finish_step(
        logprobs, rewards, candidates, choice, drawn, tokens, position, limit, widths, eos
    )
