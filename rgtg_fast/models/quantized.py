"""Quantized weights: rounds them, and recognizes models that have them, never to be cast, merged, fused or trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models import int4, int8, native_families
from rgtg_fast.models.fingerprint import keep_fingerprint
from rgtg_fast.models.support import title

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Integers of 64 bits are positions, and booleans masks.
_NOT_WEIGHTS = (torch.int64, torch.bool)


@dataclass(frozen=True)
class WeightFormat:
    """A format that weights are rounded to once a model is loaded.

    Attributes:
        layer: what takes the place of a linear layer.
        unsupported: why a weight cannot have this format, empty where it can.
        native: whether the native engine alone executes it; a language model's head is then rounded too.
    """

    layer: type[nn.Module]
    unsupported: Callable[[torch.Tensor], str]
    native: bool


# By the name of the option `weights`.
FORMATS = {
    int4.INT4: WeightFormat(int4.Int4Linear, int4.unsupported, native=False),
    int8.INT8: WeightFormat(int8.Int8Linear, int8.unsupported, native=True),
}


def quantization(model: Any) -> str | None:
    """How a model's weights are quantized, as transformers names the method; None for plain weights.

    Weights that were quantized in place, without transformers, are named by their class or dtype. Weights that
    transformers has dequantized are plain.

    Args:
        model: a transformers model.
    """
    buffers = (x for x in model.buffers() if x.ndim > 1 and x.dtype not in _NOT_WEIGHTS)
    odd = next((x for x in chain(model.parameters(), buffers) if not is_plain(x)), None)
    if odd is None:
        return None
    for name, chosen in FORMATS.items():
        if any(isinstance(module, chosen.layer) for module in model.modules()):
            return name
    method = getattr(model, "quantization_method", None)
    if getattr(model, "hf_quantizer", None) is not None and method is not None:
        return str(getattr(method, "value", method))
    return (
        str(odd.dtype).removeprefix("torch.") if type(odd.data) is torch.Tensor else type(odd.data).__name__
    )


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is an ordinary tensor of floating-point numbers, in one process or spread over several."""
    ordinary = type(weight.data) is torch.Tensor or hasattr(weight, "full_tensor")
    return ordinary and weight.dtype in _FLOATS


def refuse_quantized(model: Any, what: str) -> None:
    """Refuses a model with quantized weights.

    Args:
        model: a transformers model.
        what: what quantized weights cannot do, to follow "cannot": "be trained".

    Raises:
        RGTGError: the weights are quantized.
    """
    method = quantization(model)
    if method is not None:
        raise RGTGError(
            f"{title(model)} has quantized weights ({method}), which cannot {what}: use the unquantized model"
        )


def check_weights(weights: object, name: str = "weights") -> None:
    """Refuses what weights cannot be rounded to.

    Args:
        weights: a name of `FORMATS`, or None for the weights as they are.
        name: the argument's name, for the message.

    Raises:
        RGTGError: anything else.
    """
    if weights is not None and weights not in list(FORMATS):
        known = ", ".join(map(repr, FORMATS))
        raise RGTGError(
            f"{name}={shown(weights)} is unknown: use {known}, or None for the weights as they are"
        )


def round_weights(model: Any, weights: str | None, engine: str = "auto") -> None:
    """Rounds the weights of a model's decoder layers in place.

    Args:
        model: a transformers model that nobody else has, on the device and in the dtype in which it will run.
        weights: as in `check_weights`.
        engine: the engine that the user asked for.

    Raises:
        RGTGError: weights that are quantized already, or that do not fit, by their name; or a model or an engine that
            does not execute the format.
    """
    if weights is None:
        return
    refuse_quantized(model, f"be rounded to {weights} again")
    if FORMATS[weights].native:
        if engine not in ("auto", "native"):
            raise RGTGError(
                f"weights={weights!r} and engine={engine!r}: the native engine alone executes them, leave out engine"
            )
        reason = native_families.unsupported(model.base_model)
        if reason is not None:
            raise RGTGError(
                f"weights={weights!r} needs the native engine (CPU), which cannot run {title(model)}: {reason}; leave "
                "out weights"
            )
        keep_fingerprint(model)
    quantize_layers(model, weights)


def quantize_layers(model: Any, weights: str) -> int:
    """Replaces the linear layers of a model's decoder layers, in place; the embedding and a reward's head stay.

    Args:
        model: a causal transformer of transformers, on the device where it will run.
        weights: a name of `FORMATS`.

    Returns:
        Bytes of the weights that were replaced, minus those that replace them. A head that shares the embedding's
        weight replaces nothing.

    Raises:
        RGTGError: no such layer, or one that does not fit, by its name; the model is then unchanged.
    """
    chosen = FORMATS[weights]
    trunk: nn.Module = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if chosen.native else None
    inside = {layer: name for name, layer in trunk.named_modules() if _is_in_a_layer(name)}
    found = {
        name: inside.get(layer, name)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (layer in inside or layer is head)
    }
    for name, short in found.items():
        layer = model.get_submodule(name)
        kind = "" if type(layer) is nn.Linear else f"it is a {type(layer).__name__}"
        reason = kind or chosen.unsupported(layer.weight)
        if reason:
            raise RGTGError(f"weights={weights!r} does not serve {short}: {reason}; leave out weights")
    if not found:
        raise RGTGError(
            f"weights={weights!r}: {type(model).__name__} has no plain linear layers: leave out weights"
        )
    before = _bytes(model)
    for name in found:
        parent, _, leaf = name.rpartition(".")
        # One layer at a time: its weight is freed before the next one is rounded.
        setattr(model.get_submodule(parent), leaf, chosen.layer(model.get_submodule(name)))
    return before - _bytes(model)


def _is_in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _bytes(model: nn.Module) -> int:
    tensors = {id(x): x for x in chain(model.parameters(), model.buffers())}
    return sum(x.nbytes for x in tensors.values())
