"""Llama-like decoders on the CPU: all layers of a pass in one call of the C++ extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.int8 import Int8Linear
from rgtg_fast.models.native_families import (
    ACTIVATIONS,
    MATRICES,
    NATIVE_FAMILIES,
    Family,
    linears,
    norms,
    unsupported,
    window,
)
from rgtg_fast.ops import _extension

# Outputs of a low-rank factor that are stored next to each other; csrc/decoder_layers.hpp has the same number.
_PANEL = 16


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x weightᵀ · scale + bias, in float32, bit-identical for a row in any batch and on any number of threads.

    Args:
        x: [B, E] float32, rounded to bfloat16 where the weight is bfloat16 or int8.
        weight: [V, E] float32, bfloat16 or, with a scale, int8; contiguous, on the CPU.
        bias: [V] or None.
        scale: [V] float32 of an int8 weight, None for other weights.

    Returns:
        [B, V] float32.

    Raises:
        RGTGError: a weight of another width, dtype, layout or device, or a scale of another shape or dtype.
    """
    kinds = (torch.float32, torch.bfloat16) if scale is None else (torch.int8,)
    rows, inner = x.shape
    if weight.ndim != 2 or weight.shape[1] != inner or inner < 1 or weight.dtype not in kinds:
        named = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise RGTGError(
            f"the weight is {tuple(weight.shape)} {weight.dtype}: it must be [V, {inner}] {named}"
            f"{'' if scale is None else ' beside a scale'}"
        )
    if not weight.is_contiguous() or weight.device.type != "cpu":
        raise RGTGError(f"the weight must be contiguous and on the CPU, not on {weight.device}")
    x = x.float().contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RGTGError(f"the bias is {tuple(bias.shape)}: it must be {tuple(weight.shape[:1])}")
    if scale is not None and (scale.shape != weight.shape[:1] or scale.dtype != torch.float32):
        raise RGTGError(
            f"the scale is {tuple(scale.shape)} {scale.dtype}: it must be {tuple(weight.shape[:1])} float32"
        )
    scale = None if scale is None else scale.contiguous()
    out = torch.empty(rows, weight.shape[0], dtype=torch.float32)
    arrays = (
        _extension.array(x),
        _extension.array(weight),
        _extension.optional_array(bias),
        _extension.optional_array(scale),
        _extension.array(out),
    )
    _extension.kernels().linear(torch.get_num_threads(), *arrays)
    return out


