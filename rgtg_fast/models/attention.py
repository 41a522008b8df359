"""The attention function that transformers' blocks call: our tree_attention over a PrefixCache.

Registered under `NAME`. A model that uses it still works outside the decoder: without a PrefixCache the call is passed
to transformers' own SDPA attention and mask. Training's packed rows have such a function too (`PACKED`). Each passes
the other's calls on, so that one loaded model can be used by both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rgtg_fast.errors import RGTGError

NAME, PACKED = "rgtg_prefix", "rgtg_packed"

# Arguments of a model's attention that change nothing in eval mode over a prefix cache; a window is compared with the
# cache. Any other number or tensor means attention that is not plain softmax(QK^T)V over the whole prefix.
_HARMLESS = frozenset({"position_ids", "cache_position", "dropout", "sliding_window"})


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, G, S, D], the new tokens alone
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prefix_cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends the new tokens to their row's prefix and to the new tokens they may see. Returns [B, S, H, D]."""
    if kwargs.get("packing") is not None:
        packed = ALL_ATTENTION_FUNCTIONS[PACKED]
        return packed(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if prefix_cache is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        _refuse(module, "a mask or bias of its own")
    for name, asked in kwargs.items():
        if isinstance(asked, (torch.Tensor, float)) and name not in _HARMLESS:
            _refuse(module, name)
    window = kwargs.get("sliding_window")
    if window is not None and window < prefix_cache.max_length:
        _refuse(module, f"a sliding window of {window} tokens")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = prefix_cache.attend(int(module.layer_idx), query, key, value, scale)  # pyright: ignore[reportArgumentType]
    return out.transpose(1, 2), None


def _refuse(module: nn.Module, what: str) -> NoReturn:
    raise RGTGError(
        f"{type(module).__name__} asks for {what} in its attention, which the prefix cache does not compute: "
        "use a model with plain attention (Llama, Qwen2, Qwen3, Mistral, Gemma, Phi, GPT-NeoX, OPT, GPT-2)"
    )


def prefix_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask for a PrefixCache, which reports no key length and masks inside the op; SDPA's mask otherwise."""
    if kwargs.get("kv_length") == 0:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


AttentionInterface.register(NAME, prefix_attention)
AttentionMaskInterface.register(NAME, prefix_mask)


def use_prefix_attention(model: PreTrainedModel) -> None:
    """Makes the model's blocks call `prefix_attention`."""
    # A trunk may have a configuration of its own, which some versions of transformers do not update.
    for each in model.modules():
        if isinstance(each, PreTrainedModel) and each.config._attn_implementation != NAME:
            each.set_attn_implementation(NAME)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model uses its own attention code, which does everything that its family does."""
    kept = attentions(model)
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        restore_attentions(kept)


def attentions(model: PreTrainedModel) -> list[tuple[PreTrainedModel, str | None]]:
    """Each (sub)model and the attention it calls, the outermost first."""
    return [
        (each, each.config._attn_implementation)
        for each in model.modules()
        if isinstance(each, PreTrainedModel)
    ]


def restore_attentions(kept: list[tuple[PreTrainedModel, str | None]]) -> None:
    """Restores what `attentions` returned."""
    for model, name in kept:
        if name is not None:
            model.set_attn_implementation(name)
