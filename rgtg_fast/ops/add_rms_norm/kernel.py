"""Triton kernel of add_rms_norm: one program per state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device, power_of_two
from . import outputs


def configuration(E: int) -> dict[str, object]:
    """Block shape for states of E numbers: a row in registers, 16 or 32 numbers a thread."""
    block = power_of_two(E, 64)
    # Products and sums are rounded separately, as in the models' own norms.
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["S"])
def add_rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_normed,
    p_total,
    S,
    E,
    x_b,
    x_s,
    residual_b,
    residual_s,
    eps,
    offset,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_b, i_s = i_r // S, i_r % S
    o_e = tl.arange(0, BLOCK)
    m_e = o_e < E
    b_x = tl.load(p_x + i_b * x_b + i_s * x_s + o_e, mask=m_e, other=0.0)
    # Loaded before the sum, so that the latencies overlap.
    b_weight = tl.load(p_weight + o_e, mask=m_e, other=0.0)
    if p_residual is not None:
        b_residual = tl.load(p_residual + i_b * residual_b + i_s * residual_s + o_e, mask=m_e, other=0.0)
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(b_x.dtype)
        tl.store(p_total + i_r * E + o_e, b_x, mask=m_e)
    b_wide = b_x.to(tl.float32)
    b_wide = b_wide * tl.rsqrt(tl.sum(b_wide * b_wide, 0) / E + eps)
    if OFFSET:
        b_out = b_wide * (b_weight.to(tl.float32) + offset)
    else:
        b_out = b_wide.to(b_x.dtype).to(tl.float32) * b_weight.to(tl.float32)
    tl.store(p_normed + i_r * E + o_e, b_out.to(b_x.dtype), mask=m_e)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, E = x.shape
    x, residual = dense(x), None if residual is None else dense(residual)
    normed, total = outputs(x, residual)
    if normed.numel() == 0:
        return normed, total
    residual_strides = (0, 0) if residual is None else residual.stride()[:2]
    with on_device(x):
        add_rms_norm_kernel[(B * S,)](
            x,
            residual,
            weight.contiguous(),
            normed,
            None if residual is None else total,
            S,
            E,
            *x.stride()[:2],
            *residual_strides,
            eps,
            offset,
            OFFSET=offset != 0,
            **configuration(E),
        )
    return normed, total
