"""The slow path: reward models over other tokenizers, encoders, and functions of texts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, TextReward
from tests.conftest import WORDS, make_lm, make_tokenizer


def _encoder() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A bidirectional encoder whose tokenizer numbers the words the other way round."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=1,
        pad_token_id=63,
        initializer_range=0.5,
    )
    tokenizer = make_tokenizer(None, list(reversed(WORDS)))
    return AutoModelForSequenceClassification.from_config(config).eval(), tokenizer


def _decoder(reward: TextReward, max_batch: int = 8) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained(
        (make_lm(), make_tokenizer()), reward=reward, max_batch=max_batch
    )


@pytest.mark.parametrize("template", [None, "{prompt} {answer}"])
def test_an_encoder_guides(template: str | None) -> None:
    model, tokenizer = _encoder()
    decoder = _decoder(TextReward((model, tokenizer), template=template))
    row = decoder.generate("w1 w2 w3", 4, Guidance(k=4, beta=2.0, temperature=0), trace=True)[0]
    answer: list[str] = []
    for step in row.trace:
        for candidate in step.candidates:
            word = "" if candidate.token in (0, 1, 2) else candidate.text  # special tokens are no text
            text = " ".join(filter(None, [*answer, word]))
            pair = ("w1 w2 w3", text) if template is None else (f"w1 w2 w3 {text}", None)
            expected = model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]
            assert candidate.reward == pytest.approx(expected.item(), abs=1e-4)
        answer.append("" if step.token == 2 else step.text)
    assert decoder.score(["w1 w2 w3"], [row.tokens])[0] == pytest.approx(row.rewards, abs=1e-4)


def test_a_rows_rewards_do_not_depend_on_the_batch() -> None:
    reward = TextReward(_encoder(), template="{prompt} {answer}", batch_size=5)
    prompts = ["w1", "w2 w3 w4 w5 w6", [{"role": "user", "content": "w7 w8"}], [9, 10]]
    together = _decoder(reward).generate(prompts, 5, Guidance(k=3, temperature=0))
    for prompt, row in zip(prompts, together, strict=True):
        alone = _decoder(TextReward(_encoder(), template="{prompt} {answer}")).generate(
            [prompt], 5, Guidance(k=3, temperature=0)
        )[0]
        assert row.tokens == alone.tokens
        assert row.rewards == pytest.approx(alone.rewards, abs=1e-4)


def test_a_function_of_texts_guides() -> None:
    reward = TextReward(lambda prompts, answers: [float(a.split().count("w5")) for a in answers])
    row = _decoder(reward).generate("w1", 5, Guidance(k=64, beta=100, temperature=0))[0]
    assert row.text == "w5 w5 w5 w5 w5"
    assert row.rewards == [1, 2, 3, 4, 5]
    short = TextReward(lambda prompts, answers: [1.0])
    with pytest.raises(RGTGError, match="returned shape"):
        _decoder(short).generate("w1", 2, Guidance(k=3))


def test_bad_settings() -> None:
    with pytest.raises(RGTGError, match="lacks"):
        TextReward("x", template="{prompt} only")
    with pytest.raises(RGTGError, match="batch_size=0"):
        TextReward("x", batch_size=0)
