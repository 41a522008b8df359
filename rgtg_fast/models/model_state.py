"""The state of loaded models, which their owners may change: detects changes, and sets what inference needs."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rgtg_fast.models.attention import NAME, PACKED
from rgtg_fast.models.device import without_autocast

# By the objects' identities: a model with a lock among its attributes could not be copied.
_locks: dict[int, threading.RLock] = {}
_finding = threading.Lock()


def lock_of(resource: object) -> threading.RLock:
    """The lock of an object that several decoders may share: held while it is used, and while it is verified.

    The verification of a model changes its attention and its windows for the length of a few forwards.
    """
    with _finding:
        found = _locks.get(id(resource))
        if found is None:
            found = _locks[id(resource)] = threading.RLock()
            weakref.finalize(resource, _locks.pop, id(resource), None).atexit = False
        return found


def _after_fork() -> None:
    """In a child process no other thread is left to release a lock."""
    global _finding
    _finding = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ModelSnapshot:
    """What a model was when it was loaded, to compare with what it is when a run begins.

    Args:
        model: the model.
        head: its head, one of its modules.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module):
        self._model, self._trunk, self._head = model, model.base_model, head
        self._kinds = _kind(head), _kind(self._trunk)
        self._modules: list[nn.Module] | None = None
        self._addresses: list[int] = []
        self._hooks = 0
        self._parameters: list[nn.Parameter] = []
        self._versions: list[int] = []

    def pin(self) -> None:
        """Records the weights' addresses, which C++ layers, fused projections and CUDA graphs read from now on."""
        self._modules = _modules(self._model)
        self._addresses, self._hooks = _addresses(self._modules), foreign_hooks(self._modules)

    def change(self) -> str | None:
        """A change that a forward would not take into account, in words; None for none."""
        modules = _modules(self._model)
        # A reward model's head may keep its dtype where the trunk's changes.
        for kind, now in zip(self._kinds, (_kind(self._head), _kind(self._model.base_model)), strict=True):
            if kind != now:
                return f"{kind[0]} on {kind[1]} became {now[0]} on {now[1]}"
        if self._model.base_model is not self._trunk:
            return "it has another trunk"
        if not any(module is self._head for module in modules):
            return "it has another head"
        if self._modules is None:
            return None
        if list(map(id, modules)) != list(map(id, self._modules)):
            return "modules were replaced or added"
        if _addresses(modules) != self._addresses:
            return "weights were moved or replaced"
        if foreign_hooks(modules) != self._hooks:
            return "hooks were added or removed"
        return None

    def remember(self) -> None:
        """Records the weights' versions, with which `written` compares."""
        self._parameters = _parameters(_modules(self._model))
        self._versions = _versions(self._parameters)

    def written(self) -> bool:
        """Whether weights were written to since `remember`."""
        return _versions(self._parameters) != self._versions


class InferenceState:
    """A context in which models compute what decoding needs: no dropout, no autocast, attention over prefix caches.

    On exit the models are as their owners had set them.

    Args:
        models: all models.
        by_blocks: those whose own blocks run over a prefix cache.
    """

    def __init__(self, models: Sequence[nn.Module], by_blocks: Sequence[nn.Module]):
        self._modules = [module for model in models for module in _modules(model)]
        # A trunk may have a configuration of its own, which does not follow the model's.
        blocks = [module for model in by_blocks for module in _modules(model)]
        self._configured = [module for module in blocks if isinstance(module, PreTrainedModel)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(without_autocast())
            for model in self._configured:
                own: Any = model.config._attn_implementation
                if own not in (NAME, PACKED):
                    model.set_attn_implementation(NAME)
                    stack.callback(model.set_attn_implementation, own)
            for module in self._modules:
                if module.training:
                    module.training = False
                    stack.callback(setattr, module, "training", True)
            yield


def _modules(model: nn.Module) -> list[nn.Module]:
    """The model and all its modules; faster than `modules()`, since every call of a decoder needs them."""
    found, waiting = {}, [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def _kind(head: nn.Module) -> tuple[torch.dtype, torch.device]:
    weight = next(head.parameters())
    return weight.dtype, weight.device


def _addresses(modules: Sequence[nn.Module]) -> list[int]:
    return [parameter.data_ptr() for parameter in _parameters(modules)]


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module._parameters.values() if p is not None]


def _versions(parameters: Sequence[nn.Parameter]) -> list[int]:
    # Tensors created in inference mode have no version counter.
    return [0 if p.is_inference() else p._version for p in parameters]


def foreign_hooks(modules: Sequence[nn.Module]) -> int:
    """The number of hooks that other packages added; C++ layers and CUDA graphs do not run them."""
    hooks = [
        hook
        for module in modules
        for table in (module._forward_hooks, module._forward_pre_hooks)
        if table
        for hook in table.values()
    ]
    return sum(not _is_ours(hook) for hook in hooks)


def _is_ours(hook: object) -> bool:
    module = getattr(getattr(hook, "func", hook), "__module__", None)
    return str(module).startswith("rgtg_fast.")
