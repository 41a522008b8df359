"""Attention within the pairs of packed rows: both answers of a pair see its prompt and themselves, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.attention import PACKED, prefix_attention, prefix_mask

# Arguments by which a model asks for attention that is not plain softmax(QK^T)V.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
_PROMPT, _CHOSEN, _REJECTED = 0, 1, 2
# Longest sequence whose scores are stored for the backward pass, in tokens.
_SHORT = 768


class Packing:
    """What attention on a packed batch needs to know; made once per batch and passed to the forward as `packing`.

    Args:
        spans: [N, 5] int64, as in `PackedBatch`.
        shape: (R, S).
    """

    def __init__(self, spans: torch.Tensor, shape: tuple[int, int]):
        self.spans, self.shape = spans, shape
        self._segments: list[list[tuple[int, int, int]]] | None = None
        self._masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._block_mask: Any = None
        self._longest: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longer answer."""
        if self._longest is None:
            _, start, chosen, rejected, end = self.spans.unbind(1)
            answers = torch.maximum(rejected - chosen, end - rejected)
            self._longest = int((chosen - start + answers).max())
        return self._longest

    @property
    def segments(self) -> list[list[tuple[int, int, int]]]:
        """For each row, the lengths (prompt, chosen, rejected) of its pairs in order."""
        if self._segments is None:
            self._segments = [[] for _ in range(self.shape[0])]
            for row, start, chosen, rejected, end in self.spans.tolist():
                self._segments[row].append((chosen - start, rejected - chosen, end - rejected))
        return self._segments

    def mask(self, answer: int, prompt: int, like: torch.Tensor) -> torch.Tensor:
        """Additive causal mask [answer, prompt + answer] of an answer's tokens over the prompt and themselves."""
        key = (answer, prompt, like.dtype)
        if key not in self._masks:
            size, device = (answer, prompt + answer), like.device
            hidden = torch.ones(size, dtype=torch.bool, device=device).triu(prompt + 1)
            zeros = torch.zeros(size, dtype=like.dtype, device=device)
            self._masks[key] = zeros.masked_fill_(hidden, float("-inf"))
        return self._masks[key]

    def mask_mod(self) -> Any:
        """The mask for flex_attention: a function of (row, head, query column, key column).

        Padding is a segment of its own, so that every query has a key.
        """
        rows, size = self.shape
        device = self.spans.device
        columns = torch.arange(size, device=device)
        segment = torch.full((rows, size), -1, dtype=torch.int32, device=device)
        part = torch.zeros(rows, size, dtype=torch.int32, device=device)
        row, start, chosen, rejected, end = self.spans[:, :, None].unbind(1)
        number = torch.arange(len(self.spans), dtype=torch.int32, device=device)[:, None]
        inside = (columns >= start) & (columns < end)
        at = (row.expand_as(inside)[inside], columns.expand_as(inside)[inside])
        segment[at] = number.expand_as(inside)[inside]
        parts = (columns >= chosen).int() * _CHOSEN + (columns >= rejected).int() * (_REJECTED - _CHOSEN)
        part[at] = parts[inside]

        def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
            together = segment[b, q] == segment[b, kv]
            seen = (part[b, kv] == _PROMPT) | (part[b, kv] == part[b, q])
            return (kv <= q) & together & seen

        return mask_mod

    def block_mask(self) -> Any:
        """The BlockMask of flex_attention."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            rows, size = self.shape
            self._block_mask = create_block_mask(
                self.mask_mod(), B=rows, H=None, Q_LEN=size, KV_LEN=size, device=self.spans.device
            )
        return self._block_mask


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,  # [R, H, S, D]
    key: torch.Tensor,  # [R, G, S, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [R, S, H, D] within the pairs of a packed batch; without `packing`, that of `prefix_attention`."""
    if packing is None:
        return prefix_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise RGTGError(
                f"{type(module).__name__} asks for {name} in its attention, which packed rows do not compute: "
                "use a model with plain attention (Llama, Qwen2, Qwen3, Mistral, Gemma, Phi, GPT-NeoX, OPT, GPT-2)"
            )
    window = kwargs.get("sliding_window")
    if window is not None and packing.longest > window:
        raise RGTGError(
            f"a prompt with its answer has {packing.longest} tokens and {type(module).__name__} attends a window of "
            f"{window}: use max_length={window}"
        )
    # Triton's kernels do not support float64.
    if query.is_cuda and query.dtype != torch.float64:
        out = _flex(query, key, value, packing, scaling, dropout)
    else:
        out = _per_pair(query, key, value, packing, scaling, dropout)
    return out.transpose(1, 2), None


