"""Triton kernel of invariant_linear: the weight's rows are the rows of the tensor cores' tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device, tickets
from . import outputs

# Outputs, bytes of the inner sum's numbers and rows of x of one tile. A tile of the weight is 16 KiB.
BLOCK_N, BYTES_K = 64, 256
BLOCKS_M = (16, 32, 64)
# Programs that occupy 132 multiprocessors twice. A constant: the order of a sum must not depend on the device's size.
PROGRAMS = 264
# Numbers of the inner sum that a part has at least; every part but the last has a multiple of 128.
LEAST_SPAN = 512


def configuration(M: int, dtype: torch.dtype) -> dict[str, object]:
    """Block shapes for M rows of x."""
    # float32 has no tensor cores here: more rows would not fit in the registers.
    most = BLOCKS_M[0] if dtype == torch.float32 else BLOCKS_M[-1]
    block = min(most, next((n for n in BLOCKS_M if n >= M), most))
    block_k = BYTES_K // dtype.itemsize
    return {"BLOCK_M": block, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}


def split(N: int, K: int) -> tuple[int, int]:
    """Parts of the inner sum for a weight [N, K], and how many numbers each adds up.

    The same for any number of rows: with it the order in which a result's terms are added.
    """
    wanted = -(-PROGRAMS // -(-N // BLOCK_N))
    span = max(LEAST_SPAN, 128 * -(-K // (128 * wanted)))
    return max(1, -(-K // span)), span


@triton.jit(do_not_specialize=["M", "S"])
def invariant_linear_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    p_parts,
    p_tickets,
    M,
    N,
    K,
    S,
    x_b,
    x_s,
    weight_n,
    span,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n, i_k, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < N, o_m < M
    p_w = p_weight + o_n.to(tl.int64)[:, None] * weight_n
    p_rows = p_x + (o_m // S).to(tl.int64)[:, None] * x_b + (o_m % S).to(tl.int64)[:, None] * x_s
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(i_k * span, tl.minimum((i_k + 1) * span, K), BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_rows + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision="ieee")

    m_nm = m_n[:, None] & m_m[None, :]
    splits = tl.num_programs(1)
    done = True
    if splits > 1:
        # Partial sums [part, N, M]. The last program of these outputs adds them up, the first part first. A program
        # takes its ticket after all its threads have stored; the last one resets the tickets to 0.
        p_own = p_parts + o_n.to(tl.int64)[:, None] * M + o_m[None, :]
        step = (tl.full((), 0, tl.int64) + N) * M  # N may be a constant
        tl.store(p_own + i_k * step, b_acc, mask=m_nm)
        tl.debug_barrier()
        p_ticket = p_tickets + i_m * tl.num_programs(0) + i_n
        done = tl.atomic_add(p_ticket, 1, sem="acq_rel") == splits - 1
        if done:
            tl.store(p_ticket, 0)
            b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in range(splits):
                # Other programs have written these: the first-level cache may contain old values.
                b_acc += tl.load(p_own + i * step, mask=m_nm, other=0.0, cache_modifier=".cg")
    if done:
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        p_o = p_out + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_nm)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    B, S, K = x.shape
    N, M = weight.shape[0], B * S
    x, weight = dense(x), dense(weight)
    out = outputs(x, weight)
    if out.numel() == 0:
        return out
    settings = configuration(M, x.dtype)
    parts, span = split(N, K)
    columns, rows = triton.cdiv(N, BLOCK_N), triton.cdiv(M, settings["BLOCK_M"])
    sums = torch.empty((parts, N, M) if parts > 1 else (0,), dtype=torch.float32, device=x.device)
    with on_device(x):
        invariant_linear_kernel[(columns, parts, rows)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            out,
            sums,
            tickets(x.device, columns * rows),
            M,
            N,
            K,
            S,
            *x.stride()[:2],
            weight.stride(0),
            span,
            **settings,
        )
    return out
