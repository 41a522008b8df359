"""Op rope_and_store: rotary embedding of queries and keys, and the write of the new tokens' keys and values."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RGTGError
from .. import _checks
from .._extension import DTYPE_CODES
from .._registry import register
from ..add_rms_norm import reference as norm_reference

__all__ = ["reference", "rope_and_store"]

# The largest head that the Triton kernel takes.
MAX_D = 512


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    offset: float,
) -> torch.Tensor:
    out = _rotated(_normed(q, q_norm, eps, offset), cos, sin).contiguous().transpose(1, 2)
    k_new.copy_(_rotated(_normed(k, k_norm, eps, offset), cos, sin).transpose(1, 2))
    v_new.copy_(v.transpose(1, 2))
    return out


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    return x if weight is None else norm_reference(x, None, weight, eps, offset)[0]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first R numbers of every head [B, S, heads, D] rotated by their token's angles [B, S, R]."""
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    cos, sin = cos.to(x.dtype).unsqueeze(2), sin.to(x.dtype).unsqueeze(2)
    half = torch.cat([-turned[..., R // 2 :], turned[..., : R // 2]], -1)
    return torch.cat([turned * cos + half * sin, rest], -1)


def outputs(q: torch.Tensor, *_: Any) -> torch.Tensor:
    """The queries, not yet filled: a view of memory in the order `[B, S, H, D]`."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device).transpose(1, 2)


def triton_limit(D: int = 1) -> str:
    """Why the Triton kernel cannot serve this size; empty where it can."""
    return f"its Triton kernel takes D <= {MAX_D}, not {D}" if D > MAX_D else ""


register(
    reference,
    outputs,
    name="rope_and_store",
    writes=("k_new", "v_new"),
    triton_dtypes=frozenset(DTYPE_CODES),
    triton_limit=triton_limit,
    sizes=lambda q, *_: {"D": q.shape[-1]},
)


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    """Everything between an attention layer's projections and its attention, in one launch.

        x'_d = x_d cos_d − x_{d+R/2} sin_d            for d < R/2
        x'_d = x_d cos_d + x_{d−R/2} sin_d            for R/2 ≤ d < R,        x'_d = x_d beyond

    for every head x of q and k, which are normalized first (as in `add_rms_norm`) where a norm is given. The keys and
    the values are written to `k_new` and `v_new`. Both products and their sum are rounded to the dtype, as
    transformers' `apply_rotary_pos_emb` does.

    Args:
        q: `[B, S, H, D]`, queries before the rotation, any floating dtype. Of q, k and v only the last dimension need
            be contiguous: they may be parts of one product.
        k: `[B, S, G, D]`, keys, same dtype.
        v: `[B, S, G, D]`, values, same dtype.
        cos: `[B, S, R]`, cosines of each token's angles, R ≤ D even, any floating dtype; both halves as transformers'
            rotary embeddings give them. Rounded to q's dtype.
        sin: `[B, S, R]`, sines, dtype of cos.
        k_new: `[B, G, S, D]`, receives the keys, same dtype; its last dimension is contiguous.
        v_new: `[B, G, S, D]`, receives the values, likewise.
        q_norm: `[D]`, weight of the RMS norm of each query head (Qwen3), same dtype, or None.
        k_norm: `[D]`, the same for the key heads.
        eps: added to the norms' mean square.
        offset: added to the norms' weights.

    Returns:
        `[B, H, S, D]`, the rotated queries, a view of memory laid out `[B, S, H, D]`.

    Raises:
        RGTGError: shapes or dtypes do not fit.

    Source:
        RoFormer (arXiv 2104.09864), eq. 34, with the halves of a head as its pairs (GPT-NeoX's layout).

    Example:
        >>> import torch
        >>> from rgtg_fast.ops import rope_and_store
        >>> x, cos, sin = torch.tensor([[[[3.0, 4.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> k_new, v_new = torch.empty(2, 1, 1, 1, 2)
        >>> rope_and_store(x, x, x, cos, sin, k_new, v_new), k_new, v_new
        (tensor([[[[-4.,  3.]]]]), tensor([[[[-4.,  3.]]]]), tensor([[[[3., 4.]]]]))
    """
    op = "rope_and_store"
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3:
        raise RGTGError(
            f"{op}: q, k and cos have shapes {list(q.shape)}, {list(k.shape)} and {list(cos.shape)}: use 4, 4 and 3 "
            "dimensions"
        )
    _checks.floating(op, "q", q)
    _checks.floating(op, "cos", cos)
    B, S, _, D = q.shape
    G, R = k.shape[2], cos.shape[2]
    if not 0 < R <= D or R % 2:
        raise RGTGError(f"{op}: cos has {R} angles for heads of {D} numbers: use an even number up to {D}")
    for name, x in (("k", k), ("v", v)):
        _checks.shaped(op, name, x, "[B, S, G, D]", (B, S, G, D))
    for name, x in (("cos", cos), ("sin", sin)):
        _checks.shaped(op, name, x, "[B, S, R]", (B, S, R))
        _checks.of_dtype(op, name, x, cos.dtype)
    for name, x in (("k_new", k_new), ("v_new", v_new)):
        _checks.shaped(op, name, x, "[B, G, S, D]", (B, G, S, D))
        if D > 1 and x.stride(-1) != 1:
            raise RGTGError(f"{op}: {name} is written in place: its last dimension must be contiguous")
    for name, x in (("q_norm", q_norm), ("k_norm", k_norm)):
        if x is not None:
            _checks.shaped(op, name, x, "[D]", (D,))
    for name, x in (
        ("k", k),
        ("v", v),
        ("k_new", k_new),
        ("v_new", v_new),
        ("q_norm", q_norm),
        ("k_norm", k_norm),
    ):
        if x is not None:
            _checks.of_dtype(op, name, x, q.dtype)
    others = {"k": k, "v": v, "cos": cos, "sin": sin, "k_new": k_new, "v_new": v_new}
    _checks.together(op, q, **others, q_norm=q_norm, k_norm=k_norm)
    _checks.written(op, k_new=k_new, v_new=v_new)
    return torch.ops.rgtg_fast.rope_and_store(q, k, v, cos, sin, k_new, v_new, q_norm, k_norm, eps, offset)
