"""Recognizes models whose weights are quantized: these are never cast, merged, fused or trained."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from rgtg_fast.errors import RGTGError
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
    method = getattr(model, "quantization_method", None)
    if getattr(model, "hf_quantizer", None) is not None and method is not None:
        return str(getattr(method, "value", method))
    return (
        str(odd.dtype).removeprefix("torch.") if type(odd.data) is torch.Tensor else type(odd.data).__name__
    )


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is an ordinary tensor of floating-point numbers."""
    return type(weight.data) is torch.Tensor and weight.dtype in _FLOATS


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
