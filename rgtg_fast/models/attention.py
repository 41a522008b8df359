"""The attention function that transformers' blocks call: our tree_attention over a PrefixCache.

Registered under `NAME`. A model that uses it still works outside the decoder: without a PrefixCache the call is passed
to transformers' own SDPA attention and mask, or to the model's own attention where SDPA cannot compute it. Training's
packed rows have such a function too (`PACKED`). Each passes the other's calls on, so that one loaded model can be used
by both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.support import TESTED_FAMILIES

NAME, PACKED = "rgtg_prefix", "rgtg_packed"

# Arguments of a model's attention that change nothing in eval mode over a prefix cache. Any other number or tensor that
# is not a parameter of `prefix_attention` means attention that the cache does not compute.
_HARMLESS = frozenset({"position_ids", "cache_position", "dropout"})


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, G, S, D], the new tokens alone
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prefix_cache: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [H], attention sinks
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends the new tokens to their row's prefix and to the new tokens they may see. Returns [B, S, H, D]."""
    if prefix_cache is None:
        special = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: asked for name, asked in special.items() if asked is not None}
        attend, mask = _without_cache(module, query, key, attention_mask, kwargs)
        return attend(module, query, key, value, mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        _refuse(module, "a mask or bias of its own")
    for name, asked in kwargs.items():
        if isinstance(asked, (torch.Tensor, float)) and name not in _HARMLESS:
            _refuse(module, name)
    if sliding_window is not None and not prefix_cache.windows and sliding_window < prefix_cache.max_length:
        _refuse(module, f"a sliding window of {sliding_window} tokens that was not verified at load time,")
    sinks = None if s_aux is None else s_aux.to(query.dtype)
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = prefix_cache.attend(int(layer), query, key, value, scale, sliding_window, softcap, sinks)
    return out.transpose(1, 2), None


def _without_cache(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    asked: dict[str, Any],
) -> tuple[Callable[..., Any], torch.Tensor | None]:
    """The attention function of a call without a prefix cache, and its mask; `asked` are the call's arguments."""
    if asked.get("packing") is not None:
        return ALL_ATTENTION_FUNCTIONS[PACKED], mask
    if asked.get("softcap") is None and asked.get("s_aux") is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"], mask
    # SDPA has no caps, and leaves sinks out without a word. The mask was made for it: none where all is causal.
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[
            None, None
        ]
    if mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"], mask


def _refuse(module: nn.Module, what: str) -> NoReturn:
    raise RGTGError(
        f"{type(module).__name__} asks for {what} in its attention, which the prefix cache does not compute: "
        f"use a tested family ({TESTED_FAMILIES})"
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
