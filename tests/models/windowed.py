"""Tiny models of the families with sliding windows, capped scores or attention sinks."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

WINDOW = 5
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "sliding_window": WINDOW,
}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, Any] = {
    "mistral": lambda: tf.MistralConfig(**SMALL, head_dim=8),
    "qwen2": lambda: tf.Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=12, use_sliding_window=True, max_window_layers=2),
    "phi3": lambda: tf.Phi3Config(**SMALL),
    # Small caps, so that they change the scores and logits of random weights.
    "gemma2": lambda: tf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**GEMMA, layer_types=[SLIDING, FULL, SLIDING]),
    "gpt-oss": lambda: tf.GptOssConfig(
        **SMALL,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=[SLIDING, FULL, SLIDING],
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**SMALL),
    "olmo3": lambda: tf.Olmo3Config(**SMALL, layer_types=[SLIDING, FULL, SLIDING]),
}
# Those whose layers the C++ extension runs.
NATIVE = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def _windowed(auto: type, family: str, seed: int = 0, **settings: object) -> Any:
    """A model of a family with random weights, norms, biases and sinks among them."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def language_model(family: str, seed: int = 0, **settings: object) -> Any:
    """A causal language model of a family."""
    return _windowed(tf.AutoModelForCausalLM, family, seed, **settings)


def reward_model(family: str, seed: int = 1, **settings: object) -> Any:
    """A reward model with one label of a family."""
    return _windowed(tf.AutoModelForSequenceClassification, family, seed, num_labels=1, **settings)
