"""Rope with one set of frequencies up to a length and another beyond it (longrope), chosen row by row.

transformers chooses the set by the longest position of a whole batch (`dynamic_rope_update`): rows would influence one
another, and keys cached under one set would meet queries under the other. Here every row follows its own length, as if
it were computed alone and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rgtg_fast.errors import RGTGError


class RowRope:
    """The rotary embedding of a model with longrope, and what its rows need to change from one set to the other.

    A text of at most `original` tokens is computed with the short set in all its positions, a longer one with the long
    set. Within one set the keys of a prefix stay valid. A row whose text crosses the length is computed again, from
    its token ids.

    Args:
        rotary: the model's rotary embedding.
        original: tokens up to which the short set is used.

    Attributes:
        original: as given.
        ids: [slots, tokens + 1] int64, the tokens of each slot's prefix, on the model's device.
        long: for each slot, whether its keys in the cache are those of the long set.
        stepped: [B, S] int64, the tokens of the last step.
        room: tokens that a row may have until `reserve` is called again.
    """

    def __init__(self, rotary: nn.Module, original: int):
        self.original = original
        self.ids = self.stepped = torch.zeros(0, 0, dtype=torch.int64)
        self.long: list[bool] = []
        self.room = 0
        self._rotary, self._own = rotary, rotary.forward
        # The same objects in every forward: compiled blocks are compiled again where a function is another.
        self._forwards: dict[bool | None, Callable[..., Any]] = {
            None: self._by_row,
            False: self._short,
            True: self._long,
        }

    @classmethod
    def of(cls, trunk: nn.Module, limit: int) -> RowRope | None:
        """The longrope of a model without its head; None where it has none, or none of `limit` tokens is beyond it.

        Raises:
            RGTGError: its config asks for longrope and its modules do not have transformers' rotary embedding.
        """
        config: Any = trunk.config
        original = longrope_length(config.get_text_config())
        if original is None or original >= limit:
            return None
        found = [module for module in trunk.modules() if getattr(module, "rope_type", None) == "longrope"]
        if len(found) != 1 or longrope_length(found[0].config) != original:
            raise RGTGError(
                f"its longrope is computed by {len(found)} modules of its own where one is expected: beyond "
                f"{original} tokens it cannot be served (max_length={original} works)"
            )
        return cls(found[0], original)

    # ---- the frequencies --------------------------------------------------------------------------------------------

    @contextmanager
    def chosen(self, long: bool | None) -> Iterator[None]:
        """A context in which a forward uses the set of each row.

        Args:
            long: the set of all rows; None: of each row by its longest position, as a step needs it.
        """
        with self._replaced(self._forwards[long]):
            yield

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        before = vars(self._rotary).get("forward")
        self._rotary.forward = forward
        try:
            yield
        finally:
            if before is None:
                del self._rotary.forward
            else:
                self._rotary.forward = before

    def _short(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """The model's own cos and sin [B, S, D] under the short set; positions beyond it give those of its last."""
        return self._own(x, position_ids=position_ids.clamp_max(self.original - 1))

    def _long(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """The same under the long set: the model chooses it because one more position lies beyond the limit."""
        beyond = position_ids.new_full((len(position_ids), 1), self.original)
        found = self._own(x, position_ids=torch.cat([position_ids, beyond], 1))
        return pytree.tree_map(lambda table: table[:, :-1], found)

    def _by_row(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        long = (position_ids.amax(1) >= self.original)[:, None, None]
        short = self._short(x, position_ids)
        return pytree.tree_map(lambda a, b: torch.where(long, a, b), self._long(x, position_ids), short)

    # ---- the rows ---------------------------------------------------------------------------------------------------

    def is_long(self, length: int) -> bool:
        """Whether a text of `length` tokens is computed with the long set."""
        return length > self.original

    def reserve(self, slots: int, length: int, device: torch.device) -> None:
        """Forgets all rows and makes room for `slots` of `length` tokens."""
        if len(self.ids) < slots or self.ids.shape[1] <= length:
            # One more column: a row that has ended writes behind its last token.
            self.ids = torch.zeros(slots, length + 1, dtype=torch.int64, device=device)
        self.long, self.room = [False] * slots, length

    def write(self, slot: int, start: int, tokens: torch.Tensor) -> None:
        """Tokens [S] follow the first `start` of a slot."""
        self.ids[slot, start : start + len(tokens)] = tokens

    def commit(self, choice: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None) -> None:
        """Token `choice[b]` of the last step follows the prefix of row b, in slot `slots[b]` or b; -1 adds none.

        `lengths` are those of all slots.
        """
        chosen = self.stepped.gather(1, choice.clamp_min(0).unsqueeze(1))
        if slots is not None:
            self.ids[slots, lengths[slots]] = chosen.squeeze(1)
            return
        rows = self.ids[: len(choice)]
        rows.scatter_(1, lengths[: len(choice)].unsqueeze(1), chosen)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""
        self.ids[target] = self.ids[source]
        self.long[target] = self.long[source]

    # ---- verification -----------------------------------------------------------------------------------------------

    @contextmanager
    def shortened(self, original: int) -> Iterator[None]:
        """A context in which the long set begins after `original` tokens, in the model's own forward too.

        All positions are shifted by what is missing to the real length, so that the model itself chooses the set. A
        short text is enough then to compare both.
        """
        kept, own = self.original, self._own

        def shifted(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return own(x, position_ids=position_ids + (kept - original))

        self.original, self._own = original, shifted
        try:
            with self._replaced(shifted):
                yield
        finally:
            self.original, self._own = kept, own


def longrope_length(config: Any) -> int | None:
    """Tokens up to which a text model with one longrope for all layers uses its short set, None for other ropes."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "longrope":
        return None
    original = rope.get("original_max_position_embeddings")
    return original if isinstance(original, int) and original > 0 else None
