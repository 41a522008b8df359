"""Packs preference pairs into rows and runs a causal model on them: every prefix of both answers in one forward.

A row is [x¹ | y¹ʷ | y¹ˡ | x² | y²ʷ | y²ˡ | …]. Both answers of a pair attend to its prompt and to themselves, never to
each other or to another pair, and both count positions from the end of the prompt, so that each token's hidden state
is the one of a forward over x∘y alone (the loss of arXiv 2406.07780 without its one row per prefix).
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.attention import NAME as PREFIX
from rgtg_fast.models.attention import PACKED, prefix_attention, prefix_mask
from rgtg_fast.training.data import TokenizedPair

# Arguments by which a model asks for attention that is not plain softmax(QK^T)V.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
_PROMPT, _CHOSEN, _REJECTED = 0, 1, 2
# Tokens up to which a sequence's scores are kept whole.
_SHORT = 768


def cost(pair: TokenizedPair, eos_padding: bool = False) -> int:
    """Tokens that a pair takes in a row: prompt, chosen and rejected answer.

    Args:
        eos_padding: the shorter answer is padded to the longer one's length.
    """
    chosen, rejected = len(pair.chosen_ids), len(pair.rejected_ids)
    answers = 2 * max(chosen, rejected) if eos_padding else chosen + rejected
    return len(pair.prompt_ids) + answers


def pack(pairs: Sequence[TokenizedPair], budget: int, eos_padding: bool = False) -> list[list[int]]:
    """Packs pairs into rows of at most `budget` tokens: the longest first, each into the fullest row that holds it.

    Returns:
        Indices into `pairs`, one list a row; every pair is in exactly one row.

    Raises:
        RGTGError: a pair is longer than the budget.
    """
    costs = [cost(pair, eos_padding) for pair in pairs]
    rows: list[list[int]] = []
    # (tokens free, row), ascending: the first that is large enough is the fullest row.
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: -costs[i]):
        size = costs[index]
        if size > budget:
            raise RGTGError(
                f"pair {pairs[index].index} has {size} tokens and a row holds {budget}: "
                f"use a token budget of at least {max(costs)} or a smaller max_length"
            )
        place = bisect.bisect_left(free, (size, -1))
        if place == len(free):
            left, row = budget, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(index)
        bisect.insort(free, (left - size, row))
    return rows


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed pairs.

    Attributes:
        input_ids: [R, S] i64, padded on the right.
        position_ids: [R, S] i64; both answers of a pair count from the end of its prompt, padding is at 0.
        spans: [N, 5] i64: row, start of the prompt, start of the chosen answer, start of the rejected one, end; pairs
            lie in a row one after the other from column 0.
        pairs: indices of the N pairs in the sequence that `collate` was given.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: torch.Tensor
    pairs: list[int]

    @property
    def filled(self) -> float:
        """Share of the R·S tokens that are no padding."""
        return float((self.spans[:, 4] - self.spans[:, 1]).sum()) / self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            spans=self.spans.to(device),
        )


def collate(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[Sequence[int]],
    pad_id: int,
    length: int | None = None,
    eos_padding: bool = False,
) -> PackedBatch:
    """Lays packed pairs out as one batch.

    Args:
        rows: indices into `pairs`, one sequence a row, as `pack` gives them.
        pad_id: id of the tokens after a row's last pair.
        length: S; None for the longest row.
        eos_padding: the shorter answer is padded with EOS, its own last token, to the longer one's length (PARGS's
            published data).

    Raises:
        RGTGError: no rows, or a row longer than `length`.
    """
    used = [sum(cost(pairs[i], eos_padding) for i in row) for row in rows]
    if not used or not min(used):
        raise RGTGError("there is no pair in a row: pass rows of at least one pair each")
    size = max(used) if length is None else length
    if max(used) > size:
        raise RGTGError(f"a row has {max(used)} tokens and length={size}: pack with this budget")
    input_ids = torch.full((len(rows), size), pad_id, dtype=torch.long)
    position_ids = torch.zeros(len(rows), size, dtype=torch.long)
    spans: list[tuple[int, int, int, int, int]] = []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            prompt, chosen, rejected = pairs[i].prompt_ids, pairs[i].chosen_ids, pairs[i].rejected_ids
            if eos_padding:
                longer = max(len(chosen), len(rejected))
                chosen = [*chosen, *chosen[-1:] * (longer - len(chosen))]
                rejected = [*rejected, *rejected[-1:] * (longer - len(rejected))]
            first, second = start + len(prompt), start + len(prompt) + len(chosen)
            end = second + len(rejected)
            input_ids[r, start:end] = torch.tensor([*prompt, *chosen, *rejected])
            position_ids[r, start:second] = torch.arange(second - start)
            position_ids[r, second:end] = torch.arange(len(prompt), len(prompt) + len(rejected))
            spans.append((r, start, first, second, end))
            start = end
    return PackedBatch(input_ids, position_ids, torch.tensor(spans), [i for row in rows for i in row])


def answer_positions(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the answers' tokens stand in the rows.

    Returns:
        rows [M] and columns [M] of all M answer tokens in the order chosen_0, rejected_0, chosen_1, …, and
        offsets [2N+1], where each answer begins among them; all i64.
    """
    row, _, chosen, rejected, end = batch.spans.unbind(1)
    starts = torch.stack([chosen, rejected], 1).flatten()
    lengths = torch.stack([rejected - chosen, end - rejected], 1).flatten()
    offsets = functional.pad(lengths.cumsum(0), (1, 0))
    rows = row.repeat_interleave(2).repeat_interleave(lengths)
    within = torch.arange(len(rows), device=rows.device) - offsets[:-1].repeat_interleave(lengths)
    return rows, starts.repeat_interleave(lengths) + within, offsets


