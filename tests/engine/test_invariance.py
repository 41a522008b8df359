"""Batch-invariant steps: a row's bits are the same alone and in a batch, and nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
)
from rgtg_fast.engine.invariance import InvariantProducts
from rgtg_fast.models.quantized import quantize_layers
from rgtg_fast.ops import invariant_linear
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter

# Sums over 200 numbers, which the CPU library's products round by the number of rows. Other widths are multiples of 32:
# torch computes exponentials and cosines at the end of a CPU tensor by other instructions than before it.
SHAPE: dict[str, Any] = {
    "hidden_size": 200,
    "intermediate_size": 64,
    "vocab_size": 67,
    "head_dim": 32,
    "initializer_range": 0.15,
}
NUMBERS = ("tokens", "rewards", "logprobs", "reward", "base_logprob", "guided_logprob")
ROWS = 7


def decoder_of(reward: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> RewardGuidedDecoder:
    settings = {"engine": "triton", "batch_invariant": True, "max_batch": 5, **settings}
    pair: Any = (make_lm(dtype=dtype, **SHAPE), make_tokenizer())
    return RewardGuidedDecoder.from_pretrained(pair, reward, **settings)


def zeros(prefixes: Any, candidates: torch.Tensor) -> torch.Tensor:
    return torch.zeros(candidates.shape)


def reward_of(name: str, dtype: torch.dtype) -> Any:
    pair: Any = (make_rm(1, dtype, **SHAPE) if name == "sequence" else make_lm(3, dtype, **SHAPE), None)
    if name == "sequence":
        return SequenceReward(pair)
    if name == "genarm":
        return AutoregressiveReward(pair)
    return ContrastiveReward("w1", "w2")


def batch_and_single(decoder: RewardGuidedDecoder) -> list[tuple[Any, Any]]:
    """Rows of one call beside the same rows alone, each with a k of its own."""
    rng = random.Random(0)
    prompts = [[rng.randrange(6, 64) for _ in range(rng.randrange(1, 10))] for _ in range(ROWS)]
    guidance = [Guidance(k=3 + i % 4, beta=1.3, temperature=0.9) for i in range(ROWS)]
    together = decoder.generate(prompts, 5, guidance, seed=list(range(ROWS)))
    return [
        (together[i], decoder.generate([prompts[i]], 5, guidance[i], seed=i)[0]) for i in range(0, ROWS, 2)
    ]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sequence", torch.float32),
        ("sequence", torch.bfloat16),
        ("genarm", torch.float32),
        ("contrastive", torch.float32),
    ],
)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(name: str, dtype: torch.dtype, fuse: bool) -> None:
    decoder = decoder_of(reward_of(name, dtype), dtype, fuse_projections=fuse)
    for row, alone in batch_and_single(decoder):
        for number in NUMBERS:
            assert getattr(alone, number) == getattr(row, number), number


@pytest.mark.parametrize("strategy", ["best_of_n:n=3", "segment:target=1", "blockwise:k=2,length=3"])
def test_strategies_too(strategy: str) -> None:
    decoder = decoder_of(reward_of("sequence", torch.float32))
    prompts = [[7, 8, 9], [10], [11, 12, 13, 14], [15, 16]]
    together = decoder.generate(prompts, 6, seed=list(range(4)), strategy=strategy)
    for i, prompt in enumerate(prompts):
        alone = decoder.generate([prompt], 6, seed=i, strategy=strategy)[0]
        for number in NUMBERS:
            assert getattr(alone, number) == getattr(together[i], number), number


def test_without_it_the_bits_depend_on_the_batch() -> None:
    decoder = decoder_of(reward_of("sequence", torch.float32), batch_invariant=False)
    assert any(row.rewards != alone.rewards for row, alone in batch_and_single(decoder))


def test_the_tokens_are_those_of_plain_steps() -> None:
    rows = []
    for invariant in (False, True):
        decoder = decoder_of(reward_of("sequence", torch.float32), batch_invariant=invariant)
        prompts = [[7, 8, 9], [10], [11, 12]]
        rows.append([row.tokens for row in decoder.generate(prompts, 8, Guidance(5, temperature=0))])
    assert rows[0] == rows[1]


def test_steps_alone_use_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of a step is the op; those of a prefill, and after the step, are the library's."""
    rows: list[int] = []

    def counted(x: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(x.shape[1])
        return invariant_linear(x, *others)

    decoder = decoder_of(reward_of("sequence", torch.float32))
    monkeypatch.setattr("rgtg_fast.engine.invariance.invariant_linear", counted)
    decoder.generate([[7, 8, 9, 10, 11, 12, 13]], 1, Guidance(4))
    # Two layers of seven products in each model, the base model's head and the score head.
    assert rows.count(1) + rows.count(4) == len(rows)
    assert rows.count(1) >= 14
    assert rows.count(4) >= 14
    used = len(rows)
    layer, x = decoder.lm.runner.model.lm_head, torch.randn(3, 200)
    assert torch.equal(layer(x), functional.linear(x, layer.weight))
    decoder.score([[7, 8]], [[9, 10]])
    decoder_of(None, batch_invariant=False).generate([[7, 8]], 2)
    assert len(rows) == used


def test_products_of_any_shape() -> None:
    layer = torch.nn.Linear(6, 4)
    for shape in ((6,), (3, 6), (2, 3, 6), (2, 1, 3, 6)):
        x = torch.randn(shape)
        want = layer(x)
        with InvariantProducts():
            torch.testing.assert_close(layer(x), want)


def test_the_native_engine_needs_nothing() -> None:
    decoder = decoder_of(FunctionReward(zeros), engine="native")
    assert not decoder._scheduler.invariant
    assert len(decoder.generate([[7, 8]], 2)) == 1


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="batch_invariant=True and compile"):
        decoder_of(None, engine="auto", compile=True)
    with pytest.raises(RGTGError, match="batch_invariant=True and compile"):
        decoder_of(None).compile()
    with pytest.raises(RGTGError, match=r"own blocks \(engine='transformers'\): use engine='triton'"):
        decoder_of(None, engine="transformers")
    with pytest.raises(RGTGError, match="computes by code of its own"):
        decoder_of(FunctionReward(zeros))
    lm: Any = make_lm(**SHAPE)
    adapter = SequenceReward(write_adapter(tmp_path, lm, fork=1), share_trunk=True)
    with pytest.raises(RGTGError, match="runs an adapter in its forward: use share_trunk=False"):
        RewardGuidedDecoder.from_pretrained(
            (lm, make_tokenizer()), adapter, engine="triton", batch_invariant=True
        )
    small: Any = make_lm(hidden_size=64, intermediate_size=96)
    quantize_layers(small, "int4")
    with pytest.raises(RGTGError, match=r"has quantized weights \(int4\): use the unquantized model"):
        RewardGuidedDecoder.from_pretrained((small, make_tokenizer()), engine="triton", batch_invariant=True)
