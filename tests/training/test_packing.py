"""Packed rows: every prefix of both answers of many pairs, as if each answer had a forward of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from rgtg_fast import RGTGError
from rgtg_fast.training.data import TokenizedPair, load_pairs, tokenize_pairs
from rgtg_fast.training.packed_attention import Packing, _flex, packed_attention
from rgtg_fast.training.packing import (
    PackedBatch,
    answer_positions,
    collate,
    cost,
    pack,
    packed_hidden,
    packed_rewards,
    pretrained,
    use_packed_attention,
)
from tests.conftest import make_rm

EOS, PAD = 1, 0


def make_pairs(seed: int = 0, count: int = 7, longest: int = 9, vocabulary: int = 64) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int) -> list[int]:
        return torch.randint(2, vocabulary, (size,), generator=generator).tolist()

    sizes = torch.randint(1, longest, (count, 3), generator=generator).tolist()
    return [TokenizedPair(ids(p), [*ids(c), EOS], [*ids(r), EOS], i) for i, (p, c, r) in enumerate(sizes)]


def packed_model(dtype: torch.dtype = torch.float64, **config: object) -> torch.nn.Module:
    model = make_rm(dtype=dtype, **config)
    use_packed_attention(model)
    if dtype == torch.float64:
        in_full_precision(model)
    return model


def in_full_precision(model: torch.nn.Module) -> None:
    """Puts PyTorch's RMSNorm where transformers' would round a float64 model's states and gradients to float32."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=module.weight.dtype)
            norm.weight = module.weight
            model.set_submodule(name, norm)


def one_by_one(model: torch.nn.Module, pairs: list[TokenizedPair], batch: PackedBatch) -> torch.Tensor:
    """Rewards from one plain forward per answer, in the batch's order."""
    rewards = []
    for i in batch.pairs:
        for answer in (pairs[i].chosen_ids, pairs[i].rejected_ids):
            ids = torch.tensor([pairs[i].prompt_ids + answer])
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            rewards.append(model.score(hidden[0, -len(answer) :])[:, 0])
    return torch.cat(rewards)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=60
    ),
    budget=st.integers(70, 300),
    eos_padding=st.booleans(),
)
def test_every_pair_is_in_one_row_and_no_row_is_over_budget(
    sizes: list[tuple[int, int, int]], budget: int, eos_padding: bool
) -> None:
    pairs = [TokenizedPair([2] * p, [3] * c, [4] * r, 10 + i) for i, (p, c, r) in enumerate(sizes)]
    rows = pack(pairs, budget, eos_padding)
    assert sorted(i for row in rows for i in row) == list(range(len(pairs)))
    used = [sum(cost(pairs[i], eos_padding) for i in row) for row in rows]
    assert max(used) <= budget
    # No two rows could be one, or the packer would have made them one.
    assert all(a + b > budget for i, a in enumerate(used) for b in used[i + 1 :])
    batch = collate(pairs, rows, PAD, budget, eos_padding)
    assert batch.packing_efficiency == pytest.approx(sum(used) / (len(rows) * budget))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**20), count=st.integers(1, 12), eos_padding=st.booleans())
def test_the_batch_holds_what_the_pairs_hold(seed: int, count: int, eos_padding: bool) -> None:
    pairs = make_pairs(seed, count)
    rows = pack(pairs, 48, eos_padding)
    batch = collate(pairs, rows, PAD, eos_padding=eos_padding)
    assert batch.input_ids.shape == (
        len(rows),
        max(sum(cost(pairs[i], eos_padding) for i in r) for r in rows),
    )
    covered = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for i, (row, start, first, second, end) in zip(batch.pairs, batch.spans.tolist(), strict=True):
        pair = pairs[i]
        longer = max(len(pair.chosen_ids), len(pair.rejected_ids)) if eos_padding else 0
        ids, positions = batch.input_ids[row], batch.position_ids[row]
        assert ids[start:first].tolist() == pair.prompt_ids
        for answer, (a, b) in ((pair.chosen_ids, (first, second)), (pair.rejected_ids, (second, end))):
            assert ids[a:b].tolist() == answer + [EOS] * (longer - len(answer))
            begin = len(pair.prompt_ids)
            assert positions[a:b].tolist() == list(range(begin, begin + b - a))
        assert positions[start:first].tolist() == list(range(len(pair.prompt_ids)))
        assert not covered[row, start:end].any()
        covered[row, start:end] = True
    assert (batch.input_ids[~covered] == PAD).all()


