"""Every supported family: the cached path against the model's own uncached forward, fp32, over ragged batches."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from rgtg_fast.models.loading import language_runner, reward_runner

SMALL = {
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LLAMA_LIKE = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MHA = {"num_key_value_heads": 4}
FAMILIES = {
    "llama-gqa": lambda: tf.LlamaConfig(**LLAMA_LIKE),
    "llama-mha": lambda: tf.LlamaConfig(**{**LLAMA_LIKE, **MHA}),
    "llama-mqa-wide-heads": lambda: tf.LlamaConfig(
        **{**LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 16}
    ),
    "llama3-rope": lambda: tf.LlamaConfig(
        **LLAMA_LIKE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2": lambda: tf.Qwen2Config(**LLAMA_LIKE),
    "qwen2-mha": lambda: tf.Qwen2Config(**{**LLAMA_LIKE, **MHA}),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA_LIKE, head_dim=12),
    "qwen3-mha": lambda: tf.Qwen3Config(**{**LLAMA_LIKE, **MHA}, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=None, head_dim=8),
    "mistral-mha": lambda: tf.MistralConfig(**{**LLAMA_LIKE, **MHA}, sliding_window=None, head_dim=8),
    "gemma": lambda: tf.GemmaConfig(**{**LLAMA_LIKE, "num_key_value_heads": 1}, head_dim=8),
    "gemma-mha": lambda: tf.GemmaConfig(**{**LLAMA_LIKE, **MHA}, head_dim=8),
    "phi": lambda: tf.PhiConfig(**LLAMA_LIKE, partial_rotary_factor=0.5),
    "phi-mha": lambda: tf.PhiConfig(**{**LLAMA_LIKE, **MHA}, partial_rotary_factor=0.5),
    "gpt-neox": lambda: tf.GPTNeoXConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
    ),
    "opt": lambda: tf.OPTConfig(
        **SMALL,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "opt-projected": lambda: tf.OPTConfig(
        **SMALL,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        init_std=0.2,
        do_layer_norm_before=False,
    ),
    "gpt2": lambda: tf.GPT2Config(
        **SMALL, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, scale_attn_by_inverse_layer_idx=True
    ),
}
PREFIXES = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22]]  # ragged; one of a single token


def _model(auto: type, family: str, **settings: object) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where a mistake would not show
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=["auto", "transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_language_model_equals_its_own_uncached_forward(family: str, engine: str) -> None:
    model = _model(tf.AutoModelForCausalLM, family)
    runner = language_runner(model, engine, None)
    runner.reserve(len(PREFIXES), 16)
    for slot, ids in enumerate(PREFIXES):
        runner.prefill(slot, ids[:-1])
    texts = [list(ids) for ids in PREFIXES]
    for step in range(4):
        tokens = torch.tensor([[text[-1]] for text in texts])
        logits = runner.logits(runner.step(tokens).squeeze(1))
        runner.commit(torch.zeros(len(texts), dtype=torch.int64))
        for row, text in enumerate(texts):
            expected = model(torch.tensor([text]), use_cache=False).logits[0, -1]
            assert (logits[row] - expected).abs().max() <= 1e-4, (row, step)
            text.append(30 + 3 * step + row)
    assert runner.counter.tokens == 4 * len(PREFIXES)
    assert runner.counter.prompt_tokens == sum(len(ids) - 1 for ids in PREFIXES)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_candidates_score_as_if_each_stood_alone(family: str, engine: str) -> None:
    model = _model(tf.AutoModelForSequenceClassification, family, num_labels=1)
    runner = reward_runner(model, engine, None)
    runner.reserve(len(PREFIXES), 16)
    for slot, ids in enumerate(PREFIXES):
        runner.prefill(slot, ids)
    texts = [list(ids) for ids in PREFIXES]
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        candidates = torch.randint(2, 50, (len(texts), 5), generator=generator)
        rewards = runner.scores(runner.step(candidates))
        choice = torch.tensor([step, 4 - step, 2])
        runner.commit(choice)
        for row, text in enumerate(texts):
            for at, token in enumerate(candidates[row].tolist()):
                ids = torch.tensor([[*text, token]])
                hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, -1]
                assert (rewards[row, at] - model.score(hidden)).abs() <= 1e-4, (row, at, step)
            text.append(int(candidates[row, choice[row]]))
    assert runner.counter.tokens == 3 * len(PREFIXES) * 5


def test_the_model_still_works_outside_the_decoder() -> None:
    model = _model(tf.AutoModelForCausalLM, "llama-gqa")
    ids = torch.tensor([PREFIXES[0]])
    before = model(ids).logits
    language_runner(model, "transformers", None)
    torch.testing.assert_close(model(ids).logits, before)
    padded = torch.tensor([[0, 0, *PREFIXES[2]]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    alone = model(torch.tensor([PREFIXES[2]])).logits
    torch.testing.assert_close(
        model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:], alone
    )
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, len(PREFIXES[0]) + 5)
