"""Rows of several adapters through a model's own modules in one forward, by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rgtg_fast.models.adapter import Adapter, LowRank, decoder_layers


class LowRankRows:
    """Hooks by which a model's forward runs each row under its own adapter, or under none.

    From layer `fork` on, every row stands `variants` times next to each other: as it is, then once for each adapter.
    Linear layers compute the product for all rows at once, then each adapter's rows get its correction, in at least
    float32. Outside of `interleaved` and `only` the model works as if there were no hooks; they go with this object.

    Args:
        model: the base model, whose weights stay as they are.
        adapters: one for each variant after the first.
        fork: the first layer that any of them changes.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter], fork: int):
        self.variants = 1 + len(adapters)
        dtype = torch.promote_types(model.dtype, torch.float32)
        # By linear layer: each adapter's correction, None where it leaves the layer alone.
        self._pairs: dict[tuple[int, str], list[LowRank | None]] = {}
        for number, adapter in enumerate(adapters):
            for where, pair in adapter.low_rank.items():
                self._pairs.setdefault(where, [None] * len(adapters))[number] = pair.to(model.device, dtype)
        self._slots = 0
        self._only: int | None = None
        # What layers above the fork get in place of a keyword argument, by the identity of that argument.
        self._spread: dict[int, Any] = {}
        layers = decoder_layers(model)
        # The model may outlive this object: its hooks must not keep the adapters alive.
        me: weakref.ref[LowRankRows] = weakref.ref(self)
        handles = []
        for number, layer in enumerate(layers):
            if number >= fork and self.variants > 1:
                begins = number == fork
                handles.append(
                    layer.register_forward_pre_hook(partial(_enter_layer, me, begins), with_kwargs=True)
                )
        for number, name in self._pairs:
            module = layers[number].get_submodule(name)
            handles.append(module.register_forward_hook(partial(_correct, me, (number, name))))
        weakref.finalize(self, _remove, handles)

    @contextmanager
    def interleaved(self, slots: int) -> Iterator[None]:
        """The forward that follows has `slots` rows, which become slots · variants rows at the fork."""
        self._slots = slots
        try:
            yield
        finally:
            self._slots = 0
            self._spread.clear()

    @contextmanager
    def only(self, variant: int) -> Iterator[None]:
        """All rows of the forward that follows are of one variant."""
        self._only = variant
        try:
            yield
        finally:
            self._only = None

    def enter_layer(
        self, begins: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Repeats the rows where the fork begins, and the positions for every layer from there on."""
        if not self._slots:
            return None
        kwargs = dict(kwargs)
        if begins and args:
            args = (self._repeated(args[0]), *args[1:])
        elif begins:
            kwargs["hidden_states"] = self._repeated(kwargs["hidden_states"])
        for name in ("position_embeddings", "position_ids"):
            given = kwargs.get(name)
            if given is None:
                continue
            if id(given) not in self._spread:
                whole = isinstance(given, torch.Tensor)
                self._spread[id(given)] = (
                    self._repeated(given) if whole else tuple(self._repeated(part) for part in given)
                )
            kwargs[name] = self._spread[id(given)]
        return args, kwargs

    def correct(self, where: tuple[int, str], x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        """Adds the corrections of a linear layer to its output."""
        pairs = self._pairs[where]
        if self._only is not None:
            pair = pairs[self._only - 1] if self._only else None
            return None if pair is None else (out + pair.of(x)).to(out.dtype)
        if not self._slots:
            return None
        rows_in = x.view(self._slots, self.variants, -1, x.shape[-1])
        rows_out = out.view(self._slots, self.variants, -1, out.shape[-1])
        for number, pair in enumerate(pairs):
            if pair is not None:
                rows_out[:, number + 1] += pair.of(rows_in[:, number + 1])
        return None

    def _repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """Every row `variants` times next to each other; what is the same for all rows stays as it is."""
        if rows.shape[0] != self._slots:
            return rows
        return rows.unsqueeze(1).expand(-1, self.variants, *rows.shape[1:]).flatten(0, 1)


def _enter_layer(
    me: weakref.ref[LowRankRows],
    begins: bool,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    rows = me()
    return None if rows is None else rows.enter_layer(begins, args, kwargs)


def _correct(
    me: weakref.ref[LowRankRows],
    where: tuple[int, str],
    module: nn.Module,
    args: tuple[Any, ...],
    out: torch.Tensor,
) -> torch.Tensor | None:
    rows = me()
    return None if rows is None else rows.correct(where, args[0], out)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
