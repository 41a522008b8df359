"""Who may change the state of models and guides: one thread at a time, and one run until a newer one begins.

A run writes into the prefix caches of its models and the rows of its guide, and borrows the models' modules for the
length of a forward. Both may be reached by other ways: other threads, other decoders, a guide's own function.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from rgtg_fast.errors import RGTGError


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
    """The right to use what a decoder works with.

    Args:
        stateful: caches and guides, which hold the rows of one run. shared: models and tokenizers, which hold nothing
            between two forwards and may serve several decoders.
    """

    def __init__(self, stateful: Sequence[object], shared: Sequence[object]):
        self._stateful, self._shared = list(stateful), list(shared)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, no other thread uses any of it, and forwards are what inference computes.

        Other threads wait. Locks are taken in one order everywhere, so that two decoders cannot wait for each other.

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
            yield

    def claim(self, run: object) -> None:
        """The state belongs to a run from now on; older ones are over."""
        for thing in self._stateful:
            _turn(thing).run = run

    def belongs_to(self, run: object) -> bool:
        """Whether no newer run has claimed any of the state."""
        return all(_turn(thing).run is run for thing in self._stateful)
