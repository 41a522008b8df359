"""Small random models of the families that the native layers serve, and ragged rows over one cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rgtg_fast.models.cpp_layers import NativeLayers

# Widths that fill no vector evenly.
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-mha": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, "head_dim": 10}),
    "llama-bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE),
    "llama-wide": LlamaConfig(**{**SHAPE, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma": GemmaConfig(**{**SHAPE, "num_key_value_heads": 1}, hidden_act="gelu_pytorch_tanh"),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2-window": Qwen2Config(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=7, query_pre_attn_scalar=20, attn_logit_softcapping=1.5),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=7,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the family; biases and norms are random too."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


class Rows:
    """Ragged rows over one cache, as the decoder keeps them."""

    def __init__(self, model: Any, rows: int, length: int = 64):
        self.native = NativeLayers(model)
        dtype = self.native.dtype
        size = (self.native.layers, rows, self.native.kv_heads, length, self.native.head_dim)
        self.keys, self.values = (torch.full(size, torch.nan, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    def prefill(self, row: int, tokens: torch.Tensor) -> torch.Tensor:
        """Appends tokens [S] to one row and returns their hidden states [S, E]."""
        start, stop = int(self.lengths[row]), int(self.lengths[row]) + len(tokens)
        one = slice(row, row + 1)
        hidden = self.native.forward(
            tokens[None],
            torch.arange(start, stop)[None],
            self.keys[:, one],
            self.values[:, one],
            self.lengths[one],
            self.keys[:, one, :, start:stop],
            self.values[:, one, :, start:stop],
            causal=True,
        )
        self.lengths[row] = stop
        return hidden[0]

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, **how: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [B, S, E] of undecided tokens [B, S], with their keys and values."""
        rows, count = tokens.shape
        layers, _, groups, _, width = self.keys.shape
        new = [
            torch.full((layers, rows, groups, count, width), torch.nan, dtype=self.native.dtype) for _ in "kv"
        ]
        if positions is None:
            positions = self.lengths[:, None].expand(rows, count)
        return (
            self.native.forward(tokens, positions, self.keys, self.values, self.lengths, *new, **how),
            *new,
        )

    def commit(self, k_new: torch.Tensor, v_new: torch.Tensor, choice: torch.Tensor) -> None:
        for row, chosen in enumerate(choice.tolist()):
            at = int(self.lengths[row])
            self.keys[:, row, :, at] = k_new[:, row, :, chosen]
            self.values[:, row, :, at] = v_new[:, row, :, chosen]
        self.lengths += 1
