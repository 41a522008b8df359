"""SplitCache: a cache whose layers differ in the rows of a slot, or in the tokens that they keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import Cache

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.kv_cache import CachePart, PrefixCache

# Tokens that a row of a sliding window takes before those that no window reaches any more are dropped.
SLACK = 128


def window_slots(window: int, undo: int) -> int:
    """Tokens that a row has room for in a layer with a sliding window.

    Args:
        window: tokens that a token sees, its own included.
        undo: tokens by which the row may be cut back.
    """
    return window - 1 + undo + SLACK


class WindowCache(PrefixCache):
    """Layers with one sliding window, whose rows keep their newest tokens only.

    A row's first slot holds the token at position `starts[slot]` of its prefix, and `lengths` count from there: a token
    sees the same keys in the same order as in a whole prefix, and kernels compute the same bits. Where a row is full,
    the host moves its last `window` - 1 + `undo` tokens to its begin, between two steps.

    Args:
        layers: as in `PrefixCache`, like the next four.
        kv_heads: G.
        head_dim: D.
        dtype: dtype of the buffers.
        device: device of the buffers.
        window: tokens that each token sees, itself included.

    Attributes:
        starts: for each slot, the tokens of its prefix that were dropped.
        dropped: [slots] int64, the same on the device.
    """

    slides = True

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int,
    ):
        super().__init__(layers, kv_heads, head_dim, dtype, device)
        self.window, self.kept = window, 0
        self.starts: list[int] = []
        self.dropped = torch.zeros(0, dtype=torch.int64, device=device)
        self._start = 0
        self._apart = False

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        """Allocates `slots` empty rows of `length` tokens at a time, which can be cut back by `undo` tokens."""
        super().reserve(slots, length)
        self.kept = self.window - 1 + undo
        self.starts = [0] * self.slots
        if len(self.dropped) != self.slots:
            self.dropped = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self.dropped.zero_()

    def is_full(self, slot: int, length: int, new_tokens: int) -> bool:
        """Whether a slot with a prefix of `length` tokens has no room for further ones, and can make some."""
        held = length - self.starts[slot]
        return held + new_tokens > self.max_length and held > self.kept

    def make_room(self, slot: int, length: int) -> None:
        """Drops the tokens of a slot's prefix, of `length` tokens, that no window reaches any more."""
        held = length - self.starts[slot]
        drop = held - self.kept
        for buffer in (self.keys, self.values):
            # What is read and what is written overlap.
            buffer[:, slot, :, : self.kept] = buffer[:, slot, :, drop:held].clone()
        self.starts[slot] += drop
        self.dropped[slot] += drop
        # A row that has ended is shorter than the host counts until it leaves its slot.
        self.lengths[slot] = (self.lengths[slot] - drop).clamp_min(0)

    def begin_prefill(self, slot: int, start: int, new_tokens: int, rows: int = 1) -> None:
        """As `PrefixCache.begin_prefill`; tokens that do not fit into the rows stay apart until it ends."""
        for row in range(slot, slot + rows):
            if self.is_full(row, start, new_tokens):
                self.make_room(row, start)
        self._start, held = start, start - self.starts[slot]
        self._apart = held + new_tokens > self.max_length
        super().begin_prefill(slot, held, 0 if self._apart else new_tokens, rows)
        self._empty_prefix = start == 0
        if self._apart:
            layers, kv_heads, head_dim = self.shape
            size = (2, layers, rows, kv_heads, new_tokens, head_dim)
            self.k_new, self.v_new = torch.empty(size, dtype=self.dtype, device=self.device)

    def end_prefill(self, new_tokens: int) -> None:
        if not self._apart:
            super().end_prefill(new_tokens)
            return
        rows = slice(self._first, self._first + self._rows)
        held, end = self._start - self.starts[self._first], self._start + new_tokens
        new = min(new_tokens, self.kept)
        old = min(held, self.kept - new)
        for buffer, added in ((self.keys, self.k_new), (self.values, self.v_new)):
            if old:
                buffer[:, rows, :, :old] = buffer[:, rows, :, held - old : held].clone()
            buffer[:, rows, :, old : old + new] = added[:, :, :, new_tokens - new :]
        for row in range(rows.start, rows.stop):
            self.starts[row] = end - old - new
        self.dropped[rows].fill_(end - old - new)
        self.lengths[rows].fill_(old + new)
        self.k_new = self.v_new = torch.empty(0)

    def keeps(self, slot: int, length: int) -> bool:
        start = self.starts[slot]
        return start == 0 or length == 0 or length - start >= self.window - 1

    def roll_back(self, slot: int, length: int) -> None:
        if not self.keeps(slot, length):
            raise RGTGError(
                f"a row cannot be cut back to {length} tokens: of its first {self.starts[slot]}, which its windows of "
                f"{self.window} would reach, no keys are kept; reserve it with a larger undo"
            )
        if length == 0:
            self.starts[slot] = 0
            self.dropped[slot].zero_()
        super().roll_back(slot, length - self.starts[slot])

    def move(self, source: int, target: int, length: int) -> None:
        super().move(source, target, length - self.starts[source])
        self.starts[target] = self.starts[source]
        self.dropped[target] = self.dropped[source]

    def buffers(self) -> list[torch.Tensor]:
        return [*super().buffers(), self.dropped]

    def check(self, window: int | None) -> None:
        """Refuses a layer whose window is not that of its config.

        Raises:
            RGTGError: the layer attends tokens that are not kept.
        """
        if not window or window > self.window:
            raise RGTGError(
                f"a layer attends {window or 'all'} tokens and its config has sliding_window={self.window}: set both "
                "alike"
            )

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
        self.check(window)
        return super().attend(layer, query, key, value, scale, window, softcap, sinks)


