"""Triton kernel of act_and_mul: one program per block of one token's numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device
from . import outputs

BLOCK = 1024


def configuration(F: int) -> dict[str, object]:
    """Block shape: 8 numbers a thread."""
    # Products and sums are rounded separately, as in the models' own activations.
    return {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["S"])
def act_and_mul_kernel(
    p_gate,
    p_up,
    p_out,
    S,
    F,
    gate_b,
    gate_s,
    up_b,
    up_s,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_b, i_s = i_r // S, i_r % S
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    b_gate = tl.load(p_gate + i_b * gate_b + i_s * gate_s + o_f, mask=m_f, other=0.0)
    b_up = tl.load(p_up + i_b * up_b + i_s * up_s + o_f, mask=m_f, other=0.0)
    b_x = b_gate.to(tl.float32)
    if GELU:
        # ½ (1 + tanh(u)) = σ(2u); 1.5957691216 = 2 √(2/π)
        b_act = b_x * tl.sigmoid(1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x))
    else:
        b_act = b_x * tl.sigmoid(b_x)
    b_out = b_act.to(b_gate.dtype).to(tl.float32) * b_up.to(tl.float32)
    tl.store(p_out + i_r * F + o_f, b_out.to(b_gate.dtype), mask=m_f)


def launch(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    B, S, F = gate.shape
    gate, up = dense(gate), dense(up)
    out = outputs(gate)
    if out.numel() == 0:
        return out
    with on_device(gate):
        act_and_mul_kernel[(B * S, triton.cdiv(F, BLOCK))](
            gate,
            up,
            out,
            S,
            F,
            *gate.stride()[:2],
            *up.stride()[:2],
            GELU=activation == "gelu_tanh",
            **configuration(F),
        )
    return out
