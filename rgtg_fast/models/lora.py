"""Several LoRA adapters in one forward of a model's own modules, by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rgtg_fast.models.adapter import Adapter, LowRank, decoder_layers
from rgtg_fast.models.fused_projections import SIBLINGS


class Part(NamedTuple):
    """One adapter's correction of one linear layer: columns first..last-1 of the first products, times b [outer, r]."""

    first: int
    last: int
    b: torch.Tensor


class Factors(NamedTuple):
    """The corrections of all adapters to linear layers that read one input.

    Attributes:
        a: [Σ r, inner], the first factors stacked.
        parts: parts of each linear layer, by adapter; None where an adapter does not change it.
    """

    a: torch.Tensor
    parts: tuple[tuple[Part | None, ...], ...]

    @classmethod
    def of(
        cls, corrections: Sequence[Sequence[LowRank | None]], device: torch.device, dtype: torch.dtype
    ) -> Factors:
        """The factors of corrections by linear layer and adapter, at least one of which exists."""
        first, a, parts = 0, [], []
        for pairs in corrections:
            own: list[Part | None] = []
            for pair in pairs:
                if pair is None:
                    own.append(None)
                    continue
                own.append(Part(first, first + len(pair.a), pair.b.to(device, dtype)))
                first += len(pair.a)
                a.append(pair.a)
            parts.append(tuple(own))
        return cls(torch.cat(a).to(device, dtype), tuple(parts))


class LowRankRows:
    """Hooks by which a model's forward runs each row under its own adapter, or under none.

    From layer `fork` on, every row is repeated `branches` times next to each other: as it is, then once for each
    adapter. Linear layers compute the product for all rows at once. So do the first factors of all adapters, once for
    all layers that read the same input; the part of each adapter's rows, times its second factor, is added to those
    rows of the output in place. The factors have the model's dtype.

    Outside of `interleaved` and `only` the hooks do nothing; they are removed with this object. The compiler traces
    through them.

    Args:
        model: the base model, whose weights stay as they are.
        adapters: one for each branch after the first.
        fork: the first layer that any of them changes.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter], fork: int):
        self.branches = 1 + len(adapters)
        layers = decoder_layers(model)
        groups = _groups({where for adapter in adapters for where in adapter.low_rank})
        self._factors = [
            Factors.of(
                [[adapter.low_rank.get((number, name)) for adapter in adapters] for name in names],
                model.device,
                model.dtype,
            )
            for number, names in groups
        ]
        # Of the current forward: its slots and the branches of each, next to each other; empty outside of ours.
        self._slots = 0
        self._running: tuple[int, ...] = ()
        # Shared by the modules of a group: the group's last input with its products. Shared by all layers: repeated
        # arguments.
        self._products: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._repeats: list[tuple[torch.Tensor, torch.Tensor]] = []
        # The model may live longer than this object: its hooks must not keep the adapters alive.
        me: weakref.ref[LowRankRows] = weakref.ref(self)
        handles = []
        for number, layer in enumerate(layers):
            if number >= fork:
                begins = number == fork
                handles.append(
                    layer.register_forward_pre_hook(partial(_enter_layer, me, begins), with_kwargs=True)
                )
        for group, (number, names) in enumerate(groups):
            for index, name in enumerate(names):
                module = layers[number].get_submodule(name)
                handles.append(module.register_forward_hook(partial(_correct, me, group, index)))
        weakref.finalize(self, _remove, handles)

    @contextmanager
    def interleaved(self, slots: int) -> Iterator[None]:
        """A context in which a forward has `slots` rows, which become slots · branches rows at the fork."""
        self._slots, self._running = slots, tuple(range(self.branches))
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def only(self, branch: int) -> Iterator[None]:
        """A context in which all rows of a forward are of one branch."""
        self._slots, self._running = 1, (branch,)
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        self._slots, self._running, self._products, self._repeats = 0, (), None, []

    def enter_layer(
        self, begins: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Repeats the rows at the fork layer, and the positions at every layer from the fork on."""
        if len(self._running) < self.branches:
            return None
        kwargs = dict(kwargs)
        if begins and args:
            args = (self._repeated(args[0]), *args[1:])
        elif begins:
            kwargs["hidden_states"] = self._repeated(kwargs["hidden_states"])
        for name in ("position_embeddings", "position_ids"):
            given = kwargs.get(name)
            if isinstance(given, torch.Tensor):
                kwargs[name] = self._repeated_once(given)
            elif given is not None:
                kwargs[name] = tuple(self._repeated_once(part) for part in given)
        return args, kwargs

    def correct(self, group: int, index: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the corrections of a group's linear layer to its output [..., outer]."""
        if not any(self._running):
            return
        factors = self._factors[group]
        known = self._products
        if known is None or known[0] != group or known[1] is not x:
            known = self._products = (group, x, functional.linear(x, factors.a))
        sizes = (self._slots, len(self._running), -1)
        products, rows = known[2].view(*sizes, len(factors.a)), out.view(*sizes, out.shape[-1])
        for number, branch in enumerate(self._running):
            part = factors.parts[index][branch - 1] if branch else None
            if part is not None:
                b = part.b.T.expand(self._slots, -1, -1)
                _add_product(rows[:, number], products[:, number, :, part.first : part.last], b)

    def _repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """Every row `branches` times next to each other; a tensor that all rows share is returned as it is."""
        if rows.shape[0] != self._slots:
            return rows
        return rows.unsqueeze(1).expand(-1, self.branches, *rows.shape[1:]).flatten(0, 1)

    def _repeated_once(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for an argument of all layers."""
        for given, repeated in self._repeats:
            if given is rows:
                return repeated
        repeated = self._repeated(rows)
        self._repeats.append((rows, repeated))
        return repeated


def _groups(wheres: set[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    """Linear layers, each (layer, name), together with those that read the same input."""
    groups: dict[tuple[int, str, Sequence[str]], list[str]] = {}
    for number, name in sorted(wheres):
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in SIBLINGS if leaf in group), (leaf,))
        groups.setdefault((number, parent, siblings), []).append(name)
    return [(number, names) for (number, _, _), names in groups.items()]


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
    group: int,
    index: int,
    module: nn.Module,
    args: tuple[Any, ...],
    out: torch.Tensor,
) -> None:
    rows = me()
    if rows is not None:
        rows.correct(group, index, args[0], out)


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Adds x·y to `total`, all of them batches of matrices."""
    if torch.compiler.is_compiling():
        # The compiler fuses the sum with its reader.
        total += torch.bmm(x, y)
    else:
        total.baddbmm_(x, y)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
