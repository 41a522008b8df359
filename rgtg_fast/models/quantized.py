"""Quantized weights: rounds them, and recognizes models that have them, never to be cast, merged, fused or trained."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.int4 import INT4, Int4Linear, quantize_layers
from rgtg_fast.models.support import title

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Integers of 64 bits are positions, and booleans masks.
_NOT_WEIGHTS = (torch.int64, torch.bool)


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
    if any(isinstance(module, Int4Linear) for module in model.modules()):
        return INT4
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
        weights: "int4", or None for the weights as they are.
        name: the argument's name, for the message.

    Raises:
        RGTGError: anything else.
    """
    if weights is not None and weights != INT4:
        raise RGTGError(
            f"{name}={shown(weights)} is unknown: use {INT4!r}, or None for the weights as they are"
        )


def round_weights(model: Any, weights: str | None) -> None:
    """Rounds the weights of a model's decoder layers in place.

    Args:
        model: a transformers model that nobody else has, on the device and in the dtype in which it will run.
        weights: as in `check_weights`.

    Raises:
        RGTGError: weights that are quantized already, or that do not fit, by their name.
    """
    if weights is None:
        return
    refuse_quantized(model, f"be rounded to {weights} again")
    quantize_layers(model)
