"""vLLM's own engine with chunked prompts, preempted and cancelled requests answers as `RewardGuidedDecoder` does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `bash tests/integrations/run vllm`")

from rgtg_fast import Guidance, RewardGuidedDecoder
from tests.integrations.vllm.support import run_engine, save_models

EOS = 1
# Four requests at once over a KV cache of ten blocks of 32 tokens, and at most 48 tokens a step.
TIGHT = {
    "max_num_seqs": 4,
    "max_model_len": 160,
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 10,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(6, 64) for _ in range(draw.choice([3, 20, 60, 90]))] for _ in range(count)]


def expected(
    decoder: RewardGuidedDecoder,
    prompt: list[int],
    count: int,
    arguments: dict[str, Any] | None,
    default: Guidance,
) -> list[int]:
    """The decoder's greedy tokens, with the end-of-sequence token that ends them."""
    given = arguments or {}
    fields = {name.removeprefix("rgtg_"): value for name, value in given.items() if name != "rgtg"}
    guidance = Guidance(
        k=fields.get("k", default.k),
        beta=0.0 if given.get("rgtg", 1) == 0 else fields.get("beta", default.beta),
        support=fields.get("support", default.support),
        weights=fields.get("weights"),
        temperature=0,
    )
    tokens = list(decoder.generate([prompt], count, guidance)[0].tokens)
    return tokens if len(tokens) == count else [*tokens, EOS]


def request(
    prompt: list[int], tokens: int, arguments: Any = None, cancel: int | None = None
) -> dict[str, Any]:
    return {"prompt": prompt, "tokens": tokens, "arguments": arguments, "cancel": cancel}


REWARDS = {
    "sequence": "{sequence}",
    "genarm": "genarm:{genarm}",
    "farma": "farma:{farma}",
    "contrastive": "contrastive",
    "mixture": "mixture:0.7*pargs:{sequence}+0.3*genarm:{genarm}",
}
VARIED = [{"rgtg": 0}, None, {"rgtg_beta": 3.0}, {"rgtg_k": 3, "rgtg_beta": -1.5}]
OWN = {
    "genarm": [{"rgtg_support": "all"}, {"rgtg_support": "combined"}],
    "farma": [{"rgtg_support": "all", "rgtg_beta": 0.5}],
    "mixture": [{"rgtg_weights": [0.1, 0.9]}],
}


@pytest.mark.parametrize("kind", REWARDS)
def test_tokens_are_the_decoders(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    reward = REWARDS[kind].format(**models)
    arguments = VARIED + OWN.get(kind, [])
    requests = [
        request(prompt, 40, arguments[number % len(arguments)]) for number, prompt in enumerate(prompts(12))
    ]
    job = {"model": models["lm"], "options": TIGHT, "requests": requests}
    result = run_engine(job, {"reward": reward, "k": 5, "beta": 1.5}, tmp_path)
    decoder = RewardGuidedDecoder.from_pretrained(models["lm"], reward=reward, dtype="float32")
    default = Guidance(k=5, beta=1.5)
    for given, answer in zip(requests, result["answers"], strict=True):
        assert answer == expected(decoder, given["prompt"], 40, given["arguments"], default), given
    assert result["preemptions"] > 0, "the KV cache was to be too small"
    assert result["left"] == result["rows"] == 0
    assert result["most"] > 1


def test_cancelled_requests_leave_nothing(models: dict[str, str], tmp_path: Path) -> None:
    draw = random.Random(1)
    requests = [
        request(prompt, 10, VARIED[number % 4], draw.randrange(1, 300) if number % 2 else None)
        for number, prompt in enumerate(prompts(200, seed=2))
    ]
    job = {"model": models["lm"], "options": TIGHT, "requests": requests}
    result = run_engine(job, {"reward": models["sequence"], "k": 5, "beta": 1.5}, tmp_path)
    assert result["left"] == result["rows"] == 0
    assert result["most"] > 1
    decoder = RewardGuidedDecoder.from_pretrained(models["lm"], reward=models["sequence"], dtype="float32")
    default = Guidance(k=5, beta=1.5)
    for given, answer in zip(requests, result["answers"], strict=True):
        if given["cancel"] is None:
            assert answer == expected(decoder, given["prompt"], 10, given["arguments"], default), given
        else:
            assert answer is None


def test_a_reward_of_nan_ends_its_request_alone(models: dict[str, str], tmp_path: Path) -> None:
    """Token 60 of the reward model has a state of NaN: a request whose prompt holds it ends at once."""
    import torch
    from transformers import AutoModelForSequenceClassification

    broken = AutoModelForSequenceClassification.from_pretrained(models["sequence"], dtype="float32")
    with torch.no_grad():
        broken.get_input_embeddings().weight[60] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    from tests.conftest import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "broken")
    good = [[7, 8, 9], [10, 11, 12, 13]]
    requests = [request(prompt, 12, {"rgtg_k": 4}) for prompt in (good[0], [7, 60, 8], good[1])]
    job = {"model": models["lm"], "options": {"max_num_seqs": 4, "max_model_len": 160}, "requests": requests}
    result = run_engine(job, {"reward": str(tmp_path / "broken"), "k": 4, "beta": 1.5}, tmp_path)
    assert result["answers"][1] == [EOS]
    assert result["log"].count("no usable reward") >= 1
    assert "a request with 3 prompt tokens ends after 1 answer tokens" in result["log"]
    decoder = RewardGuidedDecoder.from_pretrained(models["lm"], reward=models["sequence"], dtype="float32")
    for prompt, answer in zip(good, (result["answers"][0], result["answers"][2]), strict=True):
        whole = expected(decoder, prompt, 12, {"rgtg_k": 4}, Guidance(beta=1.5))
        # A candidate 60 ends it too.
        assert answer == whole or (answer[-1] == EOS and answer[:-1] == whole[: len(answer) - 1])
