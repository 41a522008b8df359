"""Llama-like decoders on a GPU: the library's matrix products, and one kernel for all that lies between two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.attention import prefix_attention
from rgtg_fast.models.kv_cache import CachePart, PrefixCache
from rgtg_fast.models.lora import LowRankRows
from rgtg_fast.models.model_state import foreign_hooks
from rgtg_fast.models.native_families import ACTIVATIONS, FAMILIES, window
from rgtg_fast.models.split_cache import SplitCache
from rgtg_fast.ops import act_and_mul, add_rms_norm, rope_and_store

if TYPE_CHECKING:
    from rgtg_fast.models.layers import TransformersLayers

# By the numbers of `native_families.ACTIVATIONS`.
_ACTIVATIONS = ("silu", "gelu_tanh")


class TritonLayers:
    """The model's own linear layers and embeddings, with our ops between them: nine launches a layer.

        normed, stream = add_rms_norm(MLP output of the layer before, stream)
        q = rope_and_store(q, k, v = projections of normed)                    k and v go to the cache
        normed, stream = add_rms_norm(o_proj(tree_attention(q)), stream)
        MLP output = down_proj(act_and_mul(gate, up = projections of normed))

    The modules themselves are called for the products, so that fused projections, adapters' corrections and quantized
    layers work as in the model's own blocks. The ops round where those do.

    Args:
        model: a causal model of one of the families of `native_families.FAMILIES`.
        own: the model's own blocks, which run instead once they are compiled.

    Attributes:
        final_norm: as in `Layers`.

    Raises:
        RGTGError: the model cannot run so (`TritonLayers.unsupported` gives the reason beforehand).
    """

    def __init__(self, model: PreTrainedModel, own: TransformersLayers):
        reason = self.unsupported(model)
        if reason is not None:
            raise RGTGError(f"engine='triton' cannot run {type(model).__name__}: {reason}; use engine='auto'")
        self._own, self.final_norm = own, own.final_norm
        self._compiled = False
        self._rows: LowRankRows | None = None
        self._decoder: Any = model.base_model
        config = self._decoder.config
        family = FAMILIES[type(self._decoder).__name__]
        self._layers = list(self._decoder.layers)[: config.num_hidden_layers]
        self._head_norm, self._offset, self._windows = family.head_norm, family.norm_offset, family.windows
        self._eps = float(config.rms_norm_eps)
        self._activation = _ACTIVATIONS[ACTIVATIONS[config.hidden_act]]
        # Some versions of transformers scale in the embedding itself, others after it.
        scaled = family.scaled_embedding and type(self._decoder.embed_tokens) is nn.Embedding
        self._embedding_scale = config.hidden_size**0.5 if scaled else None

    @staticmethod
    def unsupported(model: PreTrainedModel) -> str | None:
        """Why a model cannot run so, in words; None where it can."""
        decoder: Any = model.base_model
        family = FAMILIES.get(type(decoder).__name__)
        if family is None or not type(decoder).__module__.startswith(
            f"transformers.models.{family.package}."
        ):
            return f"{type(decoder).__name__} is not one of {', '.join(FAMILIES)}"
        if decoder.config.hidden_act not in ACTIVATIONS:
            return f"activation {decoder.config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}"
        if getattr(decoder.config, "use_bidirectional_attention", False):
            return "its attention is bidirectional"
        # The forward of these modules is not called, only their parts are.
        replaced = next((name for name, module in _bypassed(decoder) if _changed(module)), None)
        return None if replaced is None else f"{replaced} has hooks or a forward of its own"

    def compile(self, options: Mapping[str, Any] | None) -> None:
        """The model's own blocks run from now on, compiled: the compiler fuses what is between the products."""
        self._own.compile(options)
        self._compiled, self.final_norm = True, self._own.final_norm

    def refresh(self) -> None:
        self._own.refresh()

    def adapt(self, adapters: Sequence[Adapter], rows: LowRankRows) -> None:
        self._own.adapt(adapters, rows)
        self._rows = rows

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        return self._own.logits(hidden, head)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PrefixCache | SplitCache,
        normed: bool = True,
    ) -> torch.Tensor:
        if self._compiled:
            return self._own.forward(ids, positions, cache, normed)
        decoder = self._decoder
        with nullcontext() if self._rows is None else self._rows.interleaved(len(ids)):
            x, stream = decoder.embed_tokens(ids), None
            if self._embedding_scale is not None:
                x = x * torch.tensor(self._embedding_scale, dtype=x.dtype)
            angles = decoder.rotary_emb(x, position_ids=positions)
            spread = 1
            for part in cache.parts:
                if part.branches > spread:
                    spread = part.branches
                    x, stream = x if stream is None else x + stream, None
                    x, *angles = (each.repeat_interleave(part.branches, 0) for each in (x, *angles))
                for index in range(part.first, part.last):
                    x, stream = self._layer(index, x, stream, angles, part, cache)
        assert stream is not None  # a model has layers
        if not normed:
            return x + stream
        return add_rms_norm(x, stream, decoder.norm.weight, self._eps, self._offset)[0]

    def _layer(
        self,
        index: int,
        x: torch.Tensor,
        stream: torch.Tensor | None,
        angles: Sequence[torch.Tensor],
        part: CachePart,
        cache: PrefixCache | SplitCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer.

        Args:
            index: index of the layer.
            x: [B, S, E], what the layer before adds to the residual stream; the stream itself where that is None.
            stream: [B, S, E], the residual stream before that addition.
            angles: cosines and sines [B, S, R].
            part: the part of the cache that holds the layer.
            cache: the cache.

        Returns:
            What this layer's MLP adds to the stream, and the stream before that addition, both [B, S, E].
        """
        layer = self._layers[index]
        attention, mlp, D = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        normed, total = add_rms_norm(x, stream, layer.input_layernorm.weight, self._eps, self._offset)
        stream = x if stream is None else total
        projections = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        k_new, v_new = part.cache.k_new[index - part.first], part.cache.v_new[index - part.first]
        q_norm, k_norm = (
            (attention.q_norm.weight, attention.k_norm.weight) if self._head_norm else (None, None)
        )
        q, k, v = (each.unflatten(-1, (-1, D)) for each in projections)
        cos, sin = angles
        q = rope_and_store(q, k, v, cos, sin, k_new, v_new, q_norm, k_norm, self._eps, self._offset)
        visible = (window(attention) or None) if self._windows else None
        out, _ = prefix_attention(
            attention,
            q,
            k_new,
            v_new,
            None,
            scaling=attention.scaling,
            prefix_cache=cache,
            sliding_window=visible,
        )
        normed, stream = add_rms_norm(
            attention.o_proj(out.flatten(2)),
            stream,
            layer.post_attention_layernorm.weight,
            self._eps,
            self._offset,
        )
        inner = act_and_mul(mlp.gate_proj(normed), mlp.up_proj(normed), self._activation)
        return mlp.down_proj(inner), stream


def _bypassed(decoder: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a decoder whose forward is not called, with their names."""
    for index, layer in enumerate(decoder.layers):
        name, attention = f"layers.{index}", layer.self_attn
        yield from ((name, layer), (f"{name}.self_attn", attention), (f"{name}.mlp", layer.mlp))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{norm}", getattr(layer, norm)
        for norm in ("q_norm", "k_norm"):
            if hasattr(attention, norm):
                yield f"{name}.self_attn.{norm}", getattr(attention, norm)
    yield from (("the decoder", decoder), ("norm", decoder.norm))


def _changed(module: nn.Module) -> bool:
    """Whether a module has hooks of others, a forward of its own or a class that transformers does not have."""
    own = "forward" in vars(module) or not type(module).__module__.startswith("transformers.models.")
    return own or foreign_hooks([module]) > 0