# Registered here, since `prefix_attention` also delegates packed forwards to the name PACKED.
AttentionInterface.register(PACKED, packed_attention)
# For forwards without `packing`; packed ones do not read their mask (see `forward_arguments`).
AttentionMaskInterface.register(PACKED, prefix_mask)


class _ShortAttention(torch.autograd.Function):
    """Attention of one short sequence in bfloat16; the backward pass reuses the stored softmax.

    softmax(scale · q kᵀ + mask) v with queries q [H, n, D], keys and values [G, m, D] and mask [n, m]. On a CPU these
    matrix products are several times as fast as SDPA's bfloat16 kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        (heads, n, size), (groups, m) = q.shape, k.shape[:2]
        ctx.scale = size**-0.5 if scale is None else scale
        # Autocast would store a float32 softmax; the kernel computes in float32 internally, row by row.
        with torch.autocast("cpu", enabled=False):
            scaled = (q * ctx.scale).reshape(groups, -1, size)
            scores = torch.bmm(scaled, k.transpose(1, 2)).view(groups, -1, n, m)
            weights = torch.softmax(scores.add_(mask), -1).view(groups, -1, m)
            ctx.save_for_backward(scaled, k, v, weights)
            return torch.bmm(weights, v).view(heads, n, size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled, k, v, weights = ctx.saved_tensors
        heads, n, size = grad.shape
        grad = grad.reshape(scaled.shape)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_scores = torch._softmax_backward_data(
            torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype
        )
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale).view(heads, n, size)
        return grad_q, torch.bmm(grad_scores.transpose(1, 2), scaled), grad_v, None, None


def _per_pair(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Each pair by itself: prompt and chosen answer are one causal sequence, the rejected one's queries a second."""
    gqa = query.shape[1] != key.shape[1]
    dtype = query.dtype
    short = value.dtype == torch.bfloat16 and dropout == 0 and packing.longest <= _SHORT
    # Sequences too long for that are computed in float32: the backward of PyTorch's CPU kernel is slow in bfloat16.
    wide = value.dtype if short else torch.promote_types(dtype, torch.float32)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    rows = []
    # split and its backward, cat, touch every token once; each slice's backward would write a full gradient of zeros.
    for q, k, v, pairs in zip(query.unbind(), key.unbind(), value.unbind(), packing.segments, strict=True):
        sizes = [size for prompt, chosen, rejected in pairs for size in (prompt + chosen, rejected)]
        rest = q.shape[1] - sum(sizes)
        qs, ks, vs = (x.split([*sizes, rest], dim=1) for x in (q, k, v))
        out: list[torch.Tensor] = []
        for i, (prompt, chosen, rejected) in enumerate(pairs):
            first, second = 2 * i, 2 * i + 1
            keys = torch.cat([ks[first][:, :prompt], ks[second]], dim=1)
            values = torch.cat([vs[first][:, :prompt], vs[second]], dim=1)
            if short:
                mask = packing.mask(prompt + chosen, 0, v)
                out.append(_ShortAttention.apply(qs[first], ks[first], vs[first], mask, scale))
                mask = packing.mask(rejected, prompt, v)
                out.append(_ShortAttention.apply(qs[second], keys, values, mask, scale))
                continue
            out.append(
                functional.scaled_dot_product_attention(
                    qs[first][None],
                    ks[first][None],
                    vs[first][None],
                    dropout_p=dropout,
                    is_causal=True,
                    scale=scale,
                    enable_gqa=gqa,
                )[0]
            )
            out.append(
                functional.scaled_dot_product_attention(
                    qs[second][None],
                    keys[None],
                    values[None],
                    attn_mask=packing.mask(rejected, prompt, q),
                    dropout_p=dropout,
                    scale=scale,
                    enable_gqa=gqa,
                )[0]
            )
        out.append(torch.zeros_like(qs[-1]))
        rows.append(torch.cat(out, dim=1))
    return torch.stack(rows).to(dtype)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    if dropout > 0:
        raise RGTGError(
            f"attention dropout {dropout} is not available for packed rows on CUDA: set the config's "
            "attention dropout to 0"
        )
    gqa = query.shape[1] != key.shape[1]
    attend = _compiled_flex_attention()
    return attend(query, key, value, block_mask=packing.block_mask(), scale=scale, enable_gqa=gqa)


@functools.cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """flex_attention as a fused kernel; uncompiled, it would store all S² scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # pyright: ignore[reportReturnType]
