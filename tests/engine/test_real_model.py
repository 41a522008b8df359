"""The real SmolLM2-135M-Instruct against transformers' generate and against the naive algorithm, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward
from tests.engine.naive import guided_greedy

pytestmark = pytest.mark.model
ALL = pytest.mark.slow
PROMPTS = [
    "How do I learn to swim as an adult?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What is the capital of France, and why is it famous? Answer in two sentences.",
    "My neighbour plays loud music at night. What should I do?",
    "Explain photosynthesis to a ten-year-old child.",
]


@pytest.fixture(scope="module")
def pair(smollm2: Path) -> tuple[torch.nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize(
    ("engine", "prompts", "tokens"),
    [
        ("auto", 2, 16),
        ("transformers", 1, 8),
        pytest.param("auto", 5, 64, marks=ALL),
        pytest.param("transformers", 5, 64, marks=ALL),
    ],
)
def test_greedy_with_beta_zero_is_transformers_generate(
    pair: tuple, engine: str, prompts: int, tokens: int, smollm2: Path
) -> None:
    model, tokenizer = pair
    decoder = RewardGuidedDecoder.from_pretrained(smollm2, dtype="float32", engine=engine)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:prompts]]
    rows = decoder.generate(chats, tokens, Guidance(beta=0, temperature=0))
    for chat, row in zip(chats, rows, strict=True):
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = model.generate(
            **ids, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None
        )[0]
        expected = expected[ids["input_ids"].shape[1] :].tolist()
        if expected[-1] == 2:  # <|im_end|>
            assert row.finish_reason == "eos"
            expected.pop()
        assert row.tokens == expected


@pytest.mark.parametrize("tokens", [5, pytest.param(12, marks=ALL)])
def test_guided_greedy_is_the_naive_algorithm(pair: tuple, tokens: int, smollm2: Path) -> None:
    model, tokenizer = pair
    torch.manual_seed(7)
    rm = AutoModelForSequenceClassification.from_pretrained(smollm2, num_labels=1, dtype=torch.float32).eval()
    rm.score.weight.data.normal_(std=0.1)
    decoder = RewardGuidedDecoder.from_pretrained(
        smollm2, reward=SequenceReward((rm, tokenizer)), dtype="float32"
    )
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    row = decoder.generate([prompt], tokens, Guidance(k=5, beta=1.0, temperature=0), trace=True)[0]
    assert row.tokens == guided_greedy(model, rm, prompt, 5, 1.0, tokens, eos=2)
    assert any(step.token != step.base_token for step in row.trace)  # the guide had a say
