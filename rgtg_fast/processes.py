"""The processes of one run, as torchrun and accelerate start them: their number, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from rgtg_fast.errors import RGTGError, one_line

_T = TypeVar("_T")
# How long the processes of a run wait for each other to start.
_START = timedelta(minutes=10)
# One process may be busy for days while the others have finished. A process that ends closes its connections, which
# the waiting ones notice at once.
_WORK = timedelta(days=365)


@dataclass(frozen=True)
class Place:
    """Which process of a run this is.

    Attributes:
        rank: from 0, over all machines.
        count: number of processes, 1 where nothing has started several.
        local: from 0, on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that reports and writes what is common to all."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Place:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK.

        Raises:
            RGTGError: a value that is no number of a process.
        """
        values = os.environ if environment is None else environment
        numbers: dict[str, int] = {}
        for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            text = values.get(name) or str(least)
            if not text.isdecimal() or int(text) < least:
                raise RGTGError(f"{name}={text!r} in the environment is not a number from {least}: unset it")
            numbers[name] = int(text)
        rank, count = numbers["RANK"], numbers["WORLD_SIZE"]
        if rank >= count:
            raise RGTGError(
                f"RANK={rank} in the environment is beyond WORLD_SIZE={count}: set both, or neither"
            )
        return cls(rank, count, numbers["LOCAL_RANK"] if "LOCAL_RANK" in values else rank)


class FailedElsewhereError(RGTGError):
    """Another process of the run reports the error."""


class ProcessGroup:
    """Processes that tell each other small Python objects, over gloo, where no GPU takes part.

    A context manager. Nothing in it waits for a process that has ended: its connections close, which is an error.

    Args:
        place: which process this is.
        by_device: whether tensors on GPUs are exchanged too, over NCCL.

    Raises:
        RGTGError: the other processes cannot be reached.
    """

    def __init__(self, place: Place, by_device: bool = False) -> None:
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if by_device and torch.cuda.is_available() else "gloo"
        self.place, self._dist = place, dist
        try:
            store, rank, count = next(dist.rendezvous("env://", timeout=_START))
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_WORK)
        except (RuntimeError, ValueError, OSError) as error:
            raise RGTGError(
                f"process {place.rank} of {place.count} cannot reach the others ({one_line(error)}): start all of "
                "them with torchrun, or unset WORLD_SIZE for a single one"
            ) from error

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A connection that closes while another process still takes it up aborts that process within gloo, so all end
        # together. Where one has ended already, nothing is left to wait for.
        if error is None:
            with contextlib.suppress(RuntimeError):
                self._dist.barrier()
        self._dist.destroy_process_group()

    def together(self, work: Callable[[], _T]) -> list[_T]:
        """Does a part of the work in every process and waits for all of them.

        Args:
            work: what this process does; returns a small picklable object.

        Returns:
            What `work` returned, by rank.

        Raises:
            RGTGError: `work` failed in some process: the first of their errors in process 0.
            FailedElsewhereError: the same, in the others.
        """
        outcomes: list[Any] = [None] * self.place.count
        mine = _outcome(work)
        with _connected():
            self._dist.all_gather_object(outcomes, mine)
        for rank, (_, error) in enumerate(outcomes):
            self._check(rank, error)
        return [result for result, _ in outcomes]

    def scatter(self, work: Callable[[], Sequence[_T]]) -> _T:
        """Process 0 does a part of the work and gives every process its share.

        Args:
            work: what process 0 does; returns a picklable object for each process, by rank.

        Returns:
            This process's share.

        Raises:
            RGTGError: `work` failed, in process 0.
            FailedElsewhereError: the same, in the others.
        """
        shares: list[Any] = []
        if self.place.main:
            done, error = _outcome(work)
            shares = [(None, error)] * self.place.count if done is None else [(each, None) for each in done]
        mine: list[Any] = [None]
        with _connected():
            self._dist.scatter_object_list(mine, shares, src=0)
        share, error = mine[0]
        self._check(0, error)
        return share

    def _check(self, rank: int, error: str | None) -> None:
        """Raises the error of a process; process 0 reports it."""
        if error is None:
            return
        if not self.place.main:
            raise FailedElsewhereError(error)
        raise RGTGError(error if rank == 0 else f"process {rank}: {error}")


def _outcome(work: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """What a function returned, or the text of its error."""
    try:
        return work(), None
    except RGTGError as error:
        return None, str(error)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Names what it means that an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        raise RGTGError(
            f"another process of the run has ended ({one_line(error)}): finished rows are kept, run the command again "
            "with --resume"
        ) from error


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Names what it means that a forward fails in an exchange with the other processes that hold the model.

    Raises:
        RGTGError: one of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(library in str(error).lower() for library in ("gloo", "nccl")):
            raise
        with _connected():
            raise


def device_of_process(device: str | None, place: Place) -> str | None:
    """The device of one of several processes: each has a GPU of its own.

    Args:
        device: as the user named it: one that has an index, or that is no GPU, is every process's.
        place: which process this is.

    Raises:
        RGTGError: the machine has fewer GPUs than processes.
    """
    import torch

    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    if place.local >= torch.cuda.device_count():
        raise RGTGError(
            f"process {place.local} of this machine has no GPU of its own, torch sees {torch.cuda.device_count()}: "
            "start fewer with --nproc-per-node, or use --device cpu"
        )
    # Triton launches kernels on the current device.
    torch.cuda.set_device(place.local)
    return f"cuda:{place.local}"
