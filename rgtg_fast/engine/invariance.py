"""Steps in which a row's numbers have the same bits whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.quantized import quantization
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.ops import invariant_linear
from rgtg_fast.rewards.base import Reward


class InvariantProducts(TorchFunctionMode):
    """A context in which every linear layer, fused ones and heads too, is the op `invariant_linear`.

    Example:
        >>> layer, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
        >>> with InvariantProducts():
        ...     layer(x).shape
        torch.Size([4, 3])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _linear(*args, **kwargs) if func is functional.linear else func(*args, **kwargs)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = input.reshape(1, -1, input.shape[-1])
    return invariant_linear(rows, weight, bias).view(*input.shape[:-1], len(weight))


def products(invariant: bool) -> AbstractContextManager[Any]:
    """The context of a step: `InvariantProducts`, or none."""
    return InvariantProducts() if invariant else nullcontext()


def needs_products(models: Sequence[ModelRunner], reward: Reward) -> bool:
    """Whether steps of these models need `InvariantProducts`; the native engine's products are so by themselves.

    Args:
        models: the base model and the reward's own.
        reward: the reward.

    Raises:
        RGTGError: with these models a row's bits would depend on the batch.
    """
    if all(model.engine == "native" for model in models):
        return False
    for model in models:
        if (method := quantization(model.model)) is not None:
            raise _refused(f"{model.name} has quantized weights ({method})", "use the unquantized model")
        if model.engine not in ("native", "triton"):
            # Their norms are library sums, whose order depends on the number of rows on CUDA.
            reason = f"{model.name} runs by its own blocks (engine={model.engine!r})"
            raise _refused(reason, "use engine='triton', or pad_batch=True")
        if model.branches > 1:
            raise _refused(
                f"{model.name} runs an adapter in its forward", "use share_trunk=False, or pad_batch=True"
            )
    if not reward.on_device:
        raise _refused(f"{reward.name} computes by code of its own", "use a reward that stays on the device")
    return True


def _refused(reason: str, way_out: str) -> RGTGError:
    return RGTGError(f"batch_invariant=True and {reason}: {way_out}")
