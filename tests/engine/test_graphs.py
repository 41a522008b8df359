"""What keeps recorded steps right: the tensors that they read, captures that fail, pools of memory."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rgtg_fast.engine import graphs as graphs_module
from rgtg_fast.engine.batch import Batch
from rgtg_fast.engine.graphs import CudaRecorder, StepGraphs, Tensors
from tests.engine.support import prompts_of
from tests.engine.test_ahead import SAMPLED, EagerRecorder, as_numbers, make_decoder, recorded


class BoundRecorder(EagerRecorder):
    """Replays with the tensor of end tokens that was there when the step was recorded, as a graph does."""

    def record(self, step: Any, batch: Batch, trace: bool) -> Callable[[], Tensors]:
        replay, ends = super().record(step, batch, trace), weakref.ref(self.decoder._scheduler.eos)

        def bound() -> Tensors:
            read = ends()
            assert read is not None, "a recorded step reads a tensor that is gone"
            own, self.decoder._scheduler.eos = self.decoder._scheduler.eos, read
            try:
                return replay()
            finally:
                self.decoder._scheduler.eos = own

        return bound


def test_other_end_tokens_and_back_again() -> None:
    decoder, plain = make_decoder("sequence"), make_decoder("sequence")
    graphs = recorded(decoder)
    graphs.recorder = BoundRecorder(decoder)
    for ends in ([1, *range(8, 64, 7)], [2, *range(9, 64, 5)], [1, *range(8, 64, 7)]):
        for each in (decoder, plain):
            each.lm.runner.model.generation_config.eos_token_id = ends
        want = plain.generate(prompts_of(5), 9, SAMPLED, seed=list(range(5)))
        assert {row.finish_reason for row in want} == {"eos", "length"}
        assert as_numbers(decoder.generate(prompts_of(5), 9, SAMPLED, seed=list(range(5)))) == as_numbers(
            want
        )


class FailingRecorder(EagerRecorder):
    """Fails in the middle of a step, as a capture does in which something waits for the device."""

    def __init__(self, decoder: Any, fails: str):
        super().__init__(decoder)
        self.fails, self.tries = fails, 0

    def _fail(self, step: Callable[[], object]) -> None:
        step()
        self.tries += 1
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")

    def warm_up(self, step: Callable[[], object]) -> None:
        if self.fails == "warm_up":
            self._fail(step)
        super().warm_up(step)

    def record(self, step: Any, batch: Batch, trace: bool) -> Callable[[], Tensors]:
        self._fail(lambda: step(batch, trace))
        raise AssertionError


@pytest.mark.parametrize("fails", ["warm_up", "record"])
@pytest.mark.parametrize("guide", ["none", "sequence", "farma"])
def test_a_step_that_cannot_be_recorded_runs_all_the_same(guide: str, fails: str) -> None:
    """One warning in one line, one try, and the rows and counts of the step as it is."""
    decoder, plain = make_decoder(guide), make_decoder(guide)
    recorder = FailingRecorder(decoder, fails)
    scheduler = decoder._scheduler
    scheduler.graphs = StepGraphs(scheduler.execute, decoder.lm.runner, scheduler.reward, recorder)
    prompts, seeds = prompts_of(7), list(range(7))
    want = plain.generate(prompts, 9, SAMPLED, seeds)
    with pytest.warns(RuntimeWarning, match="could not be recorded as a CUDA graph") as told:
        got = decoder.generate(prompts, 9, SAMPLED, seeds)
    messages = [str(w.message) for w in told if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert "\n" not in messages[0]
    assert as_numbers(got) == as_numbers(want)
    for name in ("steps", "lm_calls", "lm_tokens", "reward_calls", "reward_tokens"):
        assert getattr(got.stats, name) == getattr(want.stats, name), name
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert as_numbers(decoder.generate(prompts, 9, SAMPLED, seeds)) == as_numbers(want)
    assert recorder.tries == 1


class FakeCuda:
    """The parts of torch.cuda that `CudaRecorder` calls, for a device that is not the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.pools, self.fail = "stream of the caller", 0, False
        for name in (
            "Stream",
            "device",
            "graph",
            "CUDAGraph",
            "current_stream",
            "set_stream",
            "graph_pool_handle",
        ):
            monkeypatch.setattr(graphs_module.torch.cuda, name, getattr(self, name, None) or self._nothing)

    def _nothing(self, *_: object, **__: object) -> Any:
        return self

    def __enter__(self) -> FakeCuda:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def Stream(self, device: object) -> str:  # noqa: N802
        return "stream of the capture"

    def graph(self, graph: object, pool: int, stream: str, capture_error_mode: str) -> Any:
        self.current, self.used = stream, pool
        return self

    def current_stream(self, device: object = None) -> str:
        return self.current

    def set_stream(self, stream: str) -> None:
        self.current = stream

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools


def test_a_failed_capture_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 1))

    def step(batch: object, trace: bool) -> Tensors:
        assert cuda.current == "stream of the capture"
        raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(step, None, False)  # type: ignore[arg-type]
    assert cuda.current == "stream of the caller"


def test_graphs_that_are_forgotten_take_their_pool_along(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorder.record(lambda batch, trace: [], None, False)  # type: ignore[arg-type, return-value]
    recorder.record(lambda batch, trace: [], None, False)  # type: ignore[arg-type, return-value]
    assert cuda.used == 1
    decoder = make_decoder("none")
    scheduler = decoder._scheduler
    graphs = StepGraphs(scheduler.execute, decoder.lm.runner, scheduler.reward, recorder)
    graphs.forget()
    recorder.record(lambda batch, trace: [], None, False)  # type: ignore[arg-type, return-value]
    assert cuda.used == 2
