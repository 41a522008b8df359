"""Fused C++ layers for Llama-like models on the CPU."""

from __future__ import annotations

from typing import Any


class NativeLayers:
    """Placeholder until the kernels land: supports nothing."""

    def __init__(self, model: Any):
        raise TypeError(str(self.supported(model)))

    @staticmethod
    def supported(model: Any) -> str | None:
        """Why a model cannot be run, None where it can."""
        return "this build has no fused layers"
