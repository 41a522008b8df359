"""The fused CPU layers against transformers' own uncached forward, and their bit-exactness."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, GPT2Config, LlamaConfig

from rgtg_fast import Guidance, RewardGuidedDecoder
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.cpp_layers import NativeLayers, linear
from rgtg_fast.ops import _extension
from tests.conftest import make_lm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.models.cpp_rows import CONFIGS, SHAPE, Rows, make

pytestmark = pytest.mark.skipif(
    _extension.load(warn=False) is None, reason="the C++ extension is not built here"
)

# Largest difference from float32 transformers over the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def expected(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, E] of a whole text by transformers."""
    return model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]


def assert_near(actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    assert not actual.isnan().any()
    difference = (actual - reference).abs().max() / reference.abs().max()
    assert difference <= TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_uncached_forward(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    reference = make(name, dtype).float()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 61, (n,), generator=generator) for n in (1, 9, 30)]
    rows = Rows(model, len(texts))
    for row, text in enumerate(texts):
        cut = len(text) // 3
        parts = [rows.prefill(row, part) for part in (text[:cut], text[cut:]) if len(part)]
        assert_near(torch.cat(parts), expected(reference, text), dtype)
    for count in (1, 5, 3):
        candidates = torch.randint(0, 61, (len(texts), count), generator=generator)
        hidden, k_new, v_new = rows.step(candidates)
        for row, text in enumerate(texts):
            for j, token in enumerate(candidates[row]):
                assert_near(hidden[row, j], expected(reference, torch.cat([text, token[None]]))[-1], dtype)
        choice = torch.randint(0, count, (len(texts),), generator=generator)
        rows.commit(k_new, v_new, choice)
        texts = [torch.cat([text, candidates[row, choice[row], None]]) for row, text in enumerate(texts)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_matches_on_a_long_prompt(name: str) -> None:
    """More tokens than pass through a layer at once."""
    model = make(name)
    text = torch.randint(0, 61, (401,))
    assert_near(Rows(model, 1, 401).prefill(0, text), expected(model, text), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3"])
def test_a_prompt_has_the_same_bits_wherever_the_layers_cut_it(name: str, dtype: torch.dtype) -> None:
    """Tokens pass through a layer in pieces counted over the batch: the second and third row are cut elsewhere."""
    model = make(name, dtype)
    for window in (7, 100, 256):
        for layer in model.layers:
            holder = layer.self_attn if hasattr(layer.self_attn, "sliding_window") else model.config
            if getattr(holder, "sliding_window", None):
                holder.sliding_window = window
        text, before = torch.randint(0, 61, (301,)), torch.randint(0, 61, (90,))
        alone, batch = Rows(model, 1, 400), Rows(model, 3, 400)
        alone.prefill(0, before)
        reference = alone.prefill(0, text)
        for row in range(3):
            batch.prefill(row, before)
        new = slice(len(before), len(before) + len(text))
        keys, values = batch.keys[:, :, :, new], batch.values[:, :, :, new]
        positions = torch.arange(new.start, new.stop).expand(3, -1)
        inputs = (text.expand(3, -1), positions, batch.keys, batch.values, batch.lengths, keys, values)
        for states in batch.native.forward(*inputs, causal=True):
            assert torch.equal(states, reference)


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "gemma3"])
def test_matches_for_a_tree(name: str) -> None:
    """Masks: tokens 0-1-3 and 0-2 are two branches."""
    model = make(name)
    prefixes = [torch.randint(0, 61, (n,)) for n in (4, 11)]
    rows = Rows(model, 2)
    for row, prefix in enumerate(prefixes):
        rows.prefill(row, prefix)
    tokens = torch.randint(0, 61, (2, 4))
    depth = torch.tensor([0, 1, 1, 2])
    masks = torch.tensor([0b0001, 0b0011, 0b0101, 0b1011]).expand(2, 4)
    hidden, _, _ = rows.step(tokens, rows.lengths[:, None] + depth, ancestors=masks)
    for row, prefix in enumerate(prefixes):
        for branch in ([0, 1, 3], [0, 2]):
            whole = expected(model, torch.cat([prefix, tokens[row, branch]]))
            assert_near(hidden[row, branch], whole[len(prefix) :], torch.float32)


