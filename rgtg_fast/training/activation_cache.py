"""Activations of the frozen layers below the fork: computed once over the data and read from a file in training."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import nn

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.training.data import TokenizedPair, hash_pairs
from rgtg_fast.training.model import decoder_layers
from rgtg_fast.training.packing import (
    PackedBatch,
    collate,
    cost,
    forward_arguments,
    pack,
    pretrained,
)

# Files contain the raw bits, since numpy has no bfloat16.
_BITS = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16, torch.float64: np.int64}


class _Passed(nn.Module):
    """Stands in for a layer that is not run: returns its input or, in the last such layer, the stored activations."""

    def __init__(self, layer: nn.Module, in_tuple: bool, last: bool):
        super().__init__()
        self.in_tuple, self.last = in_tuple, last
        kind = vars(layer).get("attention_type")
        if kind is not None:
            self.attention_type = kind

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, trunk_states: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if self.last and trunk_states is None:
            raise RGTGError(
                "the layers below the fork are not loaded: pass their activations as trunk_states"
            )
        out = trunk_states if self.last else hidden_states
        return (out,) if self.in_tuple else out


class LowerLayers:
    """The layers below the fork, which can be detached while only the layers above them run.

    Args:
        model: a reward model with all its layers, with or without adapters.
        fork_layer: the first layer that runs.
    """

    def __init__(self, model: nn.Module, fork_layer: int):
        self._layers = decoder_layers(model)[1]
        self._lower = [self._layers[i] for i in range(fork_layer)]
        in_tuple = _returns_tuple(model, self._lower[-1])
        self._passed = [
            _Passed(layer, in_tuple, layer is self._lower[-1]).train(layer.training) for layer in self._lower
        ]

    def detach(self) -> None:
        """Removes the layers from the model: they are not run, moved or saved with it."""
        for i, passed in enumerate(self._passed):
            self._layers[i] = passed

    def restore(self) -> None:
        """Puts the layers back."""
        for i, layer in enumerate(self._lower):
            self._layers[i] = layer

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which the model has all its layers."""
        self.restore()
        try:
            yield
        finally:
            self.detach()


def _returns_tuple(model: nn.Module, layer: nn.Module) -> bool:
    trunk: Any = pretrained(model).base_model
    tokens = torch.zeros(1, 1, dtype=torch.long, device=trunk.device)
    return isinstance(_output_of(layer, trunk, input_ids=tokens, use_cache=False), tuple)


@torch.no_grad()
def _output_of(layer: nn.Module, trunk: nn.Module, **inputs: Any) -> Any:
    """A layer's output in a forward of the trunk, which is stopped there."""
    out: list[Any] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        out.append(output)
        raise _ForkReachedError

    hook = layer.register_forward_hook(stop)
    try:
        trunk(**inputs)
    except _ForkReachedError:
        pass
    finally:
        hook.remove()
    return out[0]


