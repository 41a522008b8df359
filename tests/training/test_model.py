"""Reward models made from language models: what is trained, and that every loader gives the same rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.training.launch import train_reward_model
from rgtg_fast.training.model import (
    Lora,
    add_adapters,
    freeze_below,
    load_base,
    merge,
    trained_parameters,
    use_packed_forward,
)
from rgtg_fast.training.packed_attention import _ShortAttention
from rgtg_fast.training.packing import collate, pack
from tests.conftest import make_rm
from tests.training.support import needs_loaded_heads, rows, save_lm, tokenized

pytest.importorskip("peft", reason="LoRA training needs peft")


def layers_of(names: list[str]) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name}


@pytest.mark.parametrize("fork", [0, 1, 2])
def test_adapters_begin_at_the_fork(fork: int) -> None:
    model = add_adapters(make_rm(num_hidden_layers=3), fork, Lora(rank=2))
    names = [name for name, _ in trained_parameters(model)]
    assert layers_of(names) == set(range(fork, 3))
    assert all("lora_" in name or "score" in name for name in names)
    assert any("score" in name for name in names)
    # Every linear map of a layer has its two factors.
    assert sum(f"layers.{fork}." in name for name in names) == 2 * 7


def test_a_fork_above_all_layers_trains_the_head_alone() -> None:
    model = add_adapters(make_rm(num_hidden_layers=3), 3, Lora())
    assert [name.split(".")[-1] for name, _ in trained_parameters(model)] == ["weight"]
    assert "score" in trained_parameters(model)[0][0]


def test_full_training_from_a_fork_freezes_what_is_below() -> None:
    model: Any = make_rm(num_hidden_layers=3)
    freeze_below(model, 2)
    names = [name for name, _ in trained_parameters(model)]
    assert layers_of(names) == {2}
    assert {"model.norm.weight", "score.weight"} <= set(names)
    assert "model.embed_tokens.weight" not in names


def test_a_packed_forward_gives_the_rewards_of_one_answer_at_a_time() -> None:
    model: Any = make_rm(dtype=torch.float64)
    pairs = tokenized(5)
    expected = []
    with torch.no_grad():
        for pair in pairs:
            for answer in (pair.chosen_ids, pair.rejected_ids):
                ids = torch.tensor([[*pair.prompt_ids, *answer]])
                hidden = model.base_model(ids).last_hidden_state
                expected.append(model.score(hidden)[0, len(pair.prompt_ids) :, 0])
        use_packed_forward(model)
        batch = collate(pairs, [list(range(5))], 0)
        rewards = model(batch=batch).logits
        torch.testing.assert_close(rewards, torch.cat(expected), rtol=1e-12, atol=1e-12)
        # An ordinary forward is what it was.
        assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 1)


def test_the_new_head_is_zero_and_padding_is_not_eos(tmp_path: Path) -> None:
    folder = save_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_base(folder)
    assert not model.get_parameter("score.weight").any()
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id


def test_a_trained_head_is_kept(tmp_path: Path) -> None:
    rm: Any = make_rm()
    rm.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(save_lm(tmp_path / "lm")).save_pretrained(tmp_path)
    model, _ = load_base(tmp_path)
    assert torch.equal(model.get_parameter("score.weight"), rm.score.weight)


@needs_loaded_heads
@pytest.mark.parametrize("fork", [0, 2, 3])
def test_every_loader_gives_the_same_rewards(tmp_path: Path, fork: int) -> None:
    base = save_lm(tmp_path / "lm")
    seen: dict[str, Any] = {}

    def keep(scores: Any) -> dict[str, Any]:
        seen["scores"] = scores
        return {}

    train_reward_model(
        base,
        rows(40),
        tmp_path / "guide",
        eval_data=rows(6, seed=1),
        merged=tmp_path / "whole",
        metrics=keep,
        fork_layer=fork,
        token_budget=128,
        gradient_accumulation_steps=1,
        learning_rate=0.01,
        device="cpu",
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "guide")
    adapters = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "guide", num_labels=1, pad_token_id=tokenizer.pad_token_id
    ).eval()
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    for row, (chosen, rejected) in zip(rows(6, seed=1), seen["scores"], strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        for answer, rewards in ((row["chosen"], chosen), (row["rejected"], rejected)):
            ids = tokenizer(f"{prompt} {answer} <eos>", add_special_tokens=False, return_tensors="pt")
            assert ids["input_ids"].shape[1] > len(rewards)
            with torch.no_grad():
                for model in (adapters, whole):
                    assert model(**ids).logits.item() == pytest.approx(rewards[-1], abs=1e-4)
    assert max(abs(r) for pair in seen["scores"] for answer in pair for r in answer) > 0.01
    served = Adapter.load(tmp_path / "guide")
    assert served.fork == (None if fork == 3 else fork)


def test_what_cannot_be_a_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="num_labels=1"):
        load_base((make_rm(num_labels=2), None))  # pyright: ignore[reportArgumentType]
    with pytest.raises(RGTGError, match="nowhere' does not exist: check the path"):
        load_base(tmp_path / "nowhere")
    with pytest.raises(RGTGError, match=r"no adapter_config\.json"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(RGTGError, match="rank 0"):
        Lora(rank=0)


def test_short_attention_has_the_gradient_of_attention() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = random(4, 3, 8), random(2, 5, 8), random(2, 5, 8)
    hidden = torch.ones(3, 5, dtype=torch.bool).triu(3)
    mask = torch.zeros(3, 5, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, scale=0.3, enable_gqa=True
    )[0]
    torch.testing.assert_close(_ShortAttention.apply(q, k, v, mask, 0.3), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: _ShortAttention.apply(*x, mask, 0.3), (q, k, v))


def test_packed_rows_in_bfloat16_are_as_near_as_bfloat16_is() -> None:
    pairs = tokenized(12)
    batch = collate(pairs, pack(pairs, 64), 0)
    errors = {}
    for dtype in (torch.float64, torch.bfloat16):
        model: Any = make_rm(dtype=torch.float64).to(dtype)
        use_packed_forward(model)
        with torch.no_grad():
            errors[dtype] = model(batch=batch).logits.double()
    error = (errors[torch.bfloat16] - errors[torch.float64]).norm() / errors[torch.float64].norm()
    assert error < 0.1
