"""Triton kernel of rope_and_store: one program per token and block of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device, power_of_two
from . import outputs

# Numbers of the heads of one program: 8 a thread, so that a token of many heads has several programs.
TILE = 1024


def configuration(D: int) -> dict[str, object]:
    """Block shapes for heads of D numbers."""
    width = power_of_two(D, 16)
    # Products and sums are rounded separately, as in transformers' own rotation.
    return {"BLOCK_D": width, "ROWS": max(1, TILE // width), "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def normed(b_x, b_weight, b_scale, offset, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Numbers times their head's scale and the norm's weight, rounded as `add_rms_norm` does."""
    b_y = b_x * b_scale[:, None]
    if OFFSET:
        return (b_y * (b_weight + offset)).to(dtype).to(tl.float32)
    return (b_y.to(dtype).to(tl.float32) * b_weight).to(dtype).to(tl.float32)


@triton.jit
def rotated(p_x, p_norm, m_r, b_cos, b_sin, D, R, eps, offset, OFFSET: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads [ROWS, D] at the pointers `p_x` [ROWS], normalized where there is a norm, and rotated."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    o_d = tl.arange(0, BLOCK_D)
    m_rd = m_r[:, None] & (o_d < D)
    b_x = tl.load(p_x[:, None] + o_d, mask=m_rd, other=0.0).to(tl.float32)
    # Each number's partner in the other half; its own where it is not rotated, which the sine of 0 leaves out.
    half = R // 2
    o_p = tl.where(o_d < half, o_d + half, tl.where(o_d < R, o_d - half, o_d))
    b_p = tl.load(p_x[:, None] + o_p, mask=m_rd, other=0.0).to(tl.float32)
    if p_norm is not None:
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
        b_w = tl.load(p_norm + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_wp = tl.load(p_norm + o_p, mask=o_d < D, other=0.0).to(tl.float32)
        b_x = normed(b_x, b_w, b_scale, offset, OFFSET, dtype)
        b_p = normed(b_p, b_wp, b_scale, offset, OFFSET, dtype)
    b_p = tl.where(o_d < half, -b_p, b_p)
    b_turned = (b_x * b_cos).to(dtype).to(tl.float32) + (b_p * b_sin).to(dtype).to(tl.float32)
    return tl.where(o_d < R, b_turned, b_x).to(dtype)


@triton.jit(do_not_specialize=["S", "H", "G"])
def rope_and_store_kernel(
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_k_new,
    p_v_new,
    p_q_norm,
    p_k_norm,
    p_out,
    S,
    H,
    G,
    D,
    R,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    cos_b,
    cos_s,
    sin_b,
    sin_s,
    k_new_b,
    k_new_g,
    k_new_s,
    v_new_b,
    v_new_g,
    v_new_s,
    eps,
    offset,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_b, i_s = i_t // S, i_t % S
    # The blocks of the query heads come first, then those of the key heads with their values.
    i_r = tl.program_id(1)
    blocks = tl.cdiv(H, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < R
    dtype: tl.constexpr = p_q.dtype.element_ty
    b_cos = tl.load(p_cos + i_b * cos_b + i_s * cos_s + o_d, mask=m_d, other=0.0).to(dtype).to(tl.float32)
    b_sin = tl.load(p_sin + i_b * sin_b + i_s * sin_s + o_d, mask=m_d, other=0.0).to(dtype).to(tl.float32)
    if i_r < blocks:
        o_h = i_r * ROWS + tl.arange(0, ROWS)
        m_h = o_h < H
        p_x = p_q + i_b * q_b + i_s * q_s + o_h.to(tl.int64) * q_h
        b_out = rotated(p_x, p_q_norm, m_h, b_cos, b_sin, D, R, eps, offset, OFFSET, BLOCK_D)
        p_o = p_out + (i_t * H + o_h)[:, None] * D + o_d
        tl.store(p_o, b_out, mask=m_h[:, None] & (o_d < D))
    else:
        o_g = (i_r - blocks) * ROWS + tl.arange(0, ROWS)
        m_g = o_g < G
        o_gl = o_g.to(tl.int64)
        m_gd = m_g[:, None] & (o_d < D)
        p_x = p_k + i_b * k_b + i_s * k_s + o_gl * k_g
        b_k = rotated(p_x, p_k_norm, m_g, b_cos, b_sin, D, R, eps, offset, OFFSET, BLOCK_D)
        b_v = tl.load(p_v + i_b * v_b + i_s * v_s + o_gl[:, None] * v_g + o_d, mask=m_gd, other=0.0)
        tl.store(p_k_new + i_b * k_new_b + o_gl[:, None] * k_new_g + i_s * k_new_s + o_d, b_k, mask=m_gd)
        tl.store(p_v_new + i_b * v_new_b + o_gl[:, None] * v_new_g + i_s * v_new_s + o_d, b_v, mask=m_gd)


def launch(
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
    B, S, H, D = q.shape
    G, R = k.shape[2], cos.shape[2]
    q, k, v, cos, sin = (dense(x) for x in (q, k, v, cos, sin))
    out = outputs(q)
    if B * S == 0:
        return out
    settings = configuration(D)
    blocks = triton.cdiv(H, settings["ROWS"]) + triton.cdiv(G, settings["ROWS"])
    with on_device(q):
        rope_and_store_kernel[(B * S, blocks)](
            q,
            k,
            v,
            cos,
            sin,
            k_new,
            v_new,
            None if q_norm is None else q_norm.contiguous(),
            None if k_norm is None else k_norm.contiguous(),
            out,
            S,
            H,
            G,
            D,
            R,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *cos.stride()[:2],
            *sin.stride()[:2],
            k_new.stride(0),
            k_new.stride(1),
            k_new.stride(2),
            v_new.stride(0),
            v_new.stride(1),
            v_new.stride(2),
            eps,
            offset,
            OFFSET=offset != 0,
            **settings,
        )
    return out
