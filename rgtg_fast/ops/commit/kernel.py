"""Triton kernel of commit: one launch for all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._extension import dense
from .._triton import on_device, power_of_two

# Numbers that one program copies, of the keys and again of the values: with 32 layers, 8 heads and D = 128, 16
# programs of 8 KiB copy a single row, enough loads in flight that the launch takes most of the time.
TILE = 2048


def configuration(D: int) -> dict[str, object]:
    """Block shapes for a head of `D` numbers: one program copies ROWS heads."""
    width = power_of_two(D, 16)
    return {"BLOCK_D": width, "ROWS": max(1, TILE // width), "num_warps": 4, "enable_fp_fusion": False}


# Tickets are counted in bits above those of a length.
TICKET = tl.constexpr(1 << 40)


# Sizes that change from call to call must not compile the kernel anew when they happen to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["stride_lengths", "stride_choice", "N", "LG", "G", "S", "T"])
def commit_kernel(
    p_k_new,
    p_v_new,
    p_k_cache,
    p_v_cache,
    p_lengths,
    p_choice,
    p_slots,
    stride_lengths,
    stride_choice,
    N,
    LG,
    G,
    S,
    T,
    D,
    k_new_l,
    k_new_b,
    k_new_g,
    k_new_s,
    v_new_l,
    v_new_b,
    v_new_g,
    v_new_s,
    k_cache_l,
    k_cache_b,
    k_cache_g,
    k_cache_s,
    v_cache_l,
    v_cache_b,
    v_cache_g,
    v_cache_s,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_b, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    choice = tl.load(p_choice + i_b * stride_choice)
    moves = (choice >= 0) & (choice < S)
    i_c = i_b
    if p_slots is not None:
        i_c = tl.load(p_slots + i_b)
        moves = moves & (i_c >= 0) & (i_c < N)
    if moves:
        # Every program of a row must read the length before one of them increments it. Each takes a ticket by adding
        # to the length's high bits, which reads the length in the same access; the program with the last ticket
        # subtracts all tickets and increments the length.
        p_length = p_lengths + i_c * stride_lengths
        taken = tl.atomic_add(p_length, TICKET)
        length = taken % TICKET
        programs = tl.num_programs(1).to(tl.int64)
        if taken // TICKET == programs - 1:
            tl.atomic_add(p_length, 1 - programs * TICKET)

        # A full cache overwrites its last position, as in the reference; nothing is written outside.
        position = tl.minimum(length, T - 1)
        o_r = i_r * ROWS + tl.arange(0, ROWS)
        o_l, o_g = (o_r // G).to(tl.int64)[:, None], (o_r % G).to(tl.int64)[:, None]
        o_d = tl.arange(0, BLOCK_D)[None, :]
        m_rd = (o_r < LG)[:, None] & (o_d < D)

        o_k = o_l * k_new_l + i_b * k_new_b + o_g * k_new_g + choice * k_new_s + o_d
        o_v = o_l * v_new_l + i_b * v_new_b + o_g * v_new_g + choice * v_new_s + o_d
        b_k = tl.load(p_k_new + o_k, mask=m_rd, other=0)
        b_v = tl.load(p_v_new + o_v, mask=m_rd, other=0)
        o_k = o_l * k_cache_l + i_c * k_cache_b + o_g * k_cache_g + position * k_cache_s + o_d
        o_v = o_l * v_cache_l + i_c * v_cache_b + o_g * v_cache_g + position * v_cache_s + o_d
        tl.store(p_k_cache + o_k, b_k, mask=m_rd)
        tl.store(p_v_cache + o_v, b_v, mask=m_rd)


def launch(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    choice: torch.Tensor,
    slots: torch.Tensor | None,
) -> None:
    L, B, G, S, D = k_new.shape
    T = k_cache.shape[3]
    if B == 0 or T == 0:
        return
    k_new, v_new = dense(k_new), dense(v_new)
    slots = None if slots is None else slots.contiguous()
    settings = configuration(D)
    with on_device(k_new):
        # At least one program per row, so that a length grows even where there is nothing to copy.
        commit_kernel[(B, max(1, triton.cdiv(L * G, settings["ROWS"])))](
            k_new,
            v_new,
            k_cache,
            v_cache,
            lengths,
            choice,
            slots,
            lengths.stride(0),
            choice.stride(0),
            None if slots is None else k_cache.shape[1],
            L * G,
            G,
            S,
            T,
            D,
            *k_new.stride()[:4],
            *v_new.stride()[:4],
            *k_cache.stride()[:4],
            *v_cache.stride()[:4],
            **settings,
        )
