"""Weights in 8 bits: their rounding, and a product whose bits are those of the same numbers in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rgtg_fast import RGTGError
from rgtg_fast.models.cpp_layers import NativeLayers, linear
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.models.int8 import Int8Linear, quantized
from rgtg_fast.models.quantized import quantization, quantize_layers, round_weights
from tests.conftest import make_lm, make_rm
from tests.models.cpp_rows import make


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def on_grid(model: Any) -> Any:
    """The model with bfloat16 matrices that 8 bits hold exactly: integers times a power of two for each row."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            q = torch.randint(-127, 128, module.weight.shape)
            q[:, 0] = 127
            power = torch.exp2(torch.randint(-11, -8, (len(q), 1)).float())
            module.weight = nn.Parameter((q * power).bfloat16(), requires_grad=False)
    return model


def test_numbers_are_rounded_to_the_nearest_multiple_of_the_scale() -> None:
    torch.manual_seed(0)
    # More rows than are widened at once.
    weight = (torch.randn(1500, 40) * torch.logspace(-30, 8, 1500).unsqueeze(-1)).bfloat16()
    weight[3] = 0
    q, scale = quantized(weight)
    assert (q.dtype, q.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (1500,))
    assert int(q.max()) == 127
    assert int(q.min()) >= -127
    step, wide = scale.double().unsqueeze(-1), weight.double()
    assert ((wide - q * step).abs() <= step / 2 * (1 + 1e-4)).all()
    assert (q[3] == 0).all()


def check_products(outer: int, inner: int) -> None:
    """Products of 8-bit weights are those of the integers as bfloat16, times the scales, plus the bias."""
    torch.manual_seed(0)
    q = torch.randint(-127, 128, (outer, inner), dtype=torch.int8)
    scale, bias, x = torch.rand(outer) + 0.1, torch.randn(outer), torch.randn(50, inner)
    sums = linear(x, q.bfloat16())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 27, 50):
                assert torch.equal(linear(x[:rows], q, None, scale), sums[:rows] * scale)
                assert torch.equal(linear(x[:rows], q, bias, scale), sums[:rows] * scale + bias)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("inner", [1, 5, 33, 64, 1100, 17000])
@pytest.mark.parametrize("outer", [1, 3, 6, 65])
def test_a_product_has_the_bits_of_bfloat16(outer: int, inner: int) -> None:
    check_products(outer, inner)


def states(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    native, (rows, length) = NativeLayers(model), tokens.shape
    keys, values = (
        torch.zeros(native.layers, rows, native.kv_heads, length, native.head_dim, dtype=torch.bfloat16)
        for _ in range(2)
    )
    empty, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(length).expand(rows, -1)
    return native.forward(tokens, positions, keys, values, empty, keys, values, causal=True)


def check_layers(name: str) -> None:
    """Layers whose matrices 8 bits hold exactly have the bits of bfloat16."""
    torch.manual_seed(0)
    plain = on_grid(make(name, torch.bfloat16))
    small = copy.deepcopy(plain)
    quantize_layers(small, "int8")
    for rows, length in ((1, 1), (3, 2), (2, 31)):
        tokens = torch.randint(0, 61, (rows, length))
        assert torch.equal(states(small, tokens), states(plain, tokens))


@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-wide", "qwen3", "gemma2"])
def test_layers_have_the_bits_of_bfloat16(name: str) -> None:
    check_layers(name)


def test_a_models_matrices_are_replaced_and_freed() -> None:
    model: Any = make_lm(dtype=torch.bfloat16)
    before, mark = sum(x.nbytes for x in model.parameters()), fingerprint(model)
    matrices = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    rows = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    embedding = model.get_input_embeddings().weight
    tied = model.lm_head.weight is embedding
    round_weights(model, "int8")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(type(layer) is Int8Linear for layer in layers)
    assert model.get_output_embeddings() is model.lm_head in layers
    assert model.get_input_embeddings().weight is embedding
    after = sum(x.nbytes for x in (*model.parameters(), *(layer.scale for layer in layers)))
    assert before - after == matrices // 2 - 4 * rows - (embedding.nbytes if tied else 0)
    assert fingerprint(model) == mark
    assert quantization(model) == "int8"


def test_a_reward_models_head_stays() -> None:
    model: Any = make_rm(dtype=torch.bfloat16)
    round_weights(model, "int8")
    assert type(model.score) is nn.Linear
    assert all(type(m) is Int8Linear for m in model.base_model.modules() if isinstance(m, nn.Linear))


def test_integers_and_scales_are_read_in_place() -> None:
    model = on_grid(make("llama", torch.bfloat16))
    quantize_layers(model, "int8")
    tokens, layer = torch.tensor([[3, 4]]), model.layers[0].mlp.down_proj
    first = states(model, tokens)
    layer.scale.mul_(2)
    second = states(model, tokens)
    layer.weight.neg_()
    assert not torch.equal(first, second)
    assert not torch.equal(second, states(model, tokens))


def test_a_cast_keeps_the_scales() -> None:
    layer = Int8Linear(nn.Linear(40, 3).bfloat16())
    scale = layer.scale.clone()
    layer.to(torch.float64)
    assert torch.equal(layer.scale, scale)
    assert (layer.scale.dtype, layer.weight.dtype, layer.bias.dtype) == (
        torch.float32,
        torch.int8,
        torch.float64,
    )
    x = torch.randn(2, 40, dtype=torch.float64)
    want = x @ layer.dequantized().double().T + layer.bias
    assert torch.allclose(layer(x), want, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    model: Any = make_lm()
    with pytest.raises(
        RGTGError, match=r"serve layers\.0\.self_attn\.q_proj: it is torch\.float32: use dtype="
    ):
        round_weights(model, "int8")
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    model = make_lm(dtype=torch.bfloat16)
    model.base_model.layers[1].mlp.up_proj.weight[2, 3] = torch.nan
    with pytest.raises(RGTGError, match=r"serve layers\.1\.mlp\.up_proj: it holds NaN or an infinity"):
        round_weights(model, "int8")
    for engine in ("transformers", "triton"):
        with pytest.raises(RGTGError, match=f"engine='{engine}': the native engine alone executes them"):
            round_weights(model, "int8", engine)
    x, q = torch.ones(2, 4), torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(RGTGError, match=r"must be \[V, 4\] float32 or bfloat16"):
        linear(x, q)
    with pytest.raises(RGTGError, match=r"must be \[V, 4\] int8 beside a scale"):
        linear(x, q.float(), None, torch.ones(3))
    with pytest.raises(RGTGError, match=r"the scale is \(2,\) torch\.float32: it must be \(3,\) float32"):
        linear(x, q, None, torch.ones(2))
    model = on_grid(make("llama", torch.bfloat16))
    quantize_layers(model, "int8")
    model.layers[1].mlp.up_proj = nn.Linear(40, 76, bias=False).bfloat16()
    with pytest.raises(RGTGError, match=r"layers\.1\.up_proj is a Linear, not the Int8Linear of the first"):
        NativeLayers(model)
