"""All layers of SmolLM2-135M's shape (random weights) against transformers' own forward, cache included."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from rgtg_fast.models.cpp_layers import NativeLayers
from rgtg_fast.models.kv_cache import cache_keyword

pytestmark = pytest.mark.usefixtures("cpp_only")


@functools.cache
def model(dtype: torch.dtype) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
    )
    return LlamaModel(config).to(dtype).eval()


def assert_near(actual: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    # In bfloat16 most of the difference is the other side's: it rounds after every operation.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-1
    assert (actual - wanted.float()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("prefix", [128, 2048])
@pytest.mark.parametrize("candidates", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_step(benchmark, who, dtype, candidates, prefix):
    """k candidates over one prefix; transformers gets the prefix replicated beforehand, its best case."""
    trunk = model(dtype)
    native = NativeLayers(trunk)
    keys, values = (torch.randn(30, 1, 3, prefix + 1, 64).to(dtype) for _ in range(2))
    k_new, v_new = (torch.empty(30, 1, 3, candidates, 64, dtype=dtype) for _ in range(2))
    tokens = torch.randint(0, 49152, (1, candidates))
    lengths = torch.tensor([prefix])
    positions = lengths[:, None].expand(1, candidates)
    cache = DynamicCache()
    for layer in range(30):
        cache.update(
            keys[layer, :, :, :prefix].repeat(candidates, 1, 1, 1),
            values[layer, :, :, :prefix].repeat(candidates, 1, 1, 1),
            layer,
        )

    def ours() -> torch.Tensor:
        return native.forward(tokens, positions, keys, values, lengths, k_new, v_new)

    def theirs() -> torch.Tensor:
        given = {cache_keyword(LlamaModel): cache}
        out = trunk(input_ids=tokens.T, position_ids=positions.T, use_cache=True, **given)
        cache.crop(-1)
        return out.last_hidden_state.transpose(0, 1)

    with torch.inference_mode():
        assert_near(ours(), theirs(), dtype)
        benchmark.pedantic(ours if who == "ours" else theirs, rounds=10, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_prefill(benchmark, who, dtype, tokens):
    trunk = model(dtype)
    native = NativeLayers(trunk)
    keys, values = (torch.empty(30, 1, 3, tokens, 64, dtype=dtype) for _ in range(2))
    text = torch.randint(0, 49152, (1, tokens))
    positions = torch.arange(tokens)[None]
    lengths = torch.zeros(1, dtype=torch.int64)

    def ours() -> torch.Tensor:
        return native.forward(text, positions, keys, values, lengths, keys, values, causal=True)

    def theirs() -> torch.Tensor:
        return trunk(input_ids=text, use_cache=False).last_hidden_state

    with torch.inference_mode():
        assert_near(ours(), theirs(), dtype)
        benchmark.pedantic(ours if who == "ours" else theirs, rounds=3, iterations=1, warmup_rounds=1)
