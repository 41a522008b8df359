"""Writes tiny GGUF files as llama.cpp's converter does, with the writer of the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

# transformers' names within a layer, and GGUF's.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "score.weight": "cls.output.weight",
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_tokens() -> list[str]:
    """A byte-level vocabulary with two merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), "he", "Ġa"]


def tokenizer_metadata(**changed: Any) -> dict[str, Any]:
    tokens = byte_tokens()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": ["h e", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **changed,
    }


def tiny(kind: str = "llama", head: bool = False, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of a family, a reward model with `head`."""
    torch.manual_seed(seed)
    config = tf.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(byte_tokens()),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            **({"num_labels": 1} if head else {}),
            **settings,
        },
    )
    auto: Any = tf.AutoModelForSequenceClassification if head else tf.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return model


def architecture(model: Any) -> str:
    return str(model.config.model_type).removesuffix("_text")


def metadata_of(model: Any) -> dict[str, Any]:
    config, prefix = model.config, architecture(model)
    rope = config.rope_parameters
    found = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if prefix.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    if prefix == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    return {f"{prefix}.{key}": value for key, value in found.items()}


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The weights under GGUF's names and in its layout."""
    found, config = {}, model.config
    gemma = architecture(model).startswith("gemma")
    within = {**LAYER, **(GEMMA if gemma else {})}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if gemma and name.endswith("norm.weight"):
            value = value + 1
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name in TOP:
            found[TOP[name]] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        inner, _, kind = rest.rpartition(".")
        if config.model_type == "llama" and inner.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if inner.endswith("q_proj") else config.num_key_value_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        found[f"blk.{layer}.{within[inner]}.{kind}"] = value
    return found


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any],
    kind: str,
    quantization: str = "F32",
) -> Path:
    """Writes a GGUF file; matrices are stored in `quantization`, vectors in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        kind_of = gguf.GGMLQuantizationType[quantization if value.ndim > 1 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(value), kind_of)
        writer.add_tensor(name, data, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save(path: Path, model: Any, quantization: str = "F32", **changed: Any) -> Path:
    """Writes a model as a GGUF file.

    Args:
        path: the new file.
        model: from `tiny`.
        quantization: how its matrices are stored.
        changed: keys of the metadata, with `__` for a dot, that replace those of the model; None removes one.
    """
    head = {f"{architecture(model)}.pooling_type": 4} if "score.weight" in model.state_dict() else {}
    more = {key.replace("__", "."): value for key, value in changed.items()}
    metadata = {**metadata_of(model), **head, **tokenizer_metadata(), **more}
    return write(path, tensors_of(model), metadata, architecture(model), quantization)
