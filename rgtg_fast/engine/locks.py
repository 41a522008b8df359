"""Exclusive use of models and rewards: by one thread at a time, and by one run until a newer one begins.

A run writes into the prefix caches of its models and the rows of its reward, and changes settings of the models'
modules for the length of a forward. Others may reach both: other threads, other decoders, a reward's own function.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.model_state import InferenceState, lock_of
from rgtg_fast.rewards.base import Reward

Item = TypeVar("Item")


class _Turn:
    """An object's lock, whether a thread is using it, and the run that its state belongs to."""

    def __init__(self, number: int, lock: threading.RLock):
        self.number = number
        self.lock = lock
        self.busy = False
        self.run: Callable[[], object] = lambda: None


# By the objects' identities, like their locks.
_turns: dict[int, _Turn] = {}
_numbers = itertools.count()
_making = threading.Lock()


def _turn(resource: object) -> _Turn:
    with _making:
        found = _turns.get(id(resource))
        if found is None:
            found = _turns[id(resource)] = _Turn(next(_numbers), lock_of(resource))
            weakref.finalize(resource, _turns.pop, id(resource), None).atexit = False
        return found


def _after_fork() -> None:
    """In a child process no other thread is left to release a lock."""
    global _making
    _making = threading.Lock()
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Turns:
    """Access to a base model and a reward.

    Args:
        lm: the base model.
        reward: bound to it.
        binding: the settings of `Reward.bind`, to bind it again where another decoder has taken it over.
    """

    def __init__(self, lm: LanguageModel, reward: Reward, binding: dict[str, Any]):
        self._lm, self._reward, self._binding = lm, reward, binding
        self._runners = [lm.runner, *reward.models()]
        # Caches and rewards hold the rows of one run; models and tokenizers hold nothing between two forwards.
        self._stateful = [lm.runner, *reward.stateful()]
        own = [lm.runner.model, *([] if lm.tokenizer is None else [lm.tokenizer])]
        self._shared = [*own, *reward.loaded()]

    def served(self) -> InferenceState:
        """A context in which the models compute what decoding needs."""
        models = [resource for resource in self._shared if isinstance(resource, nn.Module)]
        return InferenceState(models, [each.model for each in self._runners if each.engine == "transformers"])

    @contextmanager
    def taken(self, served: InferenceState | None = None) -> Iterator[None]:
        """A context in which no other thread uses any of the objects and forwards compute what decoding needs.

        Other threads wait. Locks are acquired in one order everywhere, so that two decoders cannot deadlock.

        Args:
            served: an earlier result of `served`; a new one by default.

        Raises:
            RGTGError: this thread is in a step already: the reward's own code has called the decoder.
        """
        stateful = [_turn(resource) for resource in self._stateful]
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
        """Binds the reward to this base model again where necessary, and takes over changes of the models.

        Raises:
            RGTGError: one of the two is impossible.
        """
        reward = self._reward
        taken = any(part.bound_to is not self._lm for part in reward.stateful())
        if taken and reward.gives_rewards:
            if reward.models() or reward.trunk is not None:
                raise RGTGError(
                    f"{reward.name} was bound to another decoder's base model since: give each decoder a reward object "
                    "of its own"
                )
            reward.bind(self._lm, **self._binding)
        for runner in self._runners:
            runner.begin_run()

    def claim(self, run: object) -> None:
        """The caches and the reward belong to a run from now on; older runs cannot continue."""
        for resource in self._stateful:
            # A run knows its models, which must not live as long as this reference.
            _turn(resource).run = weakref.ref(run)

    def belongs_to(self, run: object) -> bool:
        """Whether no other run has begun since this one claimed the caches and the reward."""
        return all(_turn(resource).run() is run for resource in self._stateful)

    def check(self, run: object) -> None:
        """Checks, before anything is written, that the state is still a run's and that no weights have changed.

        Raises:
            RGTGError: another run has begun, or weights were written to.
        """
        if not self.belongs_to(run):
            raise RGTGError(
                "this decoder was called again before the run had finished, or another decoder with the same "
                "reward: finish or drop an iterator first"
            )
        for runner in self._runners:
            runner.check_run()

    def of(self, run: object, items: Iterator[Item]) -> Iterator[Item]:
        """The items of a run, as long as no newer one begins. No lock is held between two items."""
        served = self.served()
        while True:
            with self.taken(served):
                self.check(run)
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
