"""LoRA adapters as the decoder serves them: beside the base weights, never merged into them."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

_FINGERPRINT_VALUES = 64


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model's trunk: sha256 over name, shape and first values of every parameter but heads and adapters.

    The values are rounded to bfloat16, so that a model has one fingerprint in float32 and in bfloat16.

    Args:
        model: a transformers model of any head; adapters that PEFT has put into its modules do not count.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    named = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.base_model.named_parameters()
        if "lora_" not in name
    }
    for name, parameter in sorted(named.items()):
        first = parameter.detach().flatten()[:_FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
