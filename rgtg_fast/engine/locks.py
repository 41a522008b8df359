"""Who may change the state of models and guides: one thread at a time, and one run until a newer one begins.

A run writes into the prefix caches of its models and the rows of its guide, and borrows the models' modules for the
length of a forward. Both may be reached by other ways: other threads, other decoders, a guide's own function.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.owner_changes import Served
from rgtg_fast.rewards.base import Reward

Item = TypeVar("Item")


class _Turn:
    """Of one object: its lock, whether somebody is at it, and the run that its state belongs to."""

    def __init__(self, number: int):
        self.number = number
        self.lock = threading.RLock()
        self.busy = False
        self.run: object = None


# By the objects' identities: a lock kept in a model would keep it from being copied.
_turns: dict[int, _Turn] = {}
_numbers = itertools.count()
_making = threading.Lock()


def _turn(thing: object) -> _Turn:
    with _making:
        found = _turns.get(id(thing))
        if found is None:
            found = _turns[id(thing)] = _Turn(next(_numbers))
            weakref.finalize(thing, _turns.pop, id(thing), None).atexit = False
        return found


def _after_fork() -> None:
    """In a child process no other thread is left to give a lock back."""
    global _making
    _making = threading.Lock()
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Turns:
    """The right to use a base model and a guide.

    Args:
        lm: the base model. reward: the guide, bound to it. binding: how, for when another decoder has taken it over.
    """

    def __init__(self, lm: LanguageModel, reward: Reward | None, binding: dict[str, Any]):
        self._lm, self._reward, self._binding = lm, reward, binding
        self._backbones = [lm.runner, *([] if reward is None else reward.models())]
        # Caches and guides hold the rows of one run; models and tokenizers hold nothing between two forwards.
        self._stateful = [lm.runner, *([] if reward is None else reward.stateful())]
        own = [lm.runner.model, *([] if lm.tokenizer is None else [lm.tokenizer])]
        self._shared = [*own, *([] if reward is None else reward.loaded())]

    def served(self) -> Served:
        """What makes the models compute what decoding needs."""
        models = [thing for thing in self._shared if isinstance(thing, nn.Module)]
        return Served(models, [each.model for each in self._backbones if each.engine == "transformers"])

    @contextmanager
    def taken(self, served: Served | None = None) -> Iterator[None]:
        """Within, no other thread uses any of it, and forwards compute what decoding needs.

        Other threads wait. Locks are taken in one order everywhere, so that two decoders cannot wait for each other.

        Args:
            served: as `served` gave it before; looked up anew by default.

        Raises:
            RGTGError: this thread is in the middle of a step already: a guide's own code has called the decoder.
        """
        stateful = [_turn(thing) for thing in self._stateful]
        turns = {turn.number: turn for turn in [*stateful, *map(_turn, self._shared)]}
        with ExitStack() as stack:
            for number in sorted(turns):
                stack.enter_context(turns[number].lock)
            if any(turn.busy for turn in stateful):
                raise RGTGError(
                    "this decoder was called again from within its own step, by its reward: call another decoder there"
                )
            for turn in stateful:
                turn.busy = True
                stack.callback(setattr, turn, "busy", False)
            stack.enter_context(torch.inference_mode())
            stack.enter_context((served or self.served())())
            yield

    def begin(self) -> None:
        """The guide is bound to this base model, and the models are what they were when they were loaded.

        Raises:
            RGTGError: it cannot be so.
        """
        guide = self._reward
        if guide is not None and any(part.bound_to is not self._lm for part in guide.stateful()):
            if guide.models() or guide.trunk is not None:
                raise RGTGError(
                    f"{guide.name} was bound to another decoder's base model since: give each decoder a reward object "
                    "of its own"
                )
            guide.bind(self._lm, **self._binding)
        for runner in self._backbones:
            runner.begin_run()

    def claim(self, run: object) -> None:
        """The caches and the guide belong to a run from now on; older ones are over."""
        for thing in self._stateful:
            _turn(thing).run = run

    def of(self, run: object, items: Iterator[Item]) -> Iterator[Item]:
        """What a run gives, as long as no newer one begins; nothing is held between two items."""
        served = self.served()
        while True:
            with self.taken(served):
                # Before anything is written: the state may be another run's.
                if any(_turn(thing).run is not run for thing in self._stateful):
                    raise RGTGError(
                        "this decoder was called again before the run was through, or another decoder with the same "
                        "guide: finish or drop an iterator first"
                    )
                for runner in self._backbones:
                    runner.check_run()
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
