"""What `inspect_decoder` says is what the decoder does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rgtg_fast import (
    ContrastiveReward,
    FunctionReward,
    MixtureReward,
    RewardGuidedDecoder,
    SequenceReward,
    TextReward,
)
from rgtg_fast.evaluation.inspection import cached_difference, inspect_decoder
from tests.models.kinds.tiny import byte_tokenizer, language_model, reward_model

CHAT = [{"role": "user", "content": "Hi"}]


def _decoder(reward: Any = None, **settings: Any) -> RewardGuidedDecoder:
    pair = (language_model("llama"), byte_tokenizer())
    return RewardGuidedDecoder.from_pretrained(pair, reward=reward, **settings)


def _sequence() -> SequenceReward:
    return SequenceReward((reward_model("qwen2"), byte_tokenizer()))


def test_ids_and_a_function() -> None:
    """Without a tokenizer, texts are ids."""
    reward = FunctionReward(lambda prefix_ids, candidate_ids: -candidate_ids.float())
    decoder = RewardGuidedDecoder.from_pretrained((language_model("gpt2"), None), reward=reward)
    report = inspect_decoder(decoder, [5, 6, 7])
    (model,) = report["models"]
    assert (model["architecture"], model["engine"]) == ("GPT2LMHeadModel", "transformers")
    assert model["why"].startswith("GPT2Model is not one of LlamaModel")
    assert report["prompts"] == [{"reader": "language model", "text": "5 6 7", "tokens": 3}]
    assert report["tokenizers"] == []
    assert report["cached_vs_uncached"]["reward"] == 0
    assert report["cached_vs_uncached"]["tokens"] == 8


def test_a_mixture_has_its_parts() -> None:
    report = inspect_decoder(_decoder(MixtureReward([_sequence(), ContrastiveReward()])), CHAT)
    assert [model["role"] for model in report["models"]] == ["language model", "reward model"]
    assert [reward["heads"] for reward in report["rewards"]] == [["linear, 32 to 1"], []]
    assert [reward["scores_vocabulary"] for reward in report["rewards"]] == [False, True]
    texts = [prompt["text"] for prompt in report["prompts"]]
    assert texts[0] == texts[1] == "<s>user: Hi</s><s>assistant: "
    assert texts[2].startswith("<s>system: You are a thoughtful")
    assert [each["difference"] for each in report["tokenizers"]] == [None]


def test_a_reward_over_texts_shows_its_head() -> None:
    pair = (reward_model("llama", normalize_reward=True, mean=0.5, std=2.0), byte_tokenizer())
    report = inspect_decoder(_decoder(TextReward(pair)), CHAT)
    (reward,) = report["rewards"]
    (head,) = reward["heads"]
    assert "linear" in head
    assert "normalized by mean 0.5 and std 2" in head


def test_the_engine_that_was_asked_for() -> None:
    (model,) = inspect_decoder(_decoder(engine="transformers"), CHAT)["models"]
    assert (model["engine"], model["why"]) == ("transformers", "engine='transformers' was asked for")


def test_the_triton_engine() -> None:
    (model,) = inspect_decoder(_decoder(engine="triton"), CHAT)["models"]
    assert model["engine"] == "triton"
    assert model["why"] == "fused kernels between its matrix products can execute it"


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 16}, {"tokens": 16, "layers": 2, "of": 2}),
        ("mistral", {"sliding_window": None}, None),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            {"tokens": 16, "layers": 1, "of": 2},
        ),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, None),
    ],
    ids=["llama", "mistral", "mistral-none", "qwen2", "qwen2-none"],
)
def test_windows(family: str, settings: dict[str, Any], window: dict[str, int] | None) -> None:
    pair = (language_model(family, **settings), byte_tokenizer())
    decoder = RewardGuidedDecoder.from_pretrained(pair, max_length=64)
    (model,) = inspect_decoder(decoder, CHAT)["models"]
    assert model["window"] == window


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_half_precision(engine: str) -> None:
    report = inspect_decoder(_decoder(_sequence(), engine=engine, dtype="bfloat16"), CHAT)
    assert {model["dtype"] for model in report["models"]} == {"bfloat16"}
    float32 = inspect_decoder(_decoder(_sequence(), engine=engine), CHAT)
    for name in ("row_bytes", "weight_bytes"):
        assert report["memory"][name] == pytest.approx(float32["memory"][name] / 2, rel=1e-2)
    found = report["cached_vs_uncached"]
    assert 1e-5 < found["logprob"] < 0.5


def _shifted(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A step that runs other tokens than it was given."""
    return lambda tokens, *rest, **named: step(tokens.add(1).remainder(250), *rest, **named)


@pytest.mark.parametrize("wrong", ["logprob", "reward"])
def test_a_wrong_cache_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = _decoder(_sequence())
    right = cached_difference(decoder, CHAT)
    assert max(right["logprob"], right["reward"]) <= 1e-4
    assert decoder.reward is not None
    runner = decoder.lm.runner if wrong == "logprob" else decoder.reward.models()[0]
    monkeypatch.setattr(runner, "step", _shifted(runner.step))
    found = cached_difference(decoder, CHAT)
    assert found[wrong] > 1e-2
    assert found["reward" if wrong == "logprob" else "logprob"] <= 1e-4


def test_an_answer_that_ends_at_once_is_compared_too() -> None:
    decoder = _decoder(_sequence())
    token = decoder.generate([CHAT], 1)[0].tokens[0]
    model: Any = decoder.lm.runner.model
    model.generation_config.eos_token_id = list(range(decoder.lm.vocabulary))
    assert token in decoder.lm.eos_ids
    found = cached_difference(decoder, CHAT)
    assert found["tokens"] == 1
    assert max(found["logprob"], found["reward"]) <= 1e-4
