"""Weights in 4 bits: PyTorch's product against the weights that it stands for, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from rgtg_fast import RGTGError
from rgtg_fast.models.int4 import Int4Linear, dequantized, quantized
from rgtg_fast.models.quantized import quantize_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIG: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "num_labels": 1,
}


def linear(rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).to(dtype)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_the_nearest_of_sixteen(group: int, dtype: torch.dtype) -> None:
    weight = linear(32, 128, dtype).weight.detach()
    q, scales = quantized(weight, group)
    assert q.dtype == torch.uint8
    assert int(q.max()) <= 15
    assert scales.shape == (128 // group, 32, 2)
    # Half a step, and what the dtype rounds scale and zero point by.
    step = scales[..., 0].float().T.repeat_interleave(group, 1)
    slack = 16 * torch.finfo(dtype).eps * weight.float().abs().amax()
    assert ((dequantized(q, scales) - weight.float()).abs() <= step / 2 + slack).all()


def test_equal_numbers_and_extremes_are_kept() -> None:
    weight = torch.full((16, 32), 0.75)
    assert torch.allclose(dequantized(*quantized(weight, 32)), weight)
    weight = torch.linspace(-3, 4.5, 16).repeat(16, 2)
    torch.testing.assert_close(dequantized(*quantized(weight, 32)), weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (64, 576), (32, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_the_product_is_that_of_the_rounded_weight(
    rows: int, columns: int, dtype: torch.dtype, bias: bool
) -> None:
    layer = linear(rows, columns, dtype, bias)
    small = Int4Linear(layer)
    weight = dequantized(*quantized(layer.weight, small.group)).double()
    x = torch.randn(2, 3, columns).to(dtype)
    shift = None if layer.bias is None else layer.bias.double()
    want = nn.functional.linear(x.double(), weight, shift)
    error = (small(x).double() - want).norm() / want.norm()
    assert error <= {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert small.packed.nbytes == layer.weight.numel() / 2


def test_a_models_layers_are_replaced_and_its_head_and_embedding_stay() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**CONFIG, pad_token_id=0)).eval()
    plain = copy.deepcopy(model)
    before = sum(parameter.nbytes for parameter in model.parameters())
    saved = quantize_layers(model, "int4")
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Int4Linear) == 14
    assert kinds.count(nn.Linear) == 1
    after = sum(
        x.nbytes for x in (*model.parameters(), *(b for n, b in model.named_buffers() if "rotary" not in n))
    )
    assert before - after == saved > 0
    # The rounded weights in plain layers give the same states.
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            weight = plain.get_submodule(name).weight
            weight.data = dequantized(*quantized(weight.data, module.group))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        own, want = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**{**CONFIG, "intermediate_size": 88}, pad_token_id=0)
    )
    with pytest.raises(
        RGTGError, match=r"does not serve layers\.0\.mlp\.gate_proj: it is \[88, 64\]: outputs must be"
    ):
        quantize_layers(model, "int4")
    assert not any(isinstance(module, Int4Linear) for module in model.modules())
    with pytest.raises(RGTGError, match="GPT2Model has no plain linear layers"):
        quantize_layers(tf.GPT2Model(tf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=10)), "int4")
    with pytest.raises(RGTGError, match=r"it is torch\.float64: use float32"):
        Int4Linear(linear(16, 32, torch.float64))
    with pytest.raises(RGTGError, match=r"it is \[16, 40\]"):
        Int4Linear(linear(16, 40))
    small = Int4Linear(linear(16, 32))
    with pytest.raises(
        RGTGError, match=r"packed for torch\.float32 on cpu: load the model again for torch\.bfloat16"
    ):
        small.to(torch.bfloat16)
    assert small.to(torch.float32) is small
