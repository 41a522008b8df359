"""The RMS norm after a model's last block, where it may be left out of the forward and joined with what follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rgtg_fast.models.cpp_layers import FAMILIES


@dataclass(frozen=True)
class FinalNorm:
    """y = x / √(mean x² + eps) · (weight + offset).

    Attributes:
        module: the model's own. eps, offset: as `ops.score_and_sample` takes them.
    """

    module: nn.Module
    eps: float
    offset: float

    @classmethod
    def of(cls, trunk: nn.Module) -> FinalNorm | None:
        """The final norm of a model without its head; None for families whose norm is another, or not known."""
        family = FAMILIES.get(type(trunk).__name__)
        if family is None or not type(trunk).__module__.startswith(f"transformers.models.{family.package}."):
            return None
        decoder: Any = trunk
        norm = decoder.norm
        # What somebody has put in the module's place, or hung on it, is not to be passed over.
        hooked = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
        if hooked or not type(norm).__module__.startswith(f"transformers.models.{family.package}."):
            return None
        return cls(decoder.norm, float(decoder.config.rms_norm_eps), family.norm_offset)

    @property
    def weight(self) -> torch.Tensor:
        """[E]."""
        weight: Any = self.module.weight
        return weight.detach()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Forwards within give the states before the norm."""
        self.module.forward = _unchanged
        try:
            yield
        finally:
            del self.module.forward


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
