"""The ops of a model's layers against transformers' own modules and torch, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rgtg_fast import RGTGError
from rgtg_fast.ops import act_and_mul, add_rms_norm, backend_of, invariant_linear, rope_and_store
from tests.ops.specs import SPECS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = {"add_rms_norm": add_rms_norm, "rope_and_store": rope_and_store, "act_and_mul": act_and_mul}
OPS["invariant_linear"] = invariant_linear


def own_norm(weight: torch.Tensor, eps: float, offset: float) -> torch.nn.Module:
    """transformers' norm: Gemma's where the weight has an offset, else Llama's."""
    module: Any = (GemmaRMSNorm if offset else LlamaRMSNorm)(len(weight), eps)
    module.weight = torch.nn.Parameter(weight)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPECS["add_rms_norm"].shapes, ids=str)
@torch.no_grad()
def test_add_rms_norm_is_the_models_own(shape: dict[str, Any], dtype: torch.dtype) -> None:
    a = SPECS["add_rms_norm"].make_inputs(shape, dtype)
    normed, total = add_rms_norm(**a)
    stream = a["x"] if a["residual"] is None else a["x"] + a["residual"]
    assert torch.equal(normed, own_norm(a["weight"], a["eps"], a["offset"])(stream))
    if a["residual"] is None:
        assert total.numel() == 0
    else:
        assert torch.equal(total, stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPECS["rope_and_store"].shapes, ids=str)
@torch.no_grad()
def test_rope_and_store_is_the_models_own(shape: dict[str, Any], dtype: torch.dtype) -> None:
    a = SPECS["rope_and_store"].make_inputs(shape, dtype)
    R = a["cos"].shape[-1]
    q, k = (
        a[x] if a[f"{x}_norm"] is None else own_norm(a[f"{x}_norm"], a["eps"], a["offset"])(a[x])
        for x in "qk"
    )
    turned = apply_rotary_pos_emb(q.transpose(1, 2)[..., :R], k.transpose(1, 2)[..., :R], a["cos"], a["sin"])
    want_q, want_k = (
        torch.cat([x, whole.transpose(1, 2)[..., R:]], -1) for x, whole in zip(turned, (q, k), strict=True)
    )
    out = rope_and_store(**a)
    assert torch.equal(out, want_q)
    assert torch.equal(a["k_new"], want_k)
    assert torch.equal(a["v_new"], a["v"].transpose(1, 2))
    # The rest of the cache is untouched.
    assert (a["k_new"]._base[0, :, :, :2] == 7).all()
    assert (a["v_new"]._base[:, :, :, 2 + a["q"].shape[1] :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "own"),
    [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")],
)
def test_act_and_mul_is_the_models_own(activation: str, own: str, dtype: torch.dtype) -> None:
    a = SPECS["act_and_mul"].make_inputs({"B": 2, "S": 3, "F": 70, "activation": activation}, dtype)
    assert torch.equal(act_and_mul(**a), ACT2FN[own](a["gate"]) * a["up"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPECS["invariant_linear"].shapes, ids=str)
def test_invariant_linear_is_a_linear_layer_row_by_row(shape: dict[str, Any], dtype: torch.dtype) -> None:
    a = SPECS["invariant_linear"].make_inputs(shape, dtype)
    out = invariant_linear(**a)
    want = torch.nn.functional.linear(*(None if x is None else x.double() for x in a.values()))
    torch.testing.assert_close(out, want.to(dtype))
    for row in range(shape["B"]):
        assert torch.equal(invariant_linear(**{**a, "x": a["x"][row : row + 1]}), out[row : row + 1])


def test_the_order_of_a_sum_follows_from_the_weight_alone() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: the split of a sum is NOT tested")
    from rgtg_fast.ops.invariant_linear.kernel import LEAST_SPAN, split

    for N, K in ((1, 1), (576, 576), (4096, 4096), (4096, 14336), (128256, 4096), (1, 14336)):
        parts, span = split(N, K)
        assert span >= LEAST_SPAN
        # Every block of every dtype begins a part where it begins: the same terms in the same order for any M.
        assert span % 128 == 0
        assert (parts - 1) * span < K <= parts * span
    assert split(4096, 4096)[0] == 5
    assert split(128256, 4096)[0] == 1


def test_the_references_serve_on_the_cpu() -> None:
    for name in OPS:
        assert backend_of(name, "cpu") == "reference"
        assert not SPECS[name].has_cpp
    assert backend_of("add_rms_norm", "cuda", E=16385) == "reference"
    assert backend_of("rope_and_store", "cuda", D=513) == "reference"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("add_rms_norm", {"x": torch.ones(2, 3)}, r"x has shape \[2, 3\]: use \[B, S, E\]"),
        ("add_rms_norm", {"weight": torch.ones(3)}, r"weight has shape \[3\]: use \[E\] = \[40\]"),
        ("add_rms_norm", {"residual": torch.ones(3, 5, 40).double()}, "residual has dtype torch.float64"),
        ("act_and_mul", {"activation": "relu"}, "activation='relu' is unknown: use one of 'silu', 'gelu_tanh'"),
        ("act_and_mul", {"up": torch.ones(1, 5, 40)}, r"up has shape \[1, 5, 40\]"),
        ("act_and_mul", {"gate": torch.ones(3, 5, 40).int()}, "gate has dtype torch.int32"),
        ("rope_and_store", {"cos": torch.ones(2, 5, 3)}, "cos has 3 angles for heads of 64 numbers"),
        ("rope_and_store", {"sin": torch.ones(2, 5, 32)}, r"sin has shape \[2, 5, 32\]"),
        ("rope_and_store", {"k_new": torch.ones(2, 3, 5, 1).expand(2, 3, 5, 64)}, "last dimension must be contig"),
        ("rope_and_store", {"v_new": torch.ones(1, 3, 5, 64).expand(2, 3, 5, 64)}, "v_new is written in place"),
        ("rope_and_store", {"q_norm": torch.ones(3)}, r"q_norm has shape \[3\]"),
        ("invariant_linear", {"x": torch.ones(5, 300)}, r"x has shape \[5, 300\] .*: use \[B, S, K\] and \[N, K\]"),
        ("invariant_linear", {"weight": torch.ones(70, 301)}, r"x has shape \[3, 5, 300\]"),
        ("invariant_linear", {"bias": torch.ones(71)}, r"bias has shape \[71\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    a = SPECS[name].make_inputs(SPECS[name].shapes[1], torch.float32)
    with pytest.raises(RGTGError, match=message):
        OPS[name](**{**a, **change})