class _Kind(NamedTuple):
    """How a layer is stored: `branches` rows for a slot, which keep what a `window` reaches, or all where that is 0."""

    branches: int
    window: int


class SplitCache(Cache):
    """A cache in parts: runs of layers that are stored alike.

    Layers from `fork` on have a row for each branch of a model whose forward adapters share; those below are the same
    for the base model and every adapter and have one row per slot. A slot's rows are next to each other, the base
    model's first: row = slot · branches + branch, so that the active slots' rows are a leading slice in all parts.

    Layers with a sliding window drop what it does not reach any more, where that saves memory (`WindowCache`).

    Args:
        layers: as in `PrefixCache`, like the next four.
        kv_heads: G.
        head_dim: D.
        dtype: dtype of the buffers.
        device: device of the buffers.
        fork: the first layer with a row for each branch, 0 to L.
        branches: rows of a slot from there on.
        windows: the sliding window of each layer, 0 for none; empty: none in any.

    Attributes:
        windows: as in `PrefixCache`.
        parts: the parts, in the order of their layers.
        max_length: tokens that a row may reach.
    """

    windows = False

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        fork: int,
        branches: int,
        windows: Sequence[int],
    ):
        super().__init__(layers=[])
        self.max_length = 0
        self._shape, self._place = (kv_heads, head_dim), (dtype, device)
        self._kinds = [_Kind(1 if layer < fork else branches, 0) for layer in range(layers)]
        self._windows = list(windows) or [0] * layers
        self._divide()

    def _divide(self) -> None:
        """Makes the parts, without memory."""
        dtype, device = self._place
        self.parts: list[CachePart] = []
        first = 0
        for (branches, window), run in groupby(self._kinds):
            count = len(list(run))
            if window:
                cache: PrefixCache = WindowCache(count, *self._shape, dtype, device, window)
            else:
                cache = PrefixCache(count, *self._shape, dtype, device)
            self.parts.append(CachePart(first, first + count, branches, cache))
            first += count
        self._by_layer = [part for part in self.parts for _ in range(part.first, part.last)]
        # Parts with one window drop the same tokens at the same time.
        self._sliding: dict[int, list[tuple[int, WindowCache]]] = {}
        for part in self.parts:
            if isinstance(part.cache, WindowCache):
                self._sliding.setdefault(part.cache.window, []).append((part.branches, part.cache))

    @property
    def slides(self) -> bool:
        """As `PrefixCache.slides`."""
        return bool(self._sliding)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each slot's prefix [slots]."""
        part = next((part for part in self.parts if not part.cache.slides), self.parts[0])
        cache = part.cache
        lengths = cache.lengths + cache.dropped if isinstance(cache, WindowCache) else cache.lengths
        return lengths[:: part.branches]

    @property
    def causal(self) -> bool:
        """As `PrefixCache.causal`."""
        return self.parts[-1].cache.causal

    def reserve(self, slots: int, length: int, undo: int = 0) -> None:
        """Empties the cache and allocates `slots` rows of `length` tokens, which can be cut back by `undo` tokens."""
        self.max_length = length
        # A layer that drops tokens goes on to do so, so that buffers are kept.
        kinds = [
            _Kind(kind.branches, window if kind.window or window_slots(window, undo) < length else 0)
            for kind, window in zip(self._kinds, self._windows, strict=True)
        ]
        if kinds != self._kinds:
            self._kinds = kinds
            self._divide()
        for part in self.parts:
            if isinstance(part.cache, WindowCache):
                most = min(length, window_slots(part.cache.window, undo))
                part.cache.reserve(slots * part.branches, most, undo)
            else:
                part.cache.reserve(slots * part.branches, length)

    def row_bytes(self, length: int, undo: int = 0) -> int:
        """Bytes of a row of `length` tokens with all its branches; `undo` as in `reserve`."""
        return self._bytes(
            [min(length, window_slots(window, undo)) if window else length for window in self._windows]
        )

    def prefill_bytes(self, length: int) -> int:
        """Bytes that a prefill of `length` tokens takes besides its row: those of layers that will drop some."""
        return self._bytes(
            [length if window and length > window_slots(window, 0) else 0 for window in self._windows]
        )

    def _bytes(self, tokens: Sequence[int]) -> int:
        """Bytes of so many tokens in each layer, with all its branches."""
        kv_heads, head_dim = self._shape
        rows = sum(kind.branches * count for kind, count in zip(self._kinds, tokens, strict=True))
        return 2 * rows * kv_heads * head_dim * self._place[0].itemsize

    def nbytes(self) -> int:
        """Bytes of the buffers, the undecided tokens' included."""
        return sum(part.cache.nbytes() for part in self.parts)

    def begin_prefill(self, slot: int, start: int, new_tokens: int) -> None:
        """The next forward appends `new_tokens` causal tokens to one slot, whose prefix has `start`."""
        if start + new_tokens > self.max_length:
            raise RGTGError(
                f"{start + new_tokens} tokens exceed the cache ({self.max_length}): raise max_length"
            )
        for part in self.parts:
            part.cache.begin_prefill(slot * part.branches, start, new_tokens, part.branches)

    def make_room(self, slots: Iterable[int], lengths: Sequence[int]) -> None:
        """Makes room for one more token in each of these slots, given the length of every slot's prefix."""
        slots = list(slots)
        for alike in self._sliding.values():
            branches, first = alike[0]
            for slot in slots:
                length = lengths[slot]
                # The host's count of a slot without a row goes on.
                if length >= self.max_length or not first.is_full(slot * branches, length, 1):
                    continue
                for branches_of, cache in alike:
                    for row in range(slot * branches_of, (slot + 1) * branches_of):
                        cache.make_room(row, length)

    def begin_step(
        self,
        rows: int,
        new_tokens: int,
        ancestors: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> None:
        """As `PrefixCache.begin_step`, for the first `rows` slots or those of `slots`, with all their branches."""
        for part in self.parts:
            own = slots
            if slots is not None and part.branches > 1:
                branch = torch.arange(part.branches, device=slots.device)
                own = (slots.unsqueeze(1) * part.branches + branch).flatten()
            part.cache.begin_step(rows * part.branches, new_tokens, ancestors, own)

    def end_prefill(self, new_tokens: int) -> None:
        """Adds the tokens of the prefill to the prefix."""
        for part in self.parts:
            part.cache.end_prefill(new_tokens)

    def keeps(self, slot: int, length: int) -> bool:
        """As `PrefixCache.keeps`."""
        return all(part.cache.keeps(slot * part.branches, length) for part in self.parts)

    def roll_back(self, slot: int, length: int) -> None:
        """Cuts a slot's prefix back to its first `length` tokens."""
        for part in self.parts:
            for branch in range(part.branches):
                part.cache.roll_back(slot * part.branches + branch, length)

    def commit(self, choice: torch.Tensor) -> None:
        """Moves new token `choice[b]` [B] of each slot to its prefix's end, in every layer and branch."""
        for part in self.parts:
            part.cache.commit(choice if part.branches == 1 else choice.repeat_interleave(part.branches))

    def move(self, source: int, target: int, length: int) -> None:
        """Copies one slot's prefix of `length` tokens over another's."""
        for part in self.parts:
            for branch in range(part.branches):
                part.cache.move(source * part.branches + branch, target * part.branches + branch, length)

    # ---- what transformers' blocks call ------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PrefixCache.update`."""
        part = self._by_layer[layer_idx]
        return part.cache.update(key_states, value_states, layer_idx - part.first)

    def attend(self, layer: int, *call: Any) -> torch.Tensor:
        """As `PrefixCache.attend`."""
        part = self._by_layer[layer]
        return part.cache.attend(layer - part.first, *call)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always passed explicitly, since rows differ in length."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(0, 0): no mask is needed, the op masks."""
        return 0, 0

    @property
    def is_compileable(self) -> bool:
        """False: transformers must not wrap this cache in its own compilation."""
        return False
