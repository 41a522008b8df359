"""On the native engine a row's numbers have the same bits whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    Reward,
    RewardGuidedDecoder,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.models.cpp_layers import NativeLayers
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter

# Widths that are no multiple of a vector; bfloat16 wants weights that do not blow its rounding up.
SHAPE = {
    "hidden_size": 200,
    "intermediate_size": 52,
    "vocab_size": 67,
    "head_dim": 10,
    "initializer_range": 0.15,
}
NUMBERS = ("tokens", "rewards", "logprobs", "reward", "base_logprob", "guided_logprob")
ROWS = 9

Make = Callable[[Any, torch.dtype, Path], Reward]


def _rm(dtype: torch.dtype) -> Any:
    return make_rm(1, dtype, **SHAPE), None


def _lm(seed: int, dtype: torch.dtype) -> Any:
    return make_lm(seed, dtype, **SHAPE), None


# By name: the guide, and the supports that it is tried with.
GUIDES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "two models": (lambda _, dtype, __: SequenceReward(_rm(dtype)), ("lm",)),
    "shared trunk": (
        lambda lm, _, folder: SequenceReward(write_adapter(folder, lm, 1, rank=5), share_trunk=True),
        ("lm",),
    ),
    "head on a frozen trunk": (
        lambda lm, _, folder: SequenceReward(write_adapter(folder, lm, 2), share_trunk=True),
        ("lm",),
    ),
    "vocabulary": (lambda _, dtype, __: VocabularyReward(_lm(3, dtype)), ("combined", "all")),
    "shared vocabulary": (
        lambda lm, _, folder: AutoregressiveReward(write_adapter(folder, lm, 1, head=None), share_trunk=True),
        ("combined",),
    ),
    "log-ratio": (lambda _, dtype, __: LogRatioReward(_lm(3, dtype), _lm(4, dtype)), ("lm",)),
    "contrastive": (lambda *_: ContrastiveReward("w1", "w2"), ("lm", "combined")),
    "mixture": (
        lambda _, dtype, __: MixtureReward(
            [SequenceReward(_rm(dtype)), AutoregressiveReward(_lm(3, dtype))], [0.7, 0.31]
        ),
        ("lm",),
    ),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        *((name, dtype, 1) for name in GUIDES for dtype in (torch.float32, torch.bfloat16)),
        ("shared trunk", torch.float32, 2),
        ("shared trunk", torch.float32, 3),
    ],
)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(
    name: str, dtype: torch.dtype, count: int, threads: Callable[[int], None], tmp_path: Path
) -> None:
    threads(count)
    lm = make_lm(dtype=dtype, **SHAPE)
    if reason := NativeLayers.supported(lm.base_model):
        pytest.skip(f"the native engine does not run here: {reason}")
    make, supports = GUIDES[name]
    decoder = RewardGuidedDecoder.from_pretrained(
        (lm, make_tokenizer()), reward=make(lm, dtype, tmp_path), max_batch=5, engine="native"
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(6, 64) for _ in range(rng.randrange(1, 10))] for _ in range(ROWS)]
    for support in supports:
        guidance = [
            Guidance(k=3 + i % 4, beta=1.3, temperature=0.9, support=support)  # type: ignore[arg-type]
            for i in range(ROWS)
        ]
        together = decoder.generate(prompts, 5, guidance, seed=list(range(ROWS)))
        for i in range(0, ROWS, 4):
            alone = decoder.generate([prompts[i]], 5, guidance[i], seed=i)[0]
            for number in NUMBERS:
                assert getattr(alone, number) == getattr(together[i], number), number
