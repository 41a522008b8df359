"""What identifies the weights of a model's trunk: adapters hold the fingerprint of the base that they belong to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel

_VALUES = 64
# The attribute of a trunk whose weights were rounded once they were loaded.
_LOADED = "_fingerprint_before_rounding"


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model's trunk by a hash of name, shape and first values of every parameter.

    Heads and adapters that PEFT has added do not count. Values are rounded to bfloat16, so that a model has the same
    fingerprint in float32 and in bfloat16. A model whose weights this library has rounded to 8 bits has that of the
    weights it was loaded with.

    Args:
        model: a transformers model with any head.

    Returns:
        The sha256 hash as 64 hexadecimal digits.
    """
    trunk: nn.Module = model.base_model
    loaded = vars(trunk).get(_LOADED)
    if loaded is not None:
        return loaded
    digest = hashlib.sha256()
    named = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in trunk.named_parameters()
        if "lora_" not in name
    }
    for name, parameter in sorted(named.items()):
        first = parameter.detach().flatten()[:_VALUES].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def keep_fingerprint(model: PreTrainedModel) -> None:
    """Gives a model whose weights will be rounded the fingerprint that it has now."""
    setattr(model.base_model, _LOADED, fingerprint(model))
