"""Models whose weights are spread over the processes of a run, by transformers' tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.int8 import Int8Linear
from rgtg_fast.processes import Place


def check_plan(plan: str | None, source: object, engine: str) -> None:
    """Checks what a tensor-parallel plan needs, before anything is loaded.

    Args:
        plan: "auto", or None for a model in one process.
        source: the base model, as the user named it.
        engine: the engine that the user asked for.

    Raises:
        RGTGError: another plan, a model that is loaded already, another engine, or one process alone.
    """
    if plan is None:
        return
    if plan != "auto":
        raise RGTGError(
            f"tp_plan={shown(plan)} is unknown: use 'auto', the plan of transformers for the model"
        )
    if isinstance(source, (tuple, list)):
        raise RGTGError("tp_plan='auto' and a model that is loaded already: pass its path or hub id")
    if engine not in ("auto", "transformers"):
        raise RGTGError(
            f"tp_plan='auto' and engine={engine!r}: a model in several processes runs by transformers' own blocks, "
            "leave out engine"
        )
    if Place.from_environment().count == 1:
        raise RGTGError(
            "tp_plan='auto' in a single process: start the program with torchrun --nproc-per-node N, or leave it out"
        )


def loader_arguments(plan: str | None, config: Any, title: str) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a tensor-parallel plan.

    Args:
        plan: as in `check_plan`.
        config: the model's configuration.
        title: names the model in messages.

    Raises:
        RGTGError: a model that cannot be spread over the processes.
    """
    if plan is None:
        return {}
    count, text = Place.from_environment().count, config.get_text_config()
    cannot = f"{title} cannot be spread over {count} processes (tp_plan='auto')"
    if getattr(config, "quantization_config", None) is not None:
        raise RGTGError(f"{cannot}: its weights are quantized; name an unquantized model")
    if not getattr(text, "base_model_tp_plan", None):
        raise RGTGError(f"{cannot}: transformers has no tensor-parallel plan for {config.model_type}")
    heads = text.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, name, None) or heads
        if number % count:
            raise RGTGError(
                f"{cannot}: {name}={number} is not a multiple of {count}; use as many that divide it"
            )
    from transformers.distributed import DistributedConfig

    try:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}  # pyright: ignore[reportCallIssue]
    except TypeError:  # transformers 5.17
        return {"tp_plan": "auto"}


def spread_over(model: Any) -> int:
    """The number of processes that hold a model together, 1 for a model in one process."""
    return int(getattr(model, "_tp_size", None) or 1)


def whole_weight(layer: nn.Module) -> torch.Tensor:
    """A layer's weight, put together from all processes where it is spread over them, and from integers and scales."""
    if isinstance(layer, Int8Linear):
        return layer.dequantized()
    weight: Any = layer.weight
    if not hasattr(weight, "full_tensor"):
        return weight.detach()
    # A view of it cannot be made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        return weight.full_tensor()
