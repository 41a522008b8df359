"""The decoder on a GPU: the CPU's tokens in float32, and a working run in bfloat16."""

from __future__ import annotations

import pytest
import torch

from rgtg_fast import ContrastiveReward, Guidance, RewardGuidedDecoder, SequenceReward
from rgtg_fast.models import split_cache
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.windowed import language_model, reward_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15]]


def _decoder(device: str, reward: str, dtype: str = "float32") -> RewardGuidedDecoder:
    tokenizer = make_tokenizer()
    guide = (
        SequenceReward((make_rm(), tokenizer)) if reward == "sequence" else ContrastiveReward("w1 w2", "w3")
    )
    return RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), reward=guide, device=device, dtype=dtype, max_batch=3
    )


@pytest.mark.parametrize("reward", ["sequence", "contrastive"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_float32_gives_the_tokens_of_the_cpu(
    reward: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    guidance = Guidance(k=6, beta=1.0, temperature=temperature)
    rows = {
        device: [
            row.tokens for row in _decoder(device, reward).generate(PROMPTS, 12, guidance, seed=[1, 2, 3, 4])
        ]
        for device in ("cpu", "cuda")
    }
    assert rows["cuda"] == rows["cpu"]


@pytest.mark.parametrize("reward", ["sequence", "contrastive"])
def test_bfloat16_decodes_and_its_rewards_are_those_of_scoring(reward: str) -> None:
    decoder = _decoder("cuda", reward, "bfloat16")
    rows = decoder.generate(PROMPTS, 8, Guidance(k=6, temperature=0), trace=True)
    scores = decoder.score(PROMPTS, [row.tokens or [5] for row in rows])
    for row, score in zip(rows, scores, strict=True):
        if row.tokens:
            assert row.rewards == pytest.approx(score, abs=0.1, rel=0.1)


@pytest.mark.parametrize("slack", [3, 128])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt-oss"])
def test_windows_caps_and_sinks_give_the_tokens_of_the_cpu(
    family: str, slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little slack rows drop tokens every few steps, while steps are replayed ahead of the host."""
    monkeypatch.setattr(split_cache, "SLACK", slack)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    prompts = [[2 + (7 * i + 3 * row) % 60 for i in range(count)] for row, count in enumerate((30, 5, 6, 1))]
    rows = {}
    for device in ("cpu", "cuda"):
        decoder = RewardGuidedDecoder.from_pretrained(
            (language_model(family), None),
            reward=SequenceReward((reward_model(family), None)),
            device=device,
            dtype="float32",
            max_batch=3,
        )
        assert decoder.lm.runner.windows
        rows[device] = [
            row.tokens for row in decoder.generate(prompts, 12, Guidance(k=6, beta=1.0, temperature=0))
        ]
        assert decoder.lm.runner.cache.slides == (slack == 3)
    assert rows["cuda"] == rows["cpu"]


@pytest.mark.parametrize("graphs", [None, False])
def test_longrope_gives_the_tokens_of_the_cpu(graphs: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cross the original context while steps are replayed ahead of the host."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    tokenizer, guidance = make_tokenizer(), Guidance(k=6, beta=1.0, temperature=0.9)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 5.0, 0.3, 9.0],
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    }
    rows = {}
    for device in ("cpu", "cuda"):
        lm, rm = (make(rope_parameters=dict(rope)) for make in (make_lm, make_rm))
        lm.generation_config.eos_token_id = [1, *range(8, 64, 9)]
        decoder = RewardGuidedDecoder.from_pretrained(
            (lm, tokenizer),
            reward=SequenceReward((rm, tokenizer)),
            device=device,
            max_batch=3,
            graphs=graphs if device == "cuda" else None,
        )
        prompts = [list(range(20, 20 + length)) for length in (4, 14, 15, 16, 25)]
        rows[device] = [row.tokens for row in decoder.generate(prompts, 20, guidance, seed=[1, 2, 3, 4, 5])]
    assert rows["cuda"] == rows["cpu"]