class ActivationCache:
    """The input of layer f for every token of every pair, in a memory-mapped file.

    The file's name is a hash of what the activations depend on: the pairs' tokens, the base model's fingerprint, f and
    the precision. The file grows row by row and gets its final name when it is complete; an interrupted computation
    continues where it stopped.

    Args:
        folder: folder of the files; several runs may share it.
        model: the model, with or without adapters from layer f on.
        pairs: the pairs whose activations are stored.
        fork_layer: f, at least 1.
        budget: most tokens of a row when the trunk runs.
        eos_padding: as in `collate`.
        autocast: run the trunk in bfloat16 autocast over float32 weights.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        pairs: Sequence[TokenizedPair],
        fork_layer: int,
        budget: int,
        eos_padding: bool = False,
        autocast: bool = False,
    ):
        inner = pretrained(model)
        self._pairs, self._eos_padding = pairs, eos_padding
        self._fork_layer, self._autocast = fork_layer, autocast
        self._width, self._dtype = int(inner.config.get_text_config().hidden_size), inner.dtype
        self._rows = pack(pairs, budget, eos_padding)
        self._starts, at = [0] * len(pairs), 0
        for row in self._rows:
            for i in row:
                self._starts[i] = at
                at += cost(pairs[i], eos_padding)
        self.tokens = at
        key = {
            "pairs": hash_pairs(pairs),
            "model": fingerprint(inner),
            "fork_layer": fork_layer,
            "dtype": str(self._dtype).removeprefix("torch."),
            "autocast": autocast,
            "eos_padding": eos_padding,
            "budget": budget,
        }
        self.path = Path(folder) / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".states")
        self._map: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Size of the complete file."""
        return self.tokens * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        return self._width * self._dtype.itemsize

    def fill(self, model: nn.Module, progress: Callable[[str], None] = lambda message: None) -> None:
        """Runs the trunk over the rows that the file lacks.

        Args:
            model: the model with all its layers.
            progress: receives a line every 10 seconds.

        Raises:
            RGTGError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Only one run computes the activations; others that need them wait.
            with filelock.FileLock(self.path.with_suffix(".lock")):
                if not self.path.exists():
                    self._write(model, progress)
            self._map = np.memmap(self.path, _BITS[self._dtype], "r", shape=(self.tokens, self._width))
        except OSError as error:
            raise RGTGError(
                f"cannot keep the trunk's activations in {self.path.parent} ({error.strerror or error}): free "
                f"{self.nbytes / 2**30:.1f} GiB there, name another folder, or train without this cache"
            ) from error

    def _write(self, model: nn.Module, progress: Callable[[str], None]) -> None:
        partial = self.path.with_suffix(".partial")
        with partial.open("ab") as file:
            done, size = self._complete_rows(file.tell())
            file.truncate(size)
            began, before, reported = time.monotonic(), size, time.monotonic()
            for row in self._rows[done:]:
                file.write(self._compute(model, row))
                file.flush()
                # After a power failure, a file of the right size must not contain blocks that were never written.
                os.fsync(file.fileno())
                size = file.tell()
                if time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    rate = (size - before) / self._token_bytes / (reported - began)
                    progress(
                        f"activations below layer {self._fork_layer}: {size / self.nbytes:.0%} of {self.tokens:,} "
                        f"tokens, {rate:,.0f} tokens/s"
                    )
        partial.replace(self.path)

    def _complete_rows(self, size: int) -> tuple[int, int]:
        """The number of complete rows in a file of this size, and their bytes."""
        total = 0
        for done, row in enumerate(self._rows):
            end = total + sum(cost(self._pairs[i], self._eos_padding) for i in row) * self._token_bytes
            if end > size:
                return done, total
            total = end
        return len(self._rows), total

    def _compute(self, model: nn.Module, row: Sequence[int]) -> bytes:
        trunk: Any = pretrained(model).base_model
        layers = decoder_layers(model)[1]
        batch = collate(self._pairs, [row], 0, eos_padding=self._eos_padding).to(trunk.device)
        training = trunk.training
        trunk.eval()
        with torch.autocast(trunk.device.type, torch.bfloat16, enabled=self._autocast):
            arguments = forward_arguments(trunk, batch)
            out = _output_of(layers[self._fork_layer - 1], trunk, input_ids=batch.input_ids, **arguments)
        trunk.train(training)
        hidden = out[0] if isinstance(out, tuple) else out
        states = hidden[0].to("cpu", self._dtype).contiguous()
        return states.view(torch.uint8).numpy().tobytes()

    def states(self, batch: PackedBatch) -> torch.Tensor:
        """The activations [R, S, E] of a packed batch, 0 at padding.

        Args:
            batch: batch of the cache's pairs.
        """
        assert self._map is not None
        rows, size = batch.input_ids.shape
        out = np.zeros((rows, size, self._width), self._map.dtype)
        for pair, (row, start, _, _, end) in zip(batch.pairs, batch.spans.tolist(), strict=True):
            first = self._starts[pair]
            out[row, start:end] = self._map[first : first + end - start]
        return torch.from_numpy(out).view(self._dtype)


class _ForkReachedError(Exception):
    """Stops a forward at the fork."""
