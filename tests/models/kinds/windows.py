"""Kinds of models whose attention is more than softmax(QKᵀ)V over the whole prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models.kinds import Kind, Sources
from tests.models.kinds.tiny import CONTEXT, language_model, llama, llama_reward, reward_model, save

# Shorter than most prompts.
WINDOW = 16
QWEN2 = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": CONTEXT // 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _language_model(
    name: str,
    family: str,
    served: str = "",
    refused: str = "",
    reward: Callable[[Path], str] = llama_reward,
    **settings: Any,
) -> Kind:
    """A language model of a family, beside a reward model of the same tokenizer."""

    def build(folder: Path) -> Sources:
        return Sources(save(language_model(family, **settings), folder / "lm"), reward(folder))

    return Kind(name, "language model", build, served, refused)


def _qwen2_reward(folder: Path) -> str:
    # transformers adds a token to the tokenizer of every Qwen2.
    return save(reward_model("qwen2", **QWEN2), folder / "rm")


def _gemma2_reward(folder: Path) -> Sources:
    return Sources(llama(folder), save(reward_model("gemma2", sliding_window=WINDOW, **GEMMA), folder / "rm"))


KINDS = [
    _language_model(
        "Mistral v0.1 (sliding window)", "mistral", "windows in all layers", sliding_window=WINDOW
    ),
    _language_model(
        "Gemma 2",
        "gemma2",
        "windows in every second layer, capped scores and logits",
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **GEMMA,
    ),
    _language_model(
        "Gemma 3 (text)",
        "gemma3_text",
        "windows in all but every sixth layer",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        **GEMMA,
    ),
    _language_model(
        "Qwen2 with a window",
        "qwen2",
        "windows from max_window_layers on",
        reward=_qwen2_reward,
        **QWEN2,
    ),
    _language_model("Phi-3 (sliding window)", "phi3", "windows in all layers", sliding_window=WINDOW),
    _language_model(
        "gpt-oss",
        "gpt_oss",
        "windows in every second layer, attention sinks",
        sliding_window=WINDOW,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=YARN,
    ),
    _language_model(
        "Mistral with a window larger than its context",
        "mistral",
        "as without a window",
        sliding_window=2 * CONTEXT,
    ),
    Kind(
        "Gemma 2 reward model",
        "reward model",
        _gemma2_reward,
        "windows and capped scores; its rewards are not capped",
    ),
    _language_model(
        "Llama 4 (chunked attention)",
        "llama4_text",
        refused="attends in chunks of 32 tokens",
        attention_chunk_size=32,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
    ),
    _language_model(
        "Qwen3-Next (linear attention)",
        "qwen3_next",
        refused="keeps a recurrent state in its 'linear_attention' layers",
        shared_expert_intermediate_size=16,
        **LINEAR,
        **EXPERTS,
    ),
    _language_model(
        "Qwen3.5 (linear attention)",
        "qwen3_5_text",
        refused="keeps a recurrent state in its 'linear_attention' layers",
        **LINEAR,
    ),
]