def _panels(b: torch.Tensor) -> torch.Tensor:
    """A factor [outer, r] in the extension's layout [outer / 16, r, 16], padded with zeros."""
    outer, rank = b.shape
    panels = -(-outer // _PANEL)
    filled = b.new_zeros(panels * _PANEL, rank)
    filled[:outer] = b
    return filled.view(panels, _PANEL, rank).transpose(1, 2).contiguous()


class NativeLayers:
    """A transformers decoder whose layers run as one C++ call per pass.

    The model's weights are read in place: matrices are neither copied nor packed, so in-place changes take effect, also
    of the integers and scales of `Int8Linear`, which are made once, when the model is loaded.
    Biases and norm weights (a few kilobytes) are copied to float32, again by `refresh`. Activations are float32; with
    bfloat16 and int8 weights the matrix products' inputs are rounded to bfloat16 and summed in float32. A row's result
    is bit-identical in any batch and with any number of threads.

    Args:
        model: the decoder without its head, of one of `NATIVE_FAMILIES`.

    Attributes:
        windows: each layer's window, 0 for none; empty where no layer has one.

    Raises:
        RGTGError: the model cannot run here (`NativeLayers.supported` gives the reason beforehand).
    """

    def __init__(self, model: nn.Module):
        reason = self.supported(model)
        if reason is not None:
            raise RGTGError(
                f"{type(model).__name__} cannot run natively: {reason}; use engine='transformers'"
            )
        decoder: Any = model
        config = decoder.config
        family = NATIVE_FAMILIES[type(model).__name__]
        layers = list(decoder.layers)[: config.num_hidden_layers]
        attention = layers[0].self_attn
        self.dtype: torch.dtype = decoder.embed_tokens.weight.dtype
        self.head_dim = int(attention.head_dim)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.hidden = int(config.hidden_size)
        self.layers = len(layers)
        embedding = decoder.embed_tokens.weight.detach()
        self.vocabulary = len(embedding)
        # The scale is rounded to the model's dtype, as transformers does.
        scale = torch.tensor(self.hidden**0.5 if family.scaled_embedding else 1.0, dtype=self.dtype)
        self.rotary = decoder.rotary_emb
        # The kinds of layers that differ in their rope, and each layer's.
        kinds = config.layer_types[: self.layers] if family.rope_by_kind else [None] * self.layers
        self._kinds = list(dict.fromkeys(kinds))
        self._cos = self._sin = torch.empty(0, 0, 0)
        # Tensors whose addresses the extension stores.
        self._tensors: list[torch.Tensor] = []
        # The copies among them: source, offset and copy.
        self._copies: list[tuple[torch.Tensor, float, torch.Tensor]] = []
        self._factors: list[torch.Tensor] = []

        self._attentions = [layer.self_attn for layer in layers] if family.windows else []
        self.windows: list[int] = []

        table = [self._weights(layer, family) for layer in layers]
        self._grow_tables(64)
        self._read_windows()
        try:
            self._native = _extension.kernels().DecoderLayers(
                table,
                [self._kinds.index(kind) for kind in kinds],
                self._vector(decoder.norm.weight, family.norm_offset),
                self._array(embedding),
                float(scale),
                self.heads,
                self.kv_heads,
                self.head_dim,
                self._cos.shape[2],
                float(config.rms_norm_eps),
                float(attention.scaling),
                float(attention.attn_logit_softcapping or 0) if family.softcap else 0.0,
                ACTIVATIONS[getattr(config, family.activation)],
            )
        except ValueError as error:
            raise RGTGError(
                f"{type(model).__name__} cannot run natively: {error}; use engine='transformers'"
            ) from error

    def _array(self, tensor: torch.Tensor) -> _extension.Array:
        self._tensors.append(tensor)
        return _extension.array(tensor)

    def _vector(self, tensor: torch.Tensor | None, offset: float = 0.0) -> _extension.Array | None:
        """A float32 copy of a bias or norm weight plus an offset."""
        if tensor is None:
            return None
        source = tensor.detach()
        copy = source.float().add(offset).contiguous()
        self._copies.append((source, offset, copy))
        return self._array(copy)

    def _scale(self, matrix: nn.Module) -> _extension.Array | None:
        return self._array(matrix.scale) if isinstance(matrix, Int8Linear) else None

    def _weights(self, layer: Any, family: Family) -> list[_extension.Array | None]:
        """A layer's matrices, biases, norms and scales in the extension's order."""
        matrices: dict[str, Any] = linears(layer)
        return [
            *(self._array(matrices[name].weight.detach()) for name in MATRICES),
            *(self._vector(matrices[name].bias) for name in MATRICES),
            *(self._vector(norm and norm.weight, family.norm_offset) for norm in norms(layer, family)),
            *(self._scale(matrices[name]) for name in MATRICES),
        ]

    @staticmethod
    def supported(model: nn.Module) -> str | None:
        """Why a model cannot run natively, in words; None where it can."""
        return unsupported(model)

    def refresh(self) -> None:
        """Takes over changes of biases, norm weights and windows; matrices and scales are read in place."""
        for source, offset, copy in self._copies:
            copy.copy_(source).add_(offset)
        self._read_windows()

    def _read_windows(self) -> None:
        """Each layer's window as its module passes it to its attention, 0 for none; empty where no layer has one."""
        windows = [window(attention) for attention in self._attentions]
        self.windows = windows if any(windows) else []

    def adapt(self, adapters: Sequence[Adapter]) -> None:
        """Sets the adapters of further forwards: see `branches` of `forward`.

        Raises:
            RGTGError: an adapter changes a module that is not one of a layer's seven matrices.
        """
        known = {f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in MATRICES}
        for adapter in adapters:
            for layer, name in adapter.low_rank:
                if name not in known:
                    raise RGTGError(
                        f"{adapter.name} changes layer {layer} {name}, which the native engine does not run: "
                        "use engine='transformers'"
                    )
        factors: list[torch.Tensor] = []
        table = []
        for layer in range(self.layers):
            for name in MATRICES:
                module = f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
                for adapter in adapters:
                    pair = adapter.low_rank.get((layer, module))
                    if pair is None:
                        table.append((None, None))
                        continue
                    a, b = pair.a.to(self.dtype).contiguous(), _panels(pair.b.float())
                    factors += [a, b]
                    table.append((_extension.array(a), _extension.array(b)))
        # It waits for a running forward, which still reads the previous factors.
        try:
            self._native.adapt(table)
        except ValueError as error:
            raise RGTGError(f"the adapters do not fit this model: {error}") from error
        self._factors = factors

    def _grow_tables(self, length: int) -> None:
        """Tables of cos and sin [kinds, length, rotary D] by the model's own rotary embedding, in float32."""
        positions, like = torch.arange(length).unsqueeze(0), torch.empty(0, dtype=torch.float32)
        tables = [
            self.rotary(like, position_ids=positions, **({} if kind is None else {"layer_type": kind}))
            for kind in self._kinds
        ]
        self._cos, self._sin = (
            torch.cat([table[index] for table in tables]).contiguous() for index in (0, 1)
        )

    def _check(
        self, cache: torch.Tensor, name: str, layers: int, rows: int, tokens: int | None
    ) -> _extension.Array:
        """Keys or values [L, B, G, T, D] for the extension, after checking that they fit this model."""
        expected = (
            layers,
            rows,
            self.kv_heads,
            cache.shape[3] if tokens is None else tokens,
            self.head_dim,
        )
        if tuple(cache.shape) != expected:
            raise RGTGError(
                f"{name} is {tuple(cache.shape)}, not {expected}: [layers, rows, kv heads, tokens, D]"
            )
        if cache.dtype != self.dtype or cache.device.type != "cpu":
            raise RGTGError(f"{name} is {cache.dtype} on {cache.device}, not {self.dtype} on the CPU")
        if cache.stride(4) != 1 and self.head_dim > 1:
            raise RGTGError(
                f"the last dimension of {name} has stride {cache.stride(4)}: it must be contiguous"
            )
        return _extension.array(cache)

    def _check_inputs(self, inputs: torch.Tensor, positions: torch.Tensor, first: int, last: int) -> None:
        if not 0 <= first < last <= self.layers:
            raise RGTGError(f"layers {first} to {last} are not in 0..{self.layers}")
        states = inputs.ndim == 3
        if states and (inputs.dtype != torch.float32 or inputs.shape[2] != self.hidden):
            raise RGTGError(
                f"states are {tuple(inputs.shape)} {inputs.dtype}, not [B, S, {self.hidden}] float32"
            )
        if not states and inputs.dtype != torch.int64:
            raise RGTGError(f"token ids are {inputs.dtype}, not torch.int64")
        if not states and first:
            raise RGTGError(f"token ids enter layer 0, not layer {first}: pass states")
        if positions.shape != inputs.shape[:2] or positions.dtype != torch.int64:
            raise RGTGError(
                f"position_ids are {tuple(positions.shape)} {positions.dtype}, not {tuple(inputs.shape[:2])} int64"
            )

    def _check_prefixes(
        self,
        lengths: torch.Tensor,
        ancestors: torch.Tensor | None,
        slots: torch.Tensor | None,
        shape: tuple[int, int],
        cache: tuple[int, int],
    ) -> None:
        (rows, tokens), (count, longest) = shape, cache
        if slots is not None:
            if slots.shape != (rows,) or slots.dtype != torch.int64:
                raise RGTGError(f"slots are {tuple(slots.shape)} {slots.dtype}, not {(rows,)} int64")
            if rows and (int(slots.min()) < 0 or int(slots.max()) >= count):
                raise RGTGError(
                    f"slots are {slots.tolist()}: each must be in 0..{count - 1}, the cache's slots"
                )
        if lengths.shape != (count,) or lengths.dtype != torch.int64:
            raise RGTGError(f"lengths are {tuple(lengths.shape)} {lengths.dtype}, not {(count,)} int64")
        if ancestors is not None and (ancestors.shape != (rows, tokens) or ancestors.dtype != torch.int64):
            raise RGTGError(
                f"ancestors are {tuple(ancestors.shape)} {ancestors.dtype}, not {(rows, tokens)} int64"
            )
        if ancestors is not None and tokens > 64:
            raise RGTGError(f"S={tokens} exceeds 64, the tokens that an ancestor mask can name")
        read = lengths if slots is None else lengths[slots]
        if rows and (int(read.min()) < 0 or int(read.max()) > longest):
            raise RGTGError(f"lengths are {read.tolist()}: each must be in 0..{longest}, the cache's length")

    def forward(
        self,
        inputs: torch.Tensor,
        position_ids: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        lengths: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        causal: bool = False,
        ancestors: torch.Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        branches: int = 1,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs layers over S new tokens per row, beside each row's prefix.

        Args:
            inputs: [B, S] int64 token ids, or [B, S, E] float32 states that enter layer `first`.
            position_ids: [B, S] int64.
            k_cache: [L, N, G, T, D], keys of the prefixes in these layers, N = B without `slots`; only the last
                dimension must be contiguous.
            v_cache: [L, N, G, T, D], values.
            lengths: [N] int64, tokens in each slot of the cache.
            k_new: [L, B, G, S, D], receives the new tokens' keys; may be a window of the cache beyond `lengths`.
            v_new: [L, B, G, S, D], receives the values.
            causal: new token s sees new tokens 0..s; otherwise itself alone, or what `ancestors` says.
            ancestors: [B, S] int64 bit masks, S <= 64: bit j of ancestors[b, s] = s sees new token j.
            first: the first layer that runs.
            last: the layer after the last that runs; by default all run.
            branches: row b has the correction of adapter b % branches - 1, none where that is -1: 1, or one more than
                the adapters of `adapt`.
            slots: [B] int64, the slot of each row's prefix; by default row b's is b.

        Returns:
            States [B, S, E] float32 after these layers, and after the final norm where the last one is among them.

        Raises:
            RGTGError: a tensor of another shape, dtype or device.
        """
        rows, tokens = inputs.shape[:2]
        last = self.layers if last is None else last
        positions, states = position_ids.contiguous(), inputs.ndim == 3
        self._check_inputs(inputs, positions, first, last)
        count = rows if slots is None else k_cache.shape[1]
        kv = [
            self._check(k_cache, "k_cache", last - first, count, None),
            self._check(v_cache, "v_cache", last - first, count, None),
            self._check(k_new, "k_new", last - first, rows, tokens),
            self._check(v_new, "v_new", last - first, rows, tokens),
        ]
        self._check_prefixes(lengths, ancestors, slots, (rows, tokens), (count, k_cache.shape[3]))
        if states:
            x = inputs.clone(memory_format=torch.contiguous_format)
        else:
            x = torch.empty(rows, tokens, self.hidden, dtype=torch.float32)
        if x.numel() == 0:
            return x
        furthest = int(positions.max())
        if int(positions.min()) < 0:
            raise RGTGError(f"position_ids begin at {int(positions.min())}: they must not be negative")
        length = self._cos.shape[1]
        if furthest >= length:
            self._grow_tables(max(2 * length, furthest + 1))
        # Local references, since a concurrent call may replace the tables by longer ones.
        cos, sin = self._cos, self._sin
        # The extension looks the embeddings up itself: torch's threads would keep spinning on the cores it needs.
        ids = None if states else inputs.contiguous()
        lengths = lengths.contiguous()
        ancestors = None if ancestors is None else ancestors.contiguous()
        slots = None if slots is None else slots.contiguous()
        done = self._native.forward(
            first,
            last,
            branches,
            _extension.optional_array(ids),
            *(_extension.array(tensor) for tensor in (x, cos, sin, positions)),
            kv,
            _extension.array(lengths),
            _extension.optional_array(ancestors),
            _extension.optional_array(slots),
            self.windows[first:last],
            causal,
            torch.get_num_threads(),
        )
        if not done and ids is not None:
            raise RGTGError(
                f"token ids reach from {int(ids.min())} to {int(ids.max())}: the vocabulary has {self.vocabulary}"
            )
        return x

    def logits(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The head's output [B, V] float32 for hidden states [B, E] float32: see `linear`."""
        return linear(hidden, weight, bias, scale)