def test_sees_weights_changed_in_place() -> None:
    model = make("llama")
    rows = Rows(model, 1)
    model.layers[1].mlp.down_proj.weight.mul_(0.5)
    text = torch.tensor([3, 1, 4, 1, 5])
    assert_near(rows.prefill(0, text), expected(model, text), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama-wide", "gemma2"])
def test_rows_are_the_same_bits_in_any_batch_on_any_threads(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    lengths = (3, 1, 40, 17, 300)
    texts = [torch.randint(0, 61, (n,)) for n in lengths]
    candidates = torch.randint(0, 61, (len(texts), 7))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows = Rows(model, len(texts), 304)
            prefills = [rows.prefill(row, text) for row, text in enumerate(texts)]
            together, k_new, v_new = rows.step(candidates)
            for row, text in enumerate(texts):
                alone = Rows(model, 1, 304)
                assert torch.equal(alone.prefill(0, text), prefills[row])
                for width in (1, 7):
                    hidden, k_alone, v_alone = alone.step(candidates[row : row + 1, :width])
                    assert torch.equal(hidden[0], together[row, :width])
                    assert torch.equal(k_alone[:, 0], k_new[:, row, :, :width])
                    assert torch.equal(v_alone[:, 0], v_new[:, row, :, :width])
            results.append([*prefills, together])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_with_an_adapter_are_the_same_bits_in_any_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every other row has the adapter's updates, as in the forward that a shared trunk's reward takes part in."""
    model = make("llama-wide", dtype)
    adapter = Adapter.load(write_adapter(tmp_path, model, rank=5, head=None))
    texts = [torch.randint(0, 61, (n,)) for n in (3, 1, 40, 17, 9, 5, 2, 30, 12)]
    threads = torch.get_num_threads()

    def steps(chosen: list[int]) -> list[torch.Tensor]:
        """States of one token and of seven after each chosen text, [texts, branches, S, E]."""
        rows = Rows(model, 2 * len(chosen))
        rows.native.adapt([adapter])
        for row, index in enumerate(chosen):
            for branch in range(2):
                rows.prefill(2 * row + branch, texts[index])
        found = []
        for width in (1, 7):
            tokens = torch.arange(width).expand(2 * len(chosen), -1)
            states = rows.step(tokens, branches=2)[0]
            found.append(states.unflatten(0, (len(chosen), 2)))
        return found

    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            together = steps(list(range(len(texts))))
            assert not torch.equal(together[0][:, 0], together[0][:, 1])
            for index in range(len(texts)):
                for alone, batch in zip(steps([index]), together, strict=True):
                    assert torch.equal(alone[0], batch[index])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_slots_give_the_bits_of_leading_rows(name: str, dtype: torch.dtype) -> None:
    """Any subset of the rows, in any order; the slots of the others hold NaN and lengths outside the cache."""
    model = make(name, dtype)
    texts = [torch.randint(0, 61, (n,)) for n in (3, 200, 40, 1)]
    rows, slots = Rows(model, 4, 210), torch.tensor([5, 0, 6, 2])
    for row, text in enumerate(texts):
        rows.prefill(row, text)
    cache = []
    for part in (rows.keys, rows.values):
        whole = part.new_full((part.shape[0], 7, *part.shape[2:]), torch.nan)
        cache.append(whole.index_copy_(1, slots, part))
    lengths = torch.full((7,), 999).index_copy_(0, slots, rows.lengths)
    candidates = torch.randint(0, 61, (4, 5))
    together = rows.step(candidates)
    before = [part.clone() for part in cache]
    for chosen in ([0, 1, 2, 3], [2, 0], [3]):
        positions = rows.lengths[chosen, None].expand(-1, 5)
        new = [torch.empty_like(part[:, chosen]) for part in together[1:]]
        hidden = rows.native.forward(
            candidates[chosen], positions, *cache, lengths, *new, slots=slots[chosen]
        )
        assert torch.equal(hidden, together[0][chosen])
        assert all(torch.equal(a, b[:, chosen]) for a, b in zip(new, together[1:], strict=True))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(cache, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([0, 3])}, "slots are .0, 3.: each must be in 0..2, the cache's slots"),
        ({"slots": torch.tensor([-1, 0])}, "slots are .-1, 0.: each must be in 0..2"),
        ({"slots": torch.tensor([0])}, "slots are .1,. torch.int64, not .2,. int64"),
        ({"slots": torch.tensor([0, 1], dtype=torch.int32)}, "slots are .2,. torch.int32"),
        ({"lengths": torch.tensor([1, 1])}, "lengths are .2,. torch.int64, not .3,. int64"),
        ({"lengths": torch.tensor([1, 1, 9])}, "lengths are .9, 1.: each must be in 0..8"),
    ],
)
def test_wrong_slots_are_one_line(change: dict[str, torch.Tensor], message: str) -> None:
    rows = Rows(make("llama"), 3, 8)
    new = [torch.empty(3, 2, 2, 1, 12) for _ in "kv"]
    arguments = {"lengths": torch.ones(3, dtype=torch.int64), "slots": torch.tensor([2, 0]), **change}
    with pytest.raises(RGTGError, match=message):
        rows.native.forward(
            torch.tensor([[1], [2]]),
            torch.tensor([[1], [1]]),
            rows.keys,
            rows.values,
            k_new=new[0],
            v_new=new[1],
            **arguments,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inner", [5, 33, 64, 1100])
@pytest.mark.parametrize("outer", [1, 6, 203])
def test_logits(outer: int, inner: int, dtype: torch.dtype) -> None:
    native = NativeLayers(make("llama"))
    hidden = torch.randn(50, inner)
    weight, bias = torch.randn(outer, inner).to(dtype), torch.randn(outer)
    everything = native.logits(hidden, weight, bias)
    reference = hidden.to(dtype).double() @ weight.double().T + bias
    assert (everything - reference).abs().max() <= 1e-5 * inner**0.5
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in [*range(1, 28), 50]:
                assert torch.equal(native.logits(hidden[:rows], weight, bias), everything[:rows])
    finally:
        torch.set_num_threads(threads)


CHOSEN = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.models.test_cpp_layers import *
from tests.models.test_int8 import check_layers, check_products
for dtype in (torch.float32, torch.bfloat16):
    for name in CONFIGS:
        if "llama" in name or "gemma" in name:
            test_matches_the_uncached_forward(name, dtype)
    for outer, inner in ((1, 5), (6, 64), (203, 33), (203, 1100)):
        test_logits(outer, inner, dtype)
test_many_rows_have_the_bits_of_one(203, 577)
test_rows_are_the_same_bits_in_any_batch_on_any_threads("llama-wide", torch.bfloat16)
for outer, inner in ((1, 5), (6, 64), (65, 33), (65, 1100)):
    check_products(outer, inner)
check_layers("llama-bias")
"""


@pytest.mark.skipif(
    "RGTG_FAST_ISA" in os.environ, reason="one instruction set is named for all tests of this run"
)
@pytest.mark.parametrize(
    "isa",
    [
        "plain",
        *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "avx512", "avx512bf16", "amx")),
    ],
)
def test_every_instruction_set(isa: str) -> None:
    """Beside the machine's best, which all other tests run on."""
    environment = {**os.environ, "RGTG_FAST_ISA": isa}
    probe = [sys.executable, "-c", "import rgtg_fast._C as c; print(c.isa())"]
    if subprocess.run(probe, env=environment, capture_output=True).returncode != 0:
        pytest.skip(f"this machine has no {isa}")
    command = [sys.executable, "-c", CHOSEN.format(root=str(Path(__file__).parents[2]))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def refusal(model: nn.Module) -> str:
    reason = NativeLayers.supported(model)
    assert reason is not None
    with pytest.raises(RGTGError, match="cannot run natively"):
        NativeLayers(model)
    return reason


def test_refusals_say_why() -> None:
    assert "GPT2Model is not one of LlamaModel" in refusal(
        AutoModel.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    )
    windowed = LlamaConfig(**SHAPE, layer_types=["sliding_attention", "full_attention", "full_attention"])
    kind = "layers of the kind 'sliding_attention' are none of its family's"
    assert kind in refusal(AutoModel.from_config(windowed))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "'dynamic'" in refusal(AutoModel.from_config(LlamaConfig(**SHAPE, rope_parameters=dynamic)))
    assert "'relu'" in refusal(AutoModel.from_config(LlamaConfig(**SHAPE, hidden_act="relu")))
    assert "torch.float16" in refusal(make("llama", torch.float16))
    mixed = make("llama")
    mixed.layers[2].mlp.up_proj.to(torch.bfloat16)
    assert "layers.2.up_proj is torch.bfloat16" in refusal(mixed)
    adapted = make("llama")

    class Adapter(nn.Linear):
        pass

    adapted.layers[0].self_attn.q_proj = Adapter(40, 48)
    assert "layers.0.q_proj is a Adapter" in refusal(adapted)


def test_wrong_tensors_are_named() -> None:
    rows = Rows(make("llama"), 2)
    with pytest.raises(RGTGError, match="k_cache is"):
        rows.native.forward(
            torch.zeros(3, 1, dtype=torch.int64),
            torch.zeros(3, 1, dtype=torch.int64),
            rows.keys,
            rows.values,
            rows.lengths,
            rows.keys[:, :, :, :1],
            rows.values[:, :, :, :1],
        )
    rows.keys = rows.keys.to(torch.bfloat16)
    with pytest.raises(RGTGError, match=r"torch\.bfloat16 on cpu, not torch\.float32"):
        rows.step(torch.zeros(2, 1, dtype=torch.int64))
    rows = Rows(make("llama"), 1)
    with pytest.raises(RGTGError, match="65 exceeds 64"):
        rows.step(torch.zeros(1, 65, dtype=torch.int64), ancestors=torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(RGTGError, match="from 61 to 61: the vocabulary has 61"):
        rows.step(torch.full((1, 1), 61))
    with pytest.raises(RGTGError, match=r"not torch\.int64"):
        rows.step(torch.zeros(1, 1, dtype=torch.int32))
    rows.lengths[0] = 65
    with pytest.raises(RGTGError, match="lengths"):
        rows.step(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RGTGError, match="the weight is"):
        rows.native.logits(torch.zeros(1, 40), torch.zeros(5, 41))


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        ("layers.1.mlp.up_proj", (3, SHAPE["hidden_size"])),
        ("layers.0.mlp.down_proj", (SHAPE["hidden_size"], 3)),
        ("layers.1.self_attn.q_proj", (1, SHAPE["hidden_size"])),
        ("layers.0.self_attn.v_proj", (0, SHAPE["hidden_size"])),
        ("layers.1.self_attn.o_proj", (SHAPE["hidden_size"], 1)),
        ("layers.1.input_layernorm", (3,)),
        ("layers.0.post_attention_layernorm", (0,)),
        ("norm", (3,)),
        ("embed_tokens", (61, 3)),
    ],
)
def test_weights_of_other_shapes_are_refused(
    where: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    model.get_submodule(where).weight = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"shape|is \("):
        NativeLayers(model)
    # The extension looks for itself.
    monkeypatch.setattr(NativeLayers, "supported", staticmethod(lambda _: None))
    with pytest.raises(ValueError, match=r"has shape|: use at least 1"):
        NativeLayers(model)