def test_answer_positions_are_in_the_order_of_the_loss() -> None:
    pairs = make_pairs()
    batch = collate(pairs, pack(pairs, 40), PAD)
    rows, columns, offsets = answer_positions(batch)
    tokens = batch.input_ids[rows, columns]
    answers = [tokens[a:b].tolist() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    assert answers == [ids for i in batch.pairs for ids in (pairs[i].chosen_ids, pairs[i].rejected_ids)]
    assert offsets[0] == 0
    assert offsets[-1] == len(rows)


@pytest.mark.parametrize("eos_padding", [False, True])
def test_rewards_equal_one_forward_per_answer(eos_padding: bool) -> None:
    pairs = make_pairs()
    if eos_padding:
        longer = [max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        padded = [
            TokenizedPair(
                p.prompt_ids,
                p.chosen_ids + [EOS] * (n - len(p.chosen_ids)),
                p.rejected_ids + [EOS] * (n - len(p.rejected_ids)),
                p.index,
            )
            for p, n in zip(pairs, longer, strict=True)
        ]
    model = packed_model()
    batch = collate(pairs, pack(pairs, 60, eos_padding), PAD, eos_padding=eos_padding)
    rewards, offsets = packed_rewards(model, batch)
    assert rewards.dtype == torch.float64
    assert len(rewards) == offsets[-1]
    expected = one_by_one(model, padded if eos_padding else pairs, batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-10)


def test_gradients_equal_one_forward_per_answer() -> None:
    pairs = make_pairs()
    model = packed_model()
    batch = collate(pairs, pack(pairs, 60), PAD)
    weights = torch.randn(int(answer_positions(batch)[2][-1]), dtype=torch.float64)
    gradients = []
    for rewards in (packed_rewards(model, batch)[0], one_by_one(model, pairs, batch)):
        model.zero_grad()
        (rewards * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].abs().max() > 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


def test_changing_one_answer_changes_nothing_elsewhere() -> None:
    pairs = make_pairs(longest=12)
    model = packed_model()
    rows = pack(pairs, 60)
    batch = collate(pairs, rows, PAD)
    before = packed_hidden(model, batch)
    for n, (row, _, first, second, end) in enumerate(batch.spans.tolist()):
        for a, b in ((first, second), (second, end)):
            changed = batch.input_ids.clone()
            changed[row, a:b] = (changed[row, a:b] + 7) % 62 + 2
            after = packed_hidden(model, PackedBatch(changed, batch.position_ids, batch.spans, batch.pairs))
            mine = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            mine[row, a:b] = True
            assert torch.equal(before[~mine], after[~mine]), f"span {n}"
            # Every token of the answer has changed, and so has every state of it.
            assert ((before - after).abs().amax(-1)[mine] > 1e-3).all()


def test_a_token_sees_its_prompt_and_the_answer_before_it_and_no_more() -> None:
    """The Jacobian's zeros: hidden state i depends on embedding j exactly where it should."""
    pair = TokenizedPair([2, 3], [4, 5, EOS], [6, EOS], 0)
    other = TokenizedPair([7], [8, EOS], [9, EOS], 1)
    model = packed_model()
    batch = collate([pair, other], [[0, 1]], PAD, length=13)
    embeddings = model.model.embed_tokens(batch.input_ids).detach().requires_grad_(True)
    packing = Packing(batch.spans, (1, 13))
    hidden = model.model(
        inputs_embeds=embeddings,
        position_ids=batch.position_ids,
        attention_mask=torch.zeros(1, 1, 1, 1),
        packing=packing,
        use_cache=False,
    ).last_hidden_state
    reach = torch.zeros(13, 13, dtype=torch.bool)
    for i in range(13):
        (gradient,) = torch.autograd.grad(hidden[0, i].sin().sum(), embeddings, retain_graph=True)
        reach[i] = gradient[0].abs().amax(-1) > 0
    expected = torch.zeros(13, 13, dtype=torch.bool)
    for prompt, answers in (([0, 1], ([2, 3, 4], [5, 6])), ([7], ([8, 9], [10, 11]))):
        for answer in answers:
            sequence = [*prompt, *answer]
            for n, i in enumerate(sequence):
                expected[i, sequence[: n + 1]] = True
    # Padding attends nothing; what it holds reaches its own state through the residual alone.
    expected[12, 12] = True
    assert torch.equal(reach, expected)


def test_rewards_do_not_depend_on_the_packing() -> None:
    pairs = make_pairs()
    model = packed_model()
    by_pair: dict[int, list[torch.Tensor]] = {}
    for rows in (pack(pairs, 200), [[i] for i in range(len(pairs))], [list(range(len(pairs)))]):
        batch = collate(pairs, rows, PAD, length=210)
        rewards, offsets = packed_rewards(model, batch)
        for n, i in enumerate(batch.pairs):
            by_pair.setdefault(i, []).append(rewards[offsets[2 * n] : offsets[2 * n + 2]])
    for first, *others in by_pair.values():
        for other in others:
            torch.testing.assert_close(first, other, rtol=0, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    pairs = make_pairs()
    batch = collate(pairs, pack(pairs, 60), PAD)
    gradients = []
    for checkpointing in (False, True):
        model = packed_model().train()
        if checkpointing:
            # transformers renamed it.
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
        packed_rewards(model, batch)[0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_in_lower_precision_is_near_the_exact_one(dtype: torch.dtype) -> None:
    pairs = make_pairs(longest=20)
    batch = collate(pairs, pack(pairs, 128), PAD)
    packing = Packing(batch.spans, tuple(batch.input_ids.shape))
    shape = (batch.input_ids.shape[0], 4, batch.input_ids.shape[1], 8)
    q, k, v = (torch.randn(shape[0], h, *shape[2:]).to(dtype) for h in (4, 2, 2))
    module = torch.nn.Module()
    exact, _ = packed_attention(module, q.double(), k.double(), v.double(), None, packing=packing)
    out, _ = packed_attention(module, q, k, v, None, packing=packing)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), count=st.integers(1, 10))
def test_the_mask_for_cuda_is_the_per_pair_attention(seed: int, count: int) -> None:
    """flex_attention's mask function, spelled out as a dense mask, gives what the CPU path computes."""
    pairs = make_pairs(seed, count)
    batch = collate(pairs, pack(pairs, 48), PAD)
    rows, size = batch.input_ids.shape
    packing = Packing(batch.spans, (rows, size))
    mask = create_mask(packing.mask_mod(), rows, None, size, size, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, h, size, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert dense.isfinite().all()
    per_pair, _ = packed_attention(torch.nn.Module(), q, k, v, None, packing=packing)
    for row, pairs_of_row in enumerate(packing.segments):
        used = sum(map(sum, pairs_of_row))
        torch.testing.assert_close(
            per_pair.transpose(1, 2)[row, :, :used], dense[row, :, :used], rtol=0, atol=1e-12
        )


def test_flex_attention_with_the_block_mask_is_the_per_pair_attention() -> None:
    """The same through flex_attention itself, which runs uncompiled on a CPU, over several mask blocks."""
    pairs = make_pairs(3, 40, longest=15)
    batch = collate(pairs, pack(pairs, 300), PAD)
    rows, size = batch.input_ids.shape
    packing = Packing(batch.spans, (rows, size))
    q, k, v = (torch.randn(rows, h, size, 16, dtype=torch.float64) for h in (4, 2, 2))
    flex = flex_attention(q, k, v, block_mask=packing.block_mask(), enable_gqa=True)
    per_pair = packed_attention(torch.nn.Module(), q, k, v, None, packing=packing)[0].transpose(1, 2)
    assert packing.block_mask() is packing.block_mask()
    for row, pairs_of_row in enumerate(packing.segments):
        used = sum(map(sum, pairs_of_row))
        torch.testing.assert_close(per_pair[row, :, :used], flex[row, :, :used], rtol=0, atol=1e-12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling flex_attention needs g++")
@torch.no_grad()
def test_flex_attention_compiled_is_the_per_pair_attention() -> None:
    """The call that CUDA gets, compiled for the CPU, where it has a forward alone and one length at a time."""
    pairs = make_pairs(0, 24, longest=40)
    batch = collate(pairs, pack(pairs, 512), PAD, length=512)
    rows, size = batch.input_ids.shape
    packing = Packing(batch.spans, (rows, size))
    q, k, v = (torch.randn(rows, h, size, 16) for h in (6, 2, 2))
    compiled = _flex(q, k, v, packing, None, 0.0)
    per_pair = packed_attention(torch.nn.Module(), q, k, v, None, packing=packing)[0].transpose(1, 2)
    for row, pairs_of_row in enumerate(packing.segments):
        used = sum(map(sum, pairs_of_row))
        torch.testing.assert_close(per_pair[row, :, :used], compiled[row, :, :used], rtol=0, atol=1e-5)
    with pytest.raises(RGTGError, match=r"attention dropout 0\.1 is not available"):
        _flex(q, k, v, packing, None, 0.1)


FAMILIES = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gpt_neox": GPTNeoXConfig,
    "gpt2": GPT2Config,
    "opt": OPTConfig,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}}.get(
        family,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            **({"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {"intermediate_size": 48}),
            **({} if family in ("opt", "gpt_neox") else {"num_key_value_heads": 2, "head_dim": 8}),
        },
    )
    config = FAMILIES[family](vocab_size=64, num_labels=1, pad_token_id=0, bos_token_id=2, **sizes)
    torch.manual_seed(0)
    try:
        model = AutoModelForSequenceClassification.from_config(config).double().eval()
    except ValueError as error:
        pytest.skip(f"transformers has no sequence classifier of {family}: {error}")
    use_packed_attention(model)
    pairs = make_pairs()
    batch = collate(pairs, pack(pairs, 60), PAD)
    rewards, _ = packed_rewards(model, batch)
    torch.testing.assert_close(rewards, one_by_one(model, pairs, batch), rtol=0, atol=1e-10)


def test_a_model_stays_itself_outside_packed_rows() -> None:
    plain, packed = make_rm(), packed_model(torch.float32)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(plain(ids, attention_mask=mask).logits, packed(ids, attention_mask=mask).logits)


def test_wrapped_models_are_found() -> None:
    model = packed_model()
    wrapped = torch.nn.Sequential(torch.nn.Identity(), model)
    assert pretrained(wrapped) is model
    pairs = make_pairs()
    batch = collate(pairs, pack(pairs, 60), PAD)
    assert torch.equal(packed_rewards(wrapped, batch)[0], packed_rewards(model, batch)[0])


def test_bad_input_is_named() -> None:
    pairs = make_pairs()
    with pytest.raises(
        RGTGError, match=r"pair \d+ has \d+ tokens and a row holds 5: use a token budget of at least"
    ):
        pack(pairs, 5)
    with pytest.raises(RGTGError, match="no pair in a row"):
        collate(pairs, [], PAD)
    with pytest.raises(RGTGError, match="no pair in a row"):
        collate(pairs, [[0], []], PAD)
    with pytest.raises(RGTGError, match="length=3: pack with this budget"):
        collate(pairs, [[0]], PAD, length=3)
    with pytest.raises(RGTGError, match="contains no transformers model"):
        pretrained(torch.nn.Linear(1, 1))
    batch = collate(pairs, pack(pairs, 60), PAD)
    labels = make_rm(num_labels=2)
    use_packed_attention(labels)
    with pytest.raises(RGTGError, match="2 labels and a reward is 1"):
        packed_rewards(labels, batch)
    with pytest.raises(RGTGError, match="no `score` head"):
        packed_rewards(make_rm().model, batch)


def test_a_sliding_window_shorter_than_a_pair_is_refused() -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        num_labels=1,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    use_packed_attention(model)
    pairs = [TokenizedPair([3, 4, 5], [6, 7, EOS], [8, EOS], 0), TokenizedPair([3] * 5, [6] * 4, [7] * 2, 1)]
    packed_rewards(model, collate(pairs, [[0]], PAD))
    with pytest.raises(RGTGError, match=r"has 9 tokens and .* a window of 8: use max_length=8"):
        packed_rewards(model, collate(pairs, [[0, 1]], PAD))


def test_a_pair_beyond_the_original_context_of_a_longrope_is_refused() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 5.0, 0.3, 9.0],
        "factor": 8.0,
        "original_max_position_embeddings": 8,
    }
    model = make_rm(rope_parameters=rope)
    use_packed_attention(model)
    pairs = [TokenizedPair([3, 4, 5], [6, 7, EOS], [8, EOS], 0), TokenizedPair([3] * 5, [6] * 4, [7] * 2, 1)]
    packed_rewards(model, collate(pairs, [[0]], PAD))
    with pytest.raises(RGTGError, match=r"has 9 tokens and the longrope .* beyond 8, .*: use max_length=8"):
        packed_rewards(model, collate(pairs, [[0, 1]], PAD))


def hh_data() -> Path:
    folder = Path(
        os.environ.get("RGTG_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    ).absolute()
    if not (folder / "hh_guide_train.jsonl.gz").is_file():
        pytest.skip(f"hh_guide_train.jsonl.gz is not in {folder}: set RGTG_DATA to its folder")
    return folder


@pytest.mark.model
@pytest.mark.parametrize("eos_padding", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_of_real_preferences_are_full(smollm2: Path, eos_padding: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    pairs, report = load_pairs(hh_data() / "hh_guide_train.jsonl.gz")
    assert report.read == report.kept == 4278
    tokenized, report = tokenize_pairs(pairs, tokenizer, max_length=512)
    assert report.kept + report.dropped == report.read
    rows = pack(tokenized, 2048, eos_padding)
    filled = sum(cost(pair, eos_padding) for pair in tokenized) / (len(rows) * 2048)
    assert filled >= 0.95


@pytest.mark.model
def test_rewards_of_a_real_model_equal_one_forward_per_answer(smollm2: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForSequenceClassification.from_pretrained(smollm2, num_labels=1, dtype=torch.float32)
    model.score.weight.data.normal_(0, 0.05)
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is the number {n}.", "rejected": "No idea" + " at all" * n}
        for n in range(3)
    ]
    pairs, _ = tokenize_pairs(load_pairs(rows)[0], tokenizer, chat=True)
    use_packed_attention(model)
    with torch.no_grad():
        batch = collate(pairs, pack(pairs, 256), tokenizer.eos_token_id)
        rewards, _ = packed_rewards(model, batch)
        expected = one_by_one(model, pairs, batch)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-4)
