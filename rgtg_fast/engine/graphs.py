"""Decoding steps as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from rgtg_fast.engine.batch import Batch, SlotState
from rgtg_fast.models.runner import Counter, ModelRunner
from rgtg_fast.rewards.base import Reward

# Runs before a capture: they compile kernels and initialize libraries, which is not allowed in a capture.
WARM_UP = 2

Tensors = list[torch.Tensor]
Step = Callable[[Batch, bool], Tensors]


def bucket(rows: int, slots: int) -> int:
    """Number of rows of the graph that is used for `rows` rows: 1, 2, 4, 8, then multiples of 8, at most `slots`.

    Example:
        >>> [bucket(rows, 20) for rows in (1, 3, 8, 9, 17)]
        [1, 4, 8, 16, 20]
    """
    size = 1 << max(rows - 1, 0).bit_length() if rows <= 8 else -(-rows // 8) * 8
    return min(size, slots)


class Recorder(Protocol):
    """Records steps."""

    def warm_up(self, step: Callable[[], object]) -> None:
        """Runs a step where it will be recorded."""
        ...

    def record(self, step: Step, batch: Batch, trace: bool) -> Callable[[], Tensors]:
        """Records a step; calling the result replays it and gives its tensors, always the same ones.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """Releases memory: no recorded step will be replayed again."""
        ...


class CudaRecorder:
    """Records CUDA graphs. They share one pool of memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self.forget()

    def forget(self) -> None:
        # A pool is freed with its last graph; its handle must not be used again.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], object]) -> None:
        own = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(own)
        with torch.cuda.stream(self._stream):
            step()
        own.wait_stream(self._stream)

    def record(self, step: Step, batch: Batch, trace: bool) -> Callable[[], Tensors]:
        graph = torch.cuda.CUDAGraph()
        # torch synchronizes the current device before a capture.
        with torch.cuda.device(self.device):
            own = torch.cuda.current_stream()
            try:
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    outputs = step(batch, trace)
            finally:
                # A capture that fails leaves its stream current.
                torch.cuda.set_stream(own)

        def replay() -> Tensors:
            graph.replay()
            return outputs

        return replay


@dataclass
class _Recorded:
    """A step's graph, and the effects of its Python code on the host, which a replay does not execute.

    Attributes:
        replay: executes the graph and returns its output tensors.
        counts: for each counter, the calls and tokens that it gains.
        rows: for each model, the number of slots whose prefix grows by one token.
        held: keeps memory alive that the graph uses.
    """

    replay: Callable[[], Tensors]
    counts: list[tuple[int, int]]
    rows: list[int]
    held: Tensors


class StepGraphs:
    """Runs a step as one graph for each shape of the batch, recorded at its first use.

    The step must read and change nothing but tensors at fixed addresses, counters, and the host's count of lengths. A
    graph is for a number of rows and k (`Batch.shape`); lengths, tokens, seeds, β and temperatures are on the device.
    Where a step cannot be recorded, a warning says so and steps run one operator after another from then on.

    Args:
        step: returns the decision of a batch, and trace tensors where asked for.
        lm: the base model.
        reward: one that is `on_device`.
        recorder: by default CUDA graphs on the base model's device.

    Attributes:
        seconds: spent on warming up and recording since `begin`.
    """

    def __init__(self, step: Step, lm: ModelRunner, reward: Reward, recorder: Recorder | None = None):
        self.step, self.lm, self.reward = step, lm, reward
        self.recorder = recorder or CudaRecorder(lm.device)
        self.seconds = 0.0
        self._recorded: dict[Hashable, _Recorded] = {}
        self._failed = False
        self._layout: Hashable = None
        self._state: Tensors = []
        # Models whose prefixes the host may have to change before a step.
        self._changing: list[ModelRunner] = []

    def __len__(self) -> int:
        return len(self._recorded)

    def forget(self) -> None:
        """Drops all graphs: the step has changed, or a tensor that it reads was replaced."""
        self._recorded.clear()
        self.recorder.forget()

    def begin(self, slots: SlotState) -> None:
        """A call begins, with all memory reserved. Drops graphs whose memory has been replaced since."""
        self.seconds = 0.0
        self._changing = [model for model in self._models() if model.follows_lengths]
        of_models = (x for model in self._models() for x in model.step_state())
        self._state = [*slots.tensors(), *of_models, *self.reward.step_state()]
        buffers = [x for model in self._models() for x in model.buffers()]
        layout = tuple((x.data_ptr(), x.shape, x.stride()) for x in [*self._state, *buffers])
        if layout != self._layout:
            self.forget()
            self._layout = layout

    def __call__(self, batch: Batch, trace: bool) -> Tensors:
        """The step's tensors for this batch; valid until the next call."""
        for model in self._changing:
            model.follow_lengths(range(batch.width * model.prompt_contexts))
        shape = (batch.shape, trace)
        if shape not in self._recorded and not self._failed:
            self._try_to_record(batch, trace, shape)
        if self._failed:
            return self.step(batch, trace)
        recorded = self._recorded[shape]
        outputs = recorded.replay()
        for counter, (calls, tokens) in zip(self._counters(), recorded.counts, strict=True):
            counter.calls += calls
            counter.tokens += tokens
        for model, rows in zip(self._models(), recorded.rows, strict=True):
            model.lengths = [length + (slot < rows) for slot, length in enumerate(model.lengths)]
        return outputs

    def _try_to_record(self, batch: Batch, trace: bool, shape: Hashable) -> None:
        start = time.perf_counter()
        try:
            self._recorded[shape] = self._record(batch, trace)
        except RuntimeError as error:
            self._failed = True
            self.forget()
            reason = " ".join(str(error).split())[:160]
            warnings.warn(
                f"a decoding step could not be recorded as a CUDA graph, decoding continues without graphs: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        self.seconds += time.perf_counter() - start

    def _record(self, batch: Batch, trace: bool) -> _Recorded:
        """Warms the step up and records it; restores everything that it has changed."""
        before = [x.clone() for x in self._state]
        counts = [(c.calls, c.tokens) for c in self._counters()]
        lengths = [model.lengths for model in self._models()]

        def restore() -> None:
            # Keys and values stay: they lie past the lengths, where the next step overwrites them.
            for x, old in zip(self._state, before, strict=True):
                x.copy_(old)
            for counter, (calls, tokens) in zip(self._counters(), counts, strict=True):
                counter.calls, counter.tokens = calls, tokens
            for model, old in zip(self._models(), lengths, strict=True):
                model.lengths = old

        for _ in range(WARM_UP):
            try:
                self.recorder.warm_up(lambda: self.step(batch, trace))
            finally:
                restore()
        try:
            replay = self.recorder.record(self.step, batch, trace)
            pairs = zip(self._counters(), counts, strict=True)
            gained = [(c.calls - calls, c.tokens - tokens) for c, (calls, tokens) in pairs]
            rows = [sum(model.lengths) - sum(old) for model, old in zip(self._models(), lengths, strict=True)]
        finally:
            restore()
        undecided = [part.cache.k_new for model in self._models() for part in model.cache.parts]
        return _Recorded(replay, gained, rows, undecided)

    def _models(self) -> list[ModelRunner]:
        return [self.lm, *self.reward.models()]

    def _counters(self) -> list[Counter]:
        found = [self.lm.counter, *self.reward.counters()]
        return list({id(counter): counter for counter in found}.values())