@pytest.mark.parametrize("name", ["intermediate_size", "num_hidden_layers"])
def test_a_size_of_zero_is_left_to_transformers(name: str) -> None:
    model = make_lm(**{name: 0})
    assert f"its {name} is 0" in str(NativeLayers.supported(model.base_model))
    decoder = RewardGuidedDecoder.from_pretrained((model, make_tokenizer()), reward=None)
    row = decoder.generate([[9, 8, 7]], 1, Guidance(k=1, temperature=0))[0]
    assert row.tokens == [int(model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1].argmax())]


def test_a_product_with_other_shapes_is_refused() -> None:
    x = torch.ones(2, 4)
    for weight, bias in (
        (torch.ones(3, 5), None),
        (torch.ones(4), None),
        (torch.ones(3, 4), torch.ones(2)),
        (torch.ones(3, 4), torch.ones(())),
    ):
        with pytest.raises(RGTGError, match=r"the (weight|bias) is"):
            linear(x, weight, bias)
    with pytest.raises(RGTGError, match="the weight is"):
        linear(torch.ones(2, 0), torch.ones(3, 0))
    assert linear(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert linear(x, torch.ones(0, 4)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_any_size_is_right_and_independent_of_its_rows(dtype: torch.dtype) -> None:
    """Sizes that are no multiple of a tile or a vector: what stands behind a matrix is not read."""
    for outer in (1, 2, 3, 5, 7):
        for inner in (1, 3, 17, 40, 5000):
            weight, bias = torch.randn(outer, inner).to(dtype), torch.randn(outer)
            x = torch.randn(15, inner)
            want = x.to(dtype).double() @ weight.double().T + bias
            one_by_one = torch.cat([linear(row[None], weight, bias) for row in x])
            assert (one_by_one - want).abs().max() <= 1e-5 * inner**0.5
            for rows in (2, 3, 4, 6, 12, 13, 15):
                assert torch.equal(linear(x[:rows], weight, bias), one_by_one[:rows])


def test_an_embedding_that_is_not_contiguous_is_left_to_transformers() -> None:
    model = make("llama")
    model.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight.detach().T.contiguous().T)
    assert NativeLayers.supported(model) == "its embedding is not contiguous"


@pytest.mark.parametrize(("outer", "inner"), [(128, 1), (131, 40), (203, 577), (130, 2050)])
def test_many_rows_have_the_bits_of_one(outer: int, inner: int) -> None:
    """Tiles of many rows of x add up in the order of a tile of one."""
    weight, bias, x = torch.randn(outer, inner), torch.randn(outer), torch.randn(170, inner)
    one_by_one = torch.cat([linear(row[None], weight, bias) for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (17, 31, 32, 33, 47, 64, 80, 97, 170):
                assert torch.equal(linear(x[:rows], weight, bias), one_by_one[:rows])
    finally:
        torch.set_num_threads(threads)
