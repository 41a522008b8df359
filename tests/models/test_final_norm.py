"""The final norm left out of a forward and joined with head and draw: the same rewards, families apart."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rgtg_fast import FunctionReward, Guidance, RADReward, RewardGuidedDecoder, SequenceReward
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.layers import FinalNorm
from rgtg_fast.models.loading import reward_runner
from rgtg_fast.rewards.runtime import OwnModel
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of
from tests.models.test_families import FAMILIES as PLAIN
from tests.models.windowed import FAMILIES as WINDOWED

FAMILIES = {**WINDOWED, **PLAIN}
NORMED = ("llama-gqa", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")


def reward_model(family: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).to(dtype).eval()
    norm = model.base_model.norm if family in NORMED else None
    if norm is not None:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return model


@pytest.mark.parametrize("family", NORMED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_choosing_is_scoring_and_drawing(family: str, dtype: torch.dtype) -> None:
    guide = SequenceReward((reward_model(family, dtype), None))
    runner = reward_runner(guide.source[0], "transformers", None)  # pyright: ignore
    guide._bound = OwnModel(runner, LanguageModel(runner, None, 0), None, None, "a model of its own")
    guide.reserve(2, 8)
    for slot, ids in enumerate(([5, 6, 7], [8])):
        runner.prefill(slot, ids)
    candidates = torch.tensor([[9, 10, 11], [12, 13, 14]])
    wide = torch.promote_types(dtype, torch.float32)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -4.0, -4.0]], dtype=wide)
    draw = (
        torch.tensor([1.0, 0.7]),
        torch.tensor([0.0, 0.8]),
        torch.tensor([3, 4]),
        torch.tensor([0, 1]),
    )
    with torch.inference_mode():
        want = super(SequenceReward, guide).sample(candidates, logprobs, *draw)
        got = guide.sample(candidates, logprobs, *draw)
    # transformers norms float64 states in float32, and rounds normed bfloat16 states before the head.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(got[0], want[0], **close)
    assert torch.equal(got[1], want[1])
    with torch.inference_mode():
        again = super(SequenceReward, guide).sample(candidates, logprobs, *draw)
    assert torch.equal(again[0], want[0]), "the norm is back after a forward without it"


def test_norms_that_are_not_known_stay_in_the_forward() -> None:
    assert FinalNorm.of(reward_model("phi").base_model) is None
    model = reward_model("llama-gqa")
    model.base_model.norm.forward = model.base_model.norm.forward
    assert FinalNorm.of(model.base_model) is None, "somebody else stands in the forward's place"


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_decoding_in_one_launch_gives_the_same_rows(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()

    def rows() -> list[tuple[list[int], list[float], str]]:
        decoder = RewardGuidedDecoder.from_pretrained(
            (make_lm(), tokenizer), SequenceReward((make_rm(), tokenizer)), max_batch=3, engine="transformers"
        )
        guidance = [Guidance(3 + i % 2, 1.0, temperature) for i in range(5)]
        result = decoder.generate(prompts_of(5), 9, guidance, seed=list(range(5)))
        return [(row.tokens, row.rewards, row.finish_reason) for row in result]

    want = rows()
    monkeypatch.setattr(SequenceReward, "fused", property(lambda guide: True))
    monkeypatch.setattr(SequenceReward, "score", None)
    got = rows()
    assert [row[0] for row in got] == [row[0] for row in want]
    for a, b in zip(got, want, strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-4)


def test_who_is_fused() -> None:
    tokenizer = make_tokenizer()
    guide = SequenceReward((make_rm(), tokenizer))
    RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), guide, engine="transformers")
    assert guide.runner is not None
    assert guide.runner.layers.final_norm is not None
    assert guide.fused == (guide.runner.device.type == "cuda")
    assert not RADReward("somewhere").fused
    assert not FunctionReward(lambda prefixes, candidates: candidates).fused
