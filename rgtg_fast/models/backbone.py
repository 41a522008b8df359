"""A causal transformer with its prefix cache: prefill a slot, step all rows, commit what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.attention import use_prefix_attention
from rgtg_fast.models.cache import PrefixCache
from rgtg_fast.models.native import NativeLayers

ENGINES = ("auto", "native", "transformers")

# How far, relative to their norm, logits of two correct forwards may differ.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Layers(Protocol):
    """What runs a model's blocks over the forward that its cache has begun."""

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
        """Hidden states [B, S, E] after the final norm of tokens [B, S] at positions [B, S]."""
        ...

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        """Logits [B, V] of hidden states [B, E]."""
        ...


class TransformersLayers:
    """The model's own blocks, untouched, with our attention function."""

    def __init__(self, model: PreTrainedModel):
        use_prefix_attention(model)
        self.trunk = model.base_model

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
        out = self.trunk(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, prefix_cache=cache
        )
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        return head(hidden.to(head.weight.dtype))


class FusedLayers:
    """The same blocks fused into one C++ call a pass (CPU, Llama-like families)."""

    def __init__(self, model: PreTrainedModel):
        self.native = NativeLayers(model.base_model)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
        keys, values, lengths = cache.active
        return self.native.forward(
            ids,
            positions,
            keys,
            values,
            lengths,
            cache.k_new,
            cache.v_new,
            causal=cache.causal,
            ancestors=cache.ancestors,
        )

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        return self.native.logits(hidden, head.weight, head.bias)


def choose_layers(model: PreTrainedModel, engine: str) -> tuple[str, Layers]:
    """The engine that serves and the layers it runs; `"auto"` takes the native one where it can.

    Raises:
        RGTGError: an unknown engine, or `"native"` for a model that it cannot run (with the reason).
    """
    if engine not in ENGINES:
        raise RGTGError(f"engine={engine!r} is unknown: use one of {', '.join(map(repr, ENGINES))}")
    if engine != "transformers":
        reason = NativeLayers.supported(model.base_model)
        if reason is None:
            return "native", FusedLayers(model)
        if engine == "native":
            raise RGTGError(f"engine='native' cannot run {type(model).__name__}: {reason}; use engine='auto'")
    return "transformers", TransformersLayers(model)


@dataclass
class Counter:
    """Forwards of a model and tokens through it, prompts apart from decode steps."""

    calls: int = 0
    tokens: int = 0
    prompt_tokens: int = 0


