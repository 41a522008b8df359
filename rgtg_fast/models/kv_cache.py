"""PrefixCache: one static KV cache per model, shared by all candidates of a row."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import cache as memoized
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.device import to_device
from rgtg_fast.ops import commit, tree_attention


@memoized
def cache_keyword(kind: type[nn.Module]) -> str:
    """The argument by which a class of transformers models takes its cache.

    It is `cache` from transformers 5.24 on, and `past_key_values` before and in models whose own code is older.
    """
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


class Slots(NamedTuple):
    """The slots of the rows of a step, in the order of the batch and all different.

    Attributes:
        host: the slots.
        index: [B] int64, the same on the device.
    """

    host: list[int]
    index: torch.Tensor

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device) -> Slots:
        """Slots as a step takes them."""
        return cls(list(slots), to_device(list(slots), torch.int64, device))


class CachePart(NamedTuple):
    """Layers first..last-1, whose cache has `branches` rows for each slot."""

    first: int
    last: int
    branches: int
    cache: PrefixCache


class PrefixCache(Cache):
    """Keys and values of each row's prefix, and of new tokens that are not decided yet.

    `keys` and `values` are [L, slots, G, T_max, D]. Row b of a batch of n rows lives in slot b, so that the n active
    rows are a leading slice, or in the slot that the step names (`Slots`). A forward writes the keys and values of its
    new tokens beside the prefix (`k_new`, `v_new`: [L, n, G, S, D]); `commit` moves the chosen one to the prefix's end.
    The prefix is never copied per candidate and never computed again.

    Args:
        layers: L.
        kv_heads: G.
        head_dim: D.
        dtype: dtype of the buffers.
        device: device of the buffers.

    Attributes:
        windows: whether layers may have sliding windows shorter than a row: those of the model have been verified.
        slides: whether rows lose tokens that no window reaches any more.
        slots_of_rows: [n] int64, the slots of the rows of the step that has begun; None: its rows are a slice.
    """

    windows = False
    slides = False
    slots_of_rows: torch.Tensor | None = None

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.shape = (layers, kv_heads, head_dim)
        self.dtype, self.device = dtype, device
        self.slots = self.max_length = 0
        self.keys = self.values = torch.empty(0)
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)  # [slots]
        self.k_new = self.v_new = torch.empty(0)
        self._scratch = torch.empty(0, dtype=dtype, device=device)
        self._first = self._rows = 0
        self._causal = self._empty_prefix = False
        self._ancestors: torch.Tensor | None = None

    # ---- memory -----------------------------------------------------------------------------------------------

    def row_bytes(self, length: int, undo: int = 0) -> int:
        """Bytes of a row of `length` tokens: 2·L·G·D·bytes each."""
        layers, kv_heads, head_dim = self.shape
        return 2 * layers * kv_heads * head_dim * length * self.dtype.itemsize

    def prefill_bytes(self, length: int) -> int:
        """Bytes that a prefill of `length` tokens takes besides its row."""
        return 0

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        """Allocates `slots` empty rows of `length` tokens; buffers that are large enough are kept.

        A row can be cut back by any number of tokens, not by `undo` alone.
        """
        if slots > self.slots or length > self.max_length:
            layers, kv_heads, head_dim = self.shape
            # Exactly these sizes: the maximum of both calls in each dimension could be far more than either needs.
            self.slots, self.max_length = slots, length
            size = (layers, self.slots, kv_heads, self.max_length, head_dim)
            self.keys = self.values = torch.empty(0)  # freed first: old and new buffers need not fit at once
            self.keys = torch.empty(size, dtype=self.dtype, device=self.device)
            self.values = torch.empty(size, dtype=self.dtype, device=self.device)
            self.lengths = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
            for buffer in (self.keys, self.values):
                # Compiled blocks are not recompiled for a larger cache: only our ops read these sizes.
                torch._dynamo.maybe_mark_dynamic(buffer, 1)
                torch._dynamo.maybe_mark_dynamic(buffer, 3)
            torch._dynamo.maybe_mark_dynamic(self.lengths, 0)
        self.lengths.zero_()

    def nbytes(self) -> int:
        """Bytes of the buffers, the undecided tokens' included."""
        return self.keys.nbytes + self.values.nbytes + self._scratch.nbytes

    # ---- the two kinds of forward -----------------------------------------------------------------------------

    def begin_prefill(self, slot: int, start: int, new_tokens: int, rows: int = 1) -> None:
        """The next forward appends `new_tokens` causal tokens to `rows` slots from `slot` on, which have `start`."""
        if start + new_tokens > self.max_length:
            raise RGTGError(
                f"{start + new_tokens} tokens exceed the cache ({self.max_length}): raise max_length"
            )
        window = slice(start, start + new_tokens)
        self._first, self._rows, self._causal, self._ancestors = slot, rows, True, None
        self.slots_of_rows = None
        self._empty_prefix = start == 0
        self.k_new = self.keys[:, slot : slot + rows, :, window]
        self.v_new = self.values[:, slot : slot + rows, :, window]

    def begin_step(
        self,
        rows: int,
        new_tokens: int,
        ancestors: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> None:
        """The next forward runs `new_tokens` undecided tokens for each of `rows` rows.

        Args:
            rows: n.
            new_tokens: S.
            ancestors: [n, S] int64, as in `tree_attention`.
            slots: [n] int64, the slot of each row; None: the first n.
        """
        layers, kv_heads, head_dim = self.shape
        self._first, self._rows, self._causal, self._ancestors = 0, rows, False, ancestors
        self.slots_of_rows = slots
        self._empty_prefix = False
        count = 2 * layers * rows * kv_heads * new_tokens * head_dim
        if self._scratch.numel() < count:
            self._scratch = torch.empty(count, dtype=self.dtype, device=self.device)
        self.k_new, self.v_new = self._scratch[:count].view(2, layers, rows, kv_heads, new_tokens, head_dim)

    @property
    def active(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys [L, n, G, T_max, D], values and lengths [n] of the rows of the forward that has begun.

        With `slots_of_rows` those of all slots.
        """
        if self.slots_of_rows is not None:
            return self.keys, self.values, self.lengths
        rows = slice(self._first, self._first + self._rows)
        return self.keys[:, rows], self.values[:, rows], self.lengths[rows]

    @property
    def causal(self) -> bool:
        """Whether the new tokens see one another causally (a prefill) or not at all (candidates)."""
        return self._causal

    @property
    def ancestors(self) -> torch.Tensor | None:
        """Bit masks [n, S] of the new tokens that each new token sees, where they form a tree."""
        return self._ancestors

    def end_prefill(self, new_tokens: int) -> None:
        """Adds the tokens of the prefill to the prefix."""
        self.lengths[self._first : self._first + self._rows] += new_tokens

    def make_room(self, slots: Iterable[int], lengths: Sequence[int]) -> None:
        """Nothing: rows have room for all their tokens."""

    def keeps(self, slot: int, length: int) -> bool:
        """Whether a slot can be cut back to its first `length` tokens."""
        return True

    def roll_back(self, slot: int, length: int) -> None:
        """Cuts a slot's prefix back to its first `length` tokens."""
        self.lengths[slot].fill_(length)

    def commit(self, choice: torch.Tensor) -> None:
        """Moves new token `choice[b]` of each row to its prefix's end, in every layer; -1 leaves a row as it is."""
        keys, values, lengths = self.active
        commit(self.k_new, self.v_new, keys, values, lengths, choice, self.slots_of_rows)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies one slot's prefix of `length` tokens over another's: the last row takes a finished row's slot."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.lengths[target] = self.lengths[source]

    def buffers(self) -> list[torch.Tensor]:
        """The memory of the prefixes' keys and values."""
        return [self.keys, self.values]

    @property
    def parts(self) -> list[CachePart]:
        """The model's layers with the cache that holds them: one part, all layers."""
        return [CachePart(0, self.shape[0], 1, self)]

    # ---- what transformers' blocks call ------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new tokens' keys and values [B, G, S, D] and returns them alone: the op reads the prefix."""
        self.k_new[layer_idx].copy_(key_states)
        self.v_new[layer_idx].copy_(value_states)
        return key_states, value_states

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention [B, H, S, D] of the new tokens over their prefix and the new tokens they may see.

        Args:
            layer: the layer, whose keys and values `update` has stored.
            query: [B, H, S, D].
            key: [B, G, S, D], of the new tokens.
            value: [B, G, S, D].
            scale: factor of the scores.
            window: tokens that each token sees, itself included; None for its whole prefix.
            softcap: c of scores c·tanh(score/c), None for plain ones.
            sinks: [H], a further logit in the denominator of each head's softmax.
        """
        plain = self._causal and self._empty_prefix and softcap is None and sinks is None
        if plain and (window is None or query.shape[2] <= window):
            grouped = query.shape[1] != key.shape[1]
            return functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
            )
        keys, values, lengths = self.active
        return tree_attention(
            query,
            key,
            value,
            keys[layer],
            values[layer],
            lengths,
            self._ancestors,
            scale,
            causal=self._causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
            slots=self.slots_of_rows,
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always passed explicitly, since rows differ in length."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(0, 0): no mask is needed, the op masks."""
        return 0, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Tokens that fit in a slot."""
        return self.max_length

    @property
    def is_compileable(self) -> bool:
        """False: transformers must not wrap this cache in its own compilation."""
        return False
