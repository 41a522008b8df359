"""The methods that can be timed against each other: one table, one entry per method.

To add a method, add an entry to `_TABLE`. `run_bench`, the sweeps and the tables take everything that they need to know
about a method from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import PreTrainedModel

from rgtg_fast.bench import baselines
from rgtg_fast.bench.baselines import BaselineRun
from rgtg_fast.config import Guidance

# base model, reward model (None where the method needs none), prompts, guidance, new tokens -> run
Peer = Callable[[PreTrainedModel, Any, Sequence[Sequence[int]], Guidance, int], BaselineRun]


class RewardModel(Enum):
    """What a method needs beside the base model."""

    NONE = "the base model alone"
    SEQUENCE = "a sequence-classification model of its own"
    ADAPTER = "an adapter of the base model, run as a model of its own"
    SHARED_ADAPTER = "an adapter of the base model, run in the base model's forward"
    LANGUAGE_MODEL = "a second causal language model"

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter of the base model will do."""
        return self in (RewardModel.ADAPTER, RewardModel.SHARED_ADAPTER)


class Agreement(Enum):
    """Methods whose greedy tokens must agree."""

    CANDIDATES = "log π + β·r over the k most probable tokens"
    VOCABULARY = "log π + β·log π_r over the whole vocabulary"


@dataclass(frozen=True)
class BenchMethod:
    """One method that can be timed.

    Attributes:
        name: name in `run_bench`, on the command line and in the results.
        label: label in figures.
        reward: what it needs in addition to the base model.
        agreement: the methods that its greedy tokens are compared with; None: its tokens are compared with nothing.
        peer: runs the published algorithm; None: our decoder runs it.
        one_row: whether it decodes its prompts one after another, because the published program has no other way.
        engine: engine of the decoder. "transformers" runs the model's own blocks even where the native engine could.
        graphs: False never captures a decoding step in a CUDA graph.
        compile: whether the decoder's blocks are compiled with torch.compile.
        warm_up_tokens: new tokens of the warm-up, which is also the first comparison of the outputs.
        anchor: whether it is run again with methods that are measured later, so that their tokens can be compared.
    """

    name: str
    label: str
    reward: RewardModel = RewardModel.SEQUENCE
    agreement: Agreement | None = Agreement.CANDIDATES
    peer: Peer | None = None
    one_row: bool = False
    engine: str = "auto"
    graphs: bool | None = None
    compile: bool = False
    warm_up_tokens: int = 8
    anchor: bool = False

    @property
    def ours(self) -> bool:
        """Whether our decoder runs it."""
        return self.peer is None


# Each peer is looked up in `baselines` when it runs, so that a test can replace it.
_TABLE = (
    BenchMethod("ours", "rgtg-fast", anchor=True),
    BenchMethod("ours_transformers", "rgtg-fast, the model's own blocks", engine="transformers"),
    BenchMethod("ours_eager", "rgtg-fast, eager", graphs=False),
    BenchMethod("ours_compiled", "rgtg-fast, compiled", engine="transformers", compile=True),
    BenchMethod(
        "ours_genarm",
        "rgtg-fast, GenARM",
        RewardModel.LANGUAGE_MODEL,
        Agreement.VOCABULARY,
        anchor=True,
    ),
    BenchMethod("shared_trunk", "rgtg-fast, one forward for both", RewardModel.SHARED_ADAPTER, anchor=True),
    BenchMethod(
        "shared_compiled",
        "rgtg-fast, one forward for both, compiled",
        RewardModel.SHARED_ADAPTER,
        engine="transformers",
        compile=True,
    ),
    BenchMethod("two_models", "rgtg-fast, two models", RewardModel.ADAPTER),
    BenchMethod(
        "args_replicated",
        "ARGS, k copies of the cache",
        peer=lambda lm, rm, prompts, guidance, n: baselines.args_replicated(
            lm, rm, prompts, k=guidance.k, beta=guidance.beta, new_tokens=n
        ),
        one_row=True,
        warm_up_tokens=2,
        anchor=True,
    ),
    BenchMethod(
        "pargs_serial",
        "PARGS, no cache, one by one",
        peer=lambda lm, rm, prompts, guidance, n: baselines.pargs_serial(
            lm, rm, prompts, k=guidance.k, beta=guidance.beta, new_tokens=n
        ),
        one_row=True,
        warm_up_tokens=2,
    ),
    BenchMethod(
        "genarm_published",
        "GenARM, eager",
        RewardModel.LANGUAGE_MODEL,
        Agreement.VOCABULARY,
        peer=lambda lm, rm, prompts, guidance, n: baselines.genarm_published(
            lm, rm, prompts, beta=guidance.beta, new_tokens=n
        ),
        anchor=True,
    ),
    BenchMethod(
        "unguided",
        "unguided",
        RewardModel.NONE,
        None,
        peer=lambda lm, rm, prompts, guidance, n: baselines.unguided(lm, prompts, new_tokens=n),
    ),
    BenchMethod("ours_unguided", "rgtg-fast, unguided", RewardModel.NONE, None),
    BenchMethod(
        "ours_unguided_compiled",
        "rgtg-fast, unguided, compiled",
        RewardModel.NONE,
        None,
        engine="transformers",
        compile=True,
    ),
)
METHODS: dict[str, BenchMethod] = {method.name: method for method in _TABLE}


def reference(name: str, names: Iterable[str]) -> str | None:
    """The method among `names` whose greedy tokens a method must reproduce.

    A published algorithm comes first, then our decoder with two models, then our decoder with one forward for both;
    of equals, the first in the table.

    Args:
        name: of the method.
        names: of the methods that take part, itself included.

    Returns:
        The reference's name; None where the method's tokens are compared with nothing.
    """
    agreement = METHODS[name].agreement
    if agreement is None:
        return None
    order = list(METHODS)
    comparable = [other for other in names if METHODS[other].agreement is agreement]
    return min(
        comparable,
        key=lambda other: (
            METHODS[other].ours,
            METHODS[other].reward is RewardModel.SHARED_ADAPTER,
            order.index(other),
        ),
        default=None,
    )


def must_agree(name: str, others: Iterable[str]) -> bool:
    """Whether a method's tokens must agree with those of any of the others."""
    agreement = METHODS[name].agreement
    return agreement is not None and any(METHODS[other].agreement is agreement for other in others)