class Backbone:
    """One transformers model, its head and its PrefixCache.

    Rows live in slots 0..n-1. `prefill` fills one slot's prefix, `step` runs S undecided tokens per row, `commit`
    appends the chosen one. Nothing is ever computed twice.

    Args:
        model: a causal model with a head: `lm_head` (language model) or `score` (reward model).
        head: the head's linear layer.
        engine: `"auto"`, `"native"` or `"transformers"`.
        limit: tokens that the model's context holds.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, engine: str, limit: int):
        self.model, self.head, self.limit = model, head, limit
        self.device, self.dtype = head.weight.device, head.weight.dtype
        self.engine, self.layers = choose_layers(model, engine)
        config: Any = model.config.get_text_config()
        heads = config.num_attention_heads
        self.geometry = (
            int(config.num_hidden_layers),
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        )
        self.cache = PrefixCache(*self.geometry, self.dtype, self.device)
        self.counter = Counter()
        # The host's copy of cache.lengths, so that nothing waits for the device.
        self._lengths: list[int] = []

    @property
    def name(self) -> str:
        """The model's path or hub id, or its class where it has none."""
        return self.model.config._name_or_path or type(self.model).__name__

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in the cache."""
        return PrefixCache.bytes_per_token(*self.geometry, self.dtype)

    def reserve(self, slots: int, length: int) -> None:
        """Empties the cache and makes room for `slots` rows of `length` tokens."""
        self.cache.reserve(slots, length)
        self._lengths = [0] * slots
        self.counter = Counter()

    def prefill(self, slot: int, ids: Sequence[int]) -> torch.Tensor:
        """Appends tokens to a slot's prefix in one causal forward; returns their hidden states [S, E]."""
        if not ids:
            return torch.empty(0)
        start, count = self._lengths[slot], len(ids)
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        positions = torch.arange(start, start + count, device=self.device).unsqueeze(0)
        self.cache.begin_prefill(slot, start, count)
        hidden = self.layers.forward(tokens, positions, self.cache)
        self.cache.end_prefill(count)
        self._lengths[slot] += count
        self.counter.prompt_tokens += count
        return hidden[0]

    def clear(self, slot: int) -> None:
        """Empties a slot for the next prompt."""
        self.roll_back(slot, 0)

    def roll_back(self, slot: int, length: int) -> None:
        """Cuts a slot's prefix back to its first `length` tokens; nothing is copied or computed."""
        self.cache.lengths[slot] = length
        self._lengths[slot] = length

    def length(self, slot: int) -> int:
        """Tokens in a slot's prefix, from the host's own count."""
        return self._lengths[slot]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, E] of S undecided tokens [B, S] per row, each of which sees its prefix and itself."""
        rows, new_tokens = tokens.shape
        self.cache.begin_step(rows, new_tokens)
        positions = self.cache.lengths[:rows, None].expand(rows, new_tokens)
        self.counter.calls += 1
        self.counter.tokens += rows * new_tokens
        return self.layers.forward(tokens, positions, self.cache)

    def commit(self, choice: torch.Tensor) -> None:
        """Appends undecided token `choice[b]` [B] to each row's prefix."""
        self.cache.commit(choice)
        for slot in range(len(choice)):
            self._lengths[slot] += 1

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""
        self.cache.move(source, target, self._lengths[source])
        self._lengths[target] = self._lengths[source]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's output [B, V] for hidden states [B, E]."""
        return self.layers.logits(hidden, self.head)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """The one-label head's output [B, S] in at least float32 for hidden states [B, S, E]."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = self.head.bias
        out = functional.linear(
            hidden.to(dtype), self.head.weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        return out.squeeze(-1)

    @torch.inference_mode()
    def verify(self) -> None:
        """Compares a few cached steps with the model's own uncached forward, once at load time.

        What a family does beyond its blocks (scaled or capped logits, an unknown kind of attention) would otherwise
        go unnoticed and change every result.

        Raises:
            RGTGError: the two differ by more than the dtype's rounding.
        """
        # The padding token stays out: a reward model's own forward would score the token before it. A short context, or
        # a window as short, is not exceeded.
        pad = self.model.config.get_text_config().pad_token_id
        tokens = (number % self.embeddings for number in range(3, 59, 7))
        ids = [token for token in tokens if token != pad][: min(6, self.limit)]
        self.reserve(1, len(ids))
        self.prefill(0, ids[: len(ids) // 2])
        out = torch.empty(0)
        for token in ids[len(ids) // 2 :]:
            hidden = self.step(torch.tensor([[token]], device=self.device))
            self.commit(torch.zeros(1, dtype=torch.int64, device=self.device))
            out = self.logits(hidden.squeeze(1))
        text = torch.tensor([ids], device=self.device)
        own = self.model(input_ids=text, use_cache=False).logits.reshape(-1, out.shape[-1])[-1:].double()
        error = float((out.double() - own).norm() / own.norm())
        if not error <= _ROUNDING[self.dtype]:
            raise RGTGError(
                f"{type(self.model).__name__} cannot be served: its cached forward differs from its own by "
                f"{error:.1%}, more than {self.dtype} rounds; use a tested family (Llama, Qwen2, Qwen3, "
                "Mistral, Gemma, Phi, GPT-NeoX, OPT, GPT-2)"
            )
        self.reserve(1, len(ids))

    @property
    def embeddings(self) -> int:
        """Rows of the input embedding."""
        weight: Any = self.model.get_input_embeddings().weight
        return int(weight.shape[0])

    def hidden_uncached(self, ids: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, E] of a whole text by the model's own uncached forward."""
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
