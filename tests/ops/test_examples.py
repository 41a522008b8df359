"""The examples that use the ops alone, and the ops as others call them: what they promise, and torch.compile."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache

from rgtg_fast import Guidance, RewardGuidedDecoder, ops
from rgtg_fast.ops import tree_attention
from tests.conftest import make_lm

FOLDER = Path(__file__).parents[2] / "examples"
V = 61

# What docs/ops.md promises to keep.
SIGNATURES = {
    "topk_logprobs": "(logits, k, guidance=None, beta=None)",
    "resample": "(logprobs, rewards, beta, temperature, seed, position)",
    "tree_attention": "(q, k, v, k_cache, v_cache, lengths, ancestors=None, scale=None, causal=False, window=None, "
    "softcap=None, sinks=None, slots=None)",
    "commit": "(k_new, v_new, k_cache, v_cache, lengths, choice, slots=None)",
    "partial_bt_loss": "(rewards, offsets, mode='eos', weight='prefix', normalizer=None)",
    "partial_bt_terms": "(offsets, mode='eos', weight='prefix')",
    "backend_of": "(name, device, dtype=torch.float32, **sizes)",
    "use_backend": "(name)",
}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", FOLDER / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_stable_signature_is_the_promised_one(name: str) -> None:
    """Names, order and defaults. A change keeps the old call for a release, and docs/ops.md and CHANGELOG.md say so."""
    signature = inspect.signature(getattr(ops, name))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]
    assert name in ops.__all__
    page = (FOLDER.parent / "docs" / "ops.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in page


def test_a_loop_of_ones_own_decodes_as_the_decoder_does() -> None:
    """Greedy and sampled: the same seeds give the same draws."""
    loop, model = example("ops_own_loop.py"), make_lm()
    prompts = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(0))
    penalty = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), None), reward=lambda *ids: penalty[ids[1]], engine="transformers"
    )
    for temperature in (0.0, 0.9):
        got = loop.generate(model, prompts, penalty, 2.0, temperature, 6)
        want = decoder.generate(
            [prompt.tolist() for prompt in prompts], 6, Guidance(50, 2.0, temperature), [0, 1]
        )
        assert got.tolist() == [row.tokens for row in want]


def naive(model: nn.Module, prompt: torch.Tensor, steps: int, k: int, beta: float) -> list[int]:
    """The decoding of ops_foreign_cache without a cache: every candidate's whole text."""
    text = prompt
    for _ in range(steps):
        logprobs, tokens = model(text[None]).logits[0, -1].log_softmax(-1).topk(k)
        texts = torch.cat([text.expand(k, -1), tokens[:, None]], 1)
        after = model(texts).logits[:, -1].log_softmax(-1)
        best = (logprobs + beta * (after.exp() * after).sum(-1)).argmax()
        text = texts[best]
    return text[len(prompt) :].tolist()


@torch.inference_mode()
def test_the_ops_over_a_static_cache_decode_as_without_a_cache() -> None:
    foreign, model = example("ops_foreign_cache.py"), make_lm()
    prompts = [torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 5)]
    got = foreign.decode(model, prompts, [2, 0], 5)
    model.set_attn_implementation("sdpa")
    assert got.tolist() == [naive(model, prompts[slot], 5, 5, 0.5) for slot in (2, 0)]


def over_one_tensor(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, T: int) -> torch.Tensor:
    """Attention of k candidates that lie behind the T tokens of the prefix, in the same tensors."""
    lengths = torch.full((len(q),), T)
    return tree_attention(
        q, keys[:, :, T:], values[:, :, T:], keys[:, :, :T], values[:, :, :T], lengths, scale=0.5
    )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_views_of_a_dynamic_cache_are_prefix_and_candidates(compiled: bool) -> None:
    """Nothing is copied, and torch.compile finds no graph break; the mask is what SDPA would need."""
    cache, T, k = DynamicCache(), 5, 3
    for count in (T, k):
        cache.update(torch.randn(2, 2, count, 8), torch.randn(2, 2, count, 8), 0)
    q = torch.randn(2, 4, k, 8)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    mask = torch.cat([torch.ones(k, T), torch.eye(k)], 1).bool()
    want = functional.scaled_dot_product_attention(q, keys, values, mask, scale=0.5, enable_gqa=True)
    attend = torch.compile(over_one_tensor, fullgraph=True, backend="eager") if compiled else over_one_tensor
    torch.testing.assert_close(attend(q, keys, values, T), want, rtol=0, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ops_own_loop.py", "ops_foreign_cache.py"])
def test_the_examples_compile_without_a_graph_break(name: str) -> None:
    module, model = example(name), make_lm()
    if name == "ops_own_loop.py":
        arguments = (model, torch.randint(3, V, (2, 7)), torch.randn(model.config.vocab_size), 2.0, 0.9, 4)
        run = module.generate
    else:
        arguments, run = (model, [torch.randint(3, V, (n,)) for n in (3, 9, 5)], [2, 0], 4), module.decode
    assert torch.equal(run(*arguments, compiled=True), run(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ops_own_loop.py", "ops_foreign_cache.py"])
def test_the_examples_run(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", [name])
    example(name).main()
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2
