"""The families of decoders that the C++ layers run, and which of their models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rgtg_fast.models.int8 import Int8Linear
from rgtg_fast.models.support import STATIC_ROPE
from rgtg_fast.ops import _extension

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1}


@dataclass(frozen=True)
class Family:
    """The differences of a family's decoder from Llama's.

    Attributes:
        package: the module of transformers that defines it.
        head_norm: queries and keys are normalized per head (Qwen3, Gemma 3).
        norm_offset: added to every norm's weight (Gemma: 1).
        scaled_embedding: embeddings are multiplied by sqrt(E) (Gemma).
        windows: layers may have sliding windows (all but Llama and Gemma 1).
        out_norms: what attention and MLP add to the residual stream is normalized (Gemma 2 and 3).
        softcap: scores are capped (Gemma 2).
        rope_by_kind: layers with and without a window differ in their rope (Gemma 3).
        activation: the name of the activation in the config.
    """

    package: str
    head_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    windows: bool = False
    out_norms: bool = False
    softcap: bool = False
    rope_by_kind: bool = False
    activation: str = "hidden_act"


_GEMMA = Family("gemma", norm_offset=1.0, scaled_embedding=True)
_GEMMA_2 = replace(_GEMMA, package="gemma2", windows=True, out_norms=True, activation="hidden_activation")
# Decoders whose layers have the order of Llama's.
FAMILIES = {
    "LlamaModel": Family("llama"),
    "MistralModel": Family("mistral", windows=True),
    "Qwen2Model": Family("qwen2", windows=True),
    "Qwen3Model": Family("qwen3", head_norm=True, windows=True),
    "GemmaModel": _GEMMA,
}
# Those whose layers have further norms, too: all that the C++ layers run.
NATIVE_FAMILIES = {
    **FAMILIES,
    "Gemma2Model": replace(_GEMMA_2, softcap=True),
    "Gemma3TextModel": replace(_GEMMA_2, package="gemma3", head_norm=True, rope_by_kind=True),
}

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a decoder layer by name."""
    parts: Any = layer
    return {name: getattr(parts.self_attn if name[0] in "qkvo" else parts.mlp, name) for name in MATRICES}


def _shapes(decoder: Any) -> tuple[dict[str, tuple[int, int]], str]:
    """The matrices' shapes by the configuration, and why the extension cannot execute it, empty where it can."""
    config, layers = decoder.config, decoder.layers
    sizes = {
        name: int(getattr(config, name))
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    sizes["num_hidden_layers"] = min(int(config.num_hidden_layers), len(layers))
    sizes["head_dim"] = int(layers[0].self_attn.head_dim) if len(layers) else 0
    for name, value in sizes.items():
        if value < 1:
            return {}, f"its {name} is {value}"
    hidden, inner, heads, groups, _, width = sizes.values()
    if heads % groups:
        return {}, f"{heads} attention heads cannot share {groups} key-value heads"
    if width % 2:
        return {}, f"its head_dim is {width}, which is odd"
    embedding = tuple(decoder.embed_tokens.weight.shape)
    if embedding[1:] != (hidden,):
        return {}, f"its embedding is {embedding}, where the configuration says {hidden} columns"
    if not decoder.embed_tokens.weight.is_contiguous():
        return {}, "its embedding is not contiguous"
    outer = dict.fromkeys(MATRICES, hidden) | {"q_proj": heads * width, "gate_proj": inner, "up_proj": inner}
    outer |= dict.fromkeys(("k_proj", "v_proj"), groups * width)
    columns = dict.fromkeys(MATRICES, hidden) | {"o_proj": heads * width, "down_proj": inner}
    return {name: (outer[name], columns[name]) for name in MATRICES}, ""


def norms(layer: Any, family: Family) -> list[Any]:
    """A layer's norms in the extension's order, None for those that it does not have.

    They are of the inputs of attention and MLP, of queries and keys, and of the outputs of attention and MLP.
    """
    attention = layer.self_attn
    of_heads = [attention.q_norm, attention.k_norm] if family.head_norm else [None, None]
    if family.out_norms:
        inputs = [layer.input_layernorm, layer.pre_feedforward_layernorm]
        outputs = [layer.post_attention_layernorm, layer.post_feedforward_layernorm]
    else:
        inputs, outputs = [layer.input_layernorm, layer.post_attention_layernorm], [None, None]
    return [*inputs, *of_heads, *outputs]


def window(attention: Any) -> int:
    """The window of a layer's attention, 0 for none. Most modules hold it, Mistral's read it from the config."""
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return int(holder.sliding_window or 0)


def unsupported(model: nn.Module) -> str | None:
    """Why the C++ extension cannot run a decoder, in words; None where it can."""
    missing = _extension.missing_reason()
    if missing:
        return missing
    family = NATIVE_FAMILIES.get(type(model).__name__)
    if family is None or not type(model).__module__.startswith(f"transformers.models.{family.package}."):
        return f"{type(model).__name__} is not one of {', '.join(NATIVE_FAMILIES)}"
    decoder: Any = model
    config = decoder.config
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds and not (family.windows and kinds == {"sliding_attention"}):
        return f"its layers of the kind {min(kinds)!r} are none of its family's"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    ropes = decoder.rotary_emb.rope_type
    moving = set(ropes.values() if family.rope_by_kind else [ropes]) - STATIC_ROPE
    if moving:
        return f"rope type {min(moving)!r} depends on the longest row of the batch"
    tensors = [decoder.embed_tokens.weight, *decoder.rotary_emb.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"its weights are on {decoder.embed_tokens.weight.device}, not on the CPU"
    dtype = decoder.embed_tokens.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {dtype}, neither float32 nor bfloat16"
    return _matrices(decoder, dtype)


def _matrices(decoder: Any, dtype: torch.dtype) -> str | None:
    """Why the extension cannot read a decoder's matrices; None where it can."""
    shapes, reason = _shapes(decoder)
    if reason:
        return reason
    rounded = type(linears(decoder.layers[0])["q_proj"]) is Int8Linear
    if rounded and dtype != torch.bfloat16:
        return f"its weights are int8 while the embedding is {dtype}, not bfloat16"
    kind, stored = (Int8Linear, torch.int8) if rounded else (nn.Linear, dtype)
    for index, layer in enumerate(decoder.layers):
        for name, linear in linears(layer).items():
            where = f"layers.{index}.{name}"
            if type(linear) is not kind:
                plain = f"the {kind.__name__} of the first matrix" if rounded else "a plain Linear"
                return f"{where} is a {type(linear).__name__}, not {plain}"
            weight = linear.weight
            if weight.dtype != stored:
                return f"{where} is {weight.dtype} while the embedding is {dtype}"
            if weight.device.type != "cpu":
                return f"{where} is on {weight.device}, not on the CPU"
            if not weight.is_contiguous():
                return f"{where} is not contiguous"
            if tuple(weight.shape) != shapes[name]:
                return f"{where} is {tuple(weight.shape)}, where the configuration says {shapes[name]}"
    return None
