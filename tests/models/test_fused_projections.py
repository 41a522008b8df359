"""Linear layers that run as one product: the same numbers, the same weights, and plain again where they must be."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.fused_projections import FusedLinear, fuse_projections
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of
from tests.models.adapters import write_adapter
from tests.models.test_families import FAMILIES

GREEDY = Guidance(k=4, beta=1.0, temperature=0)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::linear")
        return func(*args, **(kwargs or {}))


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(5, 17).view(2, 6)).logits


def joined(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().double()
    want, weights = hidden(model), {name: x.clone() for name, x in model.state_dict().items()}
    made = fuse_projections(model)
    torch.testing.assert_close(hidden(model), want, rtol=1e-12, atol=1e-12)
    for name, x in model.state_dict().items():
        assert torch.equal(x, weights[name])
    assert (made > 0) == bool(joined(model))


def test_five_products_become_two_over_the_same_memory() -> None:
    model = make_lm().eval()
    layers = len(model.model.layers)
    bytes_before = sum(x.untyped_storage().nbytes() for x in model.parameters())
    with Products() as before:
        hidden(model)
    assert fuse_projections(model) == 2 * layers
    with Products() as after:
        hidden(model)
    assert before.count - after.count == 3 * layers
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    assert sum(storages.values()) == bytes_before
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.fused.weight.data_ptr() == attention.q_proj.weight.data_ptr()
    with torch.no_grad():
        attention.k_proj.weight.fill_(0.5)
    k = len(attention.q_proj.weight)
    assert (attention.q_proj.fused.weight[k : k + len(attention.k_proj.weight)] == 0.5).all()


def test_models_with_the_same_parameters_are_joined_over_the_same_memory() -> None:
    model = make_lm().eval()
    parameters = {id(x): x for x in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=dict(parameters))
    want = hidden(model)
    for each in (model, twin, model):
        assert fuse_projections(each)
        torch.testing.assert_close(hidden(model), want)
        torch.testing.assert_close(hidden(twin), want)
    ours, theirs = (each.model.layers[1].mlp.up_proj.fused.weight for each in (model, twin))
    assert ours.data_ptr() == theirs.data_ptr()


def test_nothing_is_kept_between_forwards() -> None:
    model = make_lm().eval()
    fuse_projections(model)
    hidden(model)
    for layer in joined(model):
        assert layer.fused._input is None
        assert layer.fused._parts == ()


def test_a_layer_that_is_asked_alone_or_twice_is_right() -> None:
    model = make_lm().eval()
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 1, 3, attention.q_proj.in_features).unbind()
    want = {name: getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")}
    other = attention.k_proj(y)
    fuse_projections(model)
    with torch.inference_mode():
        for name in ("v_proj", "v_proj", "k_proj", "q_proj", "k_proj", "v_proj", "q_proj"):
            torch.testing.assert_close(getattr(attention, name)(x), want[name])
        torch.testing.assert_close(attention.k_proj(y), other)
        torch.testing.assert_close(attention.q_proj(x), want["q_proj"])


def test_gradients_reach_the_layers_own_weights() -> None:
    model = make_lm().train()
    fuse_projections(model)
    model(input_ids=torch.arange(5, 11)[None]).logits.sum().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.any() for layer in joined(model))


def test_a_copy_is_plain_and_so_is_a_converted_model() -> None:
    model = make_lm().eval()
    fuse_projections(model)
    want = hidden(model)
    twin = copy.deepcopy(model)
    assert not joined(twin)
    assert torch.equal(twin.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    torch.testing.assert_close(hidden(model), want)
    model.double()
    assert not joined(model)
    torch.testing.assert_close(hidden(model), want.double(), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_given_other_weights_is_plain() -> None:
    model = make_lm().eval()
    fuse_projections(model)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(torch.zeros_like(mlp.up_proj.weight))
    assert type(mlp.up_proj) is type(mlp.gate_proj) is nn.Linear, "both, since one product served them"
    assert type(model.model.layers[0].self_attn.q_proj) is FusedLinear
    x = torch.randn(2, 3, mlp.up_proj.in_features)
    with torch.inference_mode():
        assert not mlp.up_proj(x).any()
        torch.testing.assert_close(mlp.gate_proj(x), nn.functional.linear(x, mlp.gate_proj.weight))


def test_what_does_not_fit_stays() -> None:
    class Other(nn.Linear):
        pass

    parent = nn.Module()
    parent.gate_proj, parent.up_proj = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    assert fuse_projections(parent) == 0
    parent.up_proj = nn.Linear(4, 5, dtype=torch.float64)
    assert fuse_projections(parent) == 0
    parent.up_proj = Other(4, 5)
    assert fuse_projections(parent) == 0
    parent.up_proj = nn.Linear(4, 5)
    assert fuse_projections(parent) == 1
    assert fuse_projections(nn.ModuleDict({"gate_proj": nn.Linear(4, 3)})) == 0


@pytest.mark.parametrize("adapter", [False, True])
def test_guided_decoding_is_the_same(adapter: bool, tmp_path: Path) -> None:
    rows = []
    for join in (False, True):
        model, tokenizer = make_lm(), make_tokenizer()
        guide = write_adapter(tmp_path / "guide", model, fork=1) if adapter else (make_rm(), tokenizer)
        decoder = RewardGuidedDecoder.from_pretrained(
            (model, tokenizer),
            SequenceReward(guide),
            engine="transformers",
            fuse_projections=join,
            max_batch=2,
        )
        assert bool(joined(decoder.lm.runner.model)) is join
        rows.append([(row.tokens, row.text) for row in decoder.generate(prompts_of(5), 9, GREEDY)])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: torch.compile has nothing to compile with")
def test_the_compiler_traces_through_beside_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rows = []
    for compile in (False, True):
        model, tokenizer = make_lm(), make_tokenizer()
        decoder = RewardGuidedDecoder.from_pretrained(
            (model, tokenizer),
            SequenceReward(write_adapter(tmp_path / "guide", model, fork=1)),
            engine="transformers",
            fuse_projections=True,
            compile=compile,
            max_batch=1,
        )
        rows.append(decoder.generate([[5, 6, 7]], 6, GREEDY)[0].tokens)
        assert all(layer.fused._input is None for layer in joined(model))
    assert rows[0] == rows[1]


def test_the_native_engine_refuses() -> None:
    native = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()))
    if native.describe()["lm_engine"] != "native":
        pytest.skip("the C++ extension is missing: its refusal is NOT tested")
    assert not joined(native.lm.runner.model), "on a CPU nothing is joined unless asked for"
    with pytest.raises(RGTGError, match="fuse_projections=True and engine='native'"):
        RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), fuse_projections=True)
