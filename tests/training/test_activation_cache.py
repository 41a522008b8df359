"""Stored activations give what the whole trunk gives, and their file survives what happens to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, Qwen3Config

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.activation_cache import ActivationCache, LowerLayers
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.model import use_packed_forward
from rgtg_fast.training.packing import PackedBatch, collate, pack
from tests.conftest import make_rm
from tests.training.support import tokenized

ROOT = Path(__file__).parent.parent.parent
LAYERS = 4


def make(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        model: Any = make_rm(num_hidden_layers=LAYERS, dtype=dtype)
    elif family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, num_labels=1, pad_token_id=0
        )
        model = AutoModelForSequenceClassification.from_config(config).to(dtype).eval()
    else:
        config = Qwen3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_labels=1,
            pad_token_id=0,
        )
        model = AutoModelForSequenceClassification.from_config(config).to(dtype).eval()
    use_packed_forward(model)
    return model


def batch_of(pairs: list[TokenizedPair], budget: int = 64) -> PackedBatch:
    return collate(pairs, pack(pairs, budget), 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("fork", [1, 3, LAYERS])
def test_stored_activations_give_the_same_rewards_and_gradients(
    tmp_path: Path, family: str, fork: int
) -> None:
    model, pairs = make(family), tokenized(12)
    batch = batch_of(pairs)
    expected = model(batch=batch).logits
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = ActivationCache(tmp_path, model, pairs, fork, budget=48)
    cache.fill(model)
    lower = LowerLayers(model, fork)
    lower.detach()
    rewards = model(batch=batch, trunk_states=cache.states(batch)).logits
    # The file was filled from rows packed otherwise, so sums over padding may round differently.
    torch.testing.assert_close(rewards, expected, rtol=1e-12, atol=1e-12)
    rewards.square().sum().backward()
    upper = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert any("score" in name for name in upper)
    assert len(upper) < len(gradients)
    for name, parameter in upper.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-10)
    lower.restore()
    torch.testing.assert_close(model(batch=batch).logits, expected, rtol=0, atol=0)


def test_layers_set_aside_are_not_run_and_not_in_the_model(tmp_path: Path) -> None:
    model, pairs = make(), tokenized(3)
    names = {name for name, _ in model.named_parameters()}
    lower = LowerLayers(model, 3)
    lower.detach()
    assert {name for name, _ in model.named_parameters()} < names
    with pytest.raises(RGTGError, match="trunk_states"):
        model(batch=batch_of(pairs))
    with lower.whole():
        assert {name for name, _ in model.named_parameters()} == names


def test_a_broken_file_is_continued(tmp_path: Path) -> None:
    model, pairs = make(dtype=torch.bfloat16), tokenized(30)
    whole = ActivationCache(tmp_path / "a", model, pairs, 2, budget=64)
    whole.fill(model)
    expected = whole.path.read_bytes()
    assert len(expected) == whole.nbytes
    cache = ActivationCache(tmp_path / "b", model, pairs, 2, budget=64)
    cache.path.parent.mkdir()
    # A kill in the middle of a row leaves a part of it; what was complete is kept as it is.
    marked = bytearray(expected[: len(expected) // 2])
    marked[:4] = b"mark"
    cache.path.with_suffix(".partial").write_bytes(marked)
    cache.fill(model)
    assert cache.path.read_bytes() == b"mark" + expected[4:]
    assert not cache.path.with_suffix(".partial").exists()


def test_a_complete_file_is_not_computed_again(tmp_path: Path) -> None:
    model, pairs = make(), tokenized(6)
    ActivationCache(tmp_path, model, pairs, 2, budget=64).fill(model)
    again = ActivationCache(tmp_path, model, pairs, 2, budget=64)
    again.path.write_bytes(b"\x01" * again.nbytes)
    again.fill(model)
    assert again.path.read_bytes() == b"\x01" * again.nbytes


def test_the_file_is_named_by_all_that_decides_the_activations(tmp_path: Path) -> None:
    model, pairs = make(), tokenized(6)

    def name(model: Any = model, pairs: Any = pairs, fork: int = 2, **settings: Any) -> str:
        return ActivationCache(tmp_path, model, pairs, fork, **{"budget": 64, **settings}).path.name

    other = make()
    with torch.no_grad():
        other.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] += 1
    names = [
        name(),
        name(model=other),
        name(model=make(dtype=torch.float32)),
        name(pairs=tokenized(6, seed=1)),
        name(fork=3),
        name(eos_padding=True),
        name(autocast=True),
        name(budget=65),
    ]
    assert len(set(names)) == len(names)
    assert name(model=make()) == names[0]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.training.test_activation_cache import *
model, pairs = make(), tokenized(40)
cache = ActivationCache({str(tmp_path)!r}, model, pairs, 2, budget=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (cache.nbytes // 2, cache.nbytes // 2))
try:
    cache.fill(model)
except RGTGError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "cannot keep the trunk's activations" in line
    assert "GiB" in line
    assert not list(tmp_path.glob("*.states"))
    # What was written is good to go on from.
    model, pairs = make(), tokenized(40)
    cache = ActivationCache(tmp_path, model, pairs, 2, budget=64)
    cache.fill(model)
    assert cache.path.stat().st_size == cache.nbytes
