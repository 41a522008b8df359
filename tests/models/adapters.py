"""Writes random adapters in PEFT's format, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from rgtg_fast.models.adapter import decoder_layers, linear_shape
from rgtg_fast.models.fingerprint import fingerprint

MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write_adapter(
    folder: Path,
    base: PreTrainedModel,
    fork: int = 0,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.5,
    names: tuple[str, ...] = MATRICES,
    head: int | None = 1,
    **config: Any,
) -> Path:
    """A random adapter of `base` from layer `fork` on.

    Args:
        folder: where to write it.
        base: its base model.
        fork: the first block that it changes.
        rank: of the updates.
        seed: of the random values.
        size: of the updates' entries relative to the weights'.
        names: of the linear layers that it changes in each block.
        head: outputs of its head, None for no head.
        config: further settings of PEFT's configuration.
    """
    torch.manual_seed(seed)
    prefix = "base_model.model." + (f"{base.base_model_prefix}." if base.base_model is not base else "")
    inside = {id(module): name for name, module in base.base_model.named_modules()}
    tensors = {}
    for number, layer in enumerate(decoder_layers(base)):
        for name in names if number >= fork else ():
            module = layer.get_submodule(name)
            outer, inner = linear_shape(module) or (0, 0)
            spread = size * float(module.weight.detach().float().std()) / 2
            where = f"{prefix}{inside[id(module)]}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(rank, inner) / rank**0.5
            tensors[f"{where}.lora_B.weight"] = torch.randn(outer, rank) * spread
    if head is not None:
        width = base.config.get_text_config().hidden_size
        tensors["base_model.model.score.weight"] = torch.randn(head, width) / width**0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    own = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base.config._name_or_path,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-1] for name in names}),
        "modules_to_save": ["score"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(own))
    (folder / "rgtg_fast.json").write_text(json.dumps({"base_fingerprint": fingerprint(base)}))
    return folder