def preceding_positions(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the answers' tokens stand in the rows, and the tokens from which they are predicted.

    Returns:
        rows [M] and columns [M] as in `answer_positions`, and the columns [M] of the tokens before: the first token of
        either answer follows the prompt's last.
    """
    rows, columns, offsets = answer_positions(batch)
    before = columns - 1
    before[offsets[:-1]] = (batch.spans[:, 2] - 1).repeat_interleave(2)
    return rows, columns, before


class Packing:
    """What the attention of a packed batch needs, made once a batch and handed to the forward as `packing`.

    Args:
        spans: [N, 5] i64 as in `PackedBatch`.
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
        """Additive mask [answer, prompt + answer] of an answer's tokens, which see the prompt and those before."""
        key = (answer, prompt, like.dtype)
        if key not in self._masks:
            size, device = (answer, prompt + answer), like.device
            hidden = torch.ones(size, dtype=torch.bool, device=device).triu(prompt + 1)
            zeros = torch.zeros(size, dtype=like.dtype, device=device)
            self._masks[key] = zeros.masked_fill_(hidden, float("-inf"))
        return self._masks[key]

    def mask_mod(self) -> Any:
        """The mask as flex_attention takes it: a function of (row, head, query column, key column).

        Padding forms a segment of its own, so that no query is without a key.
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
    """Attention [R, S, H, D] within the pairs of a packed batch; without `packing`, what `prefix_attention` gives."""
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
    # Triton's kernels know no float64.
    if query.is_cuda and query.dtype != torch.float64:
        out = _flex(query, key, value, packing, scaling, dropout)
    else:
        out = _per_pair(query, key, value, packing, scaling, dropout)
    return out.transpose(1, 2), None


# Here, since `prefix_attention` too hands packed forwards over.
AttentionInterface.register(PACKED, packed_attention)
# For forwards without `packing`; a packed one passes its mask by (see `forward_arguments`).
AttentionMaskInterface.register(PACKED, prefix_mask)


class _ShortAttention(torch.autograd.Function):
    """Attention of one short sequence in bfloat16, its scores kept for the backward pass.

    softmax(scale · q kᵀ + mask) v with queries q [H, n, D], keys and values [G, m, D], mask [n, m]. On a CPU the
    matrix products run at several times the speed of SDPA's bfloat16 kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        (heads, n, size), (groups, m) = q.shape, k.shape[:2]
        ctx.scale = size**-0.5 if scale is None else scale
        # Autocast would compute the softmax in float32; the kernel does so inside, row by row.
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
    # Splits and their backward, a concatenation, touch every token once; slices would each write a whole zero gradient.
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
    """flex_attention as a fused kernel: uncompiled it would store all S² scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # pyright: ignore[reportReturnType]


def use_packed_attention(model: nn.Module) -> None:
    """Makes the model's blocks call `packed_attention`; forwards without `packing` stay what they were.

    Raises:
        RGTGError: the model's attention cannot be replaced.
    """
    inner = pretrained(model)
    if not inner._supports_attention_backend:
        raise RGTGError(f"{type(inner).__name__} cannot run packed rows: its attention cannot be replaced")
    inner.set_attn_implementation(PACKED)


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a wrapper such as peft's or DistributedDataParallel, or the model itself."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise RGTGError(f"{type(model).__name__} holds no transformers model: pass one")


def forward_arguments(trunk: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of a trunk's forward over a packed batch, all but the tokens themselves.

    Add `input_ids`, or `inputs_embeds` for a trunk without its lower layers.
    """
    # Another attention, which its owner may have set since, would not know of the pairs.
    if trunk.config._attn_implementation not in (PACKED, PREFIX):
        use_packed_attention(trunk)
    return {
        "position_ids": batch.position_ids,
        # Any 4-D mask is taken as made already, so that no [S, S] mask is built; packed_attention does not read it.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=trunk.dtype, device=batch.input_ids.device),
        "packing": Packing(batch.spans, (batch.input_ids.shape[0], batch.input_ids.shape[1])),
        "use_cache": False,
    }


def packed_hidden(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [R, S, E] after the final norm.

    Args:
        model: with `use_packed_attention`; a wrapper around it may be passed.
    """
    trunk: Any = pretrained(model).base_model
    return trunk(input_ids=batch.input_ids, **forward_arguments(trunk, batch)).last_hidden_state


def packed_rewards(model: nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards r(x, y_{1:i}) of every prefix of both answers of all pairs.

    Returns:
        rewards [M], float32 or the model's wider dtype, in the order chosen_0, rejected_0, chosen_1, …, and offsets
        [2N+1] i64, where each answer begins; an answer's last reward is that of the whole answer with EOS.

    Raises:
        RGTGError: no score head with one label.
    """
    head = dict(pretrained(model).named_children()).get("score")
    if head is None:
        raise RGTGError(
            f"{type(pretrained(model)).__name__} has no `score` head over a causal trunk: "
            "use AutoModelForSequenceClassification with num_labels=1"
        )
    hidden = packed_hidden(model, batch)
    rows, columns, offsets = answer_positions(batch)
    rewards = head(hidden[rows, columns])
    if rewards.shape[-1] != 1:
        raise RGTGError(
            f"the score head gives {rewards.shape[-1]} labels and a reward is 1: use num_labels=1"
        )
    rewards = rewards[:, 0]
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32)), offsets
