"""What executes a model's blocks: the model's own modules, one C++ call, or our ops between its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.attention import use_prefix_attention
from rgtg_fast.models.cpp_layers import NativeLayers
from rgtg_fast.models.fused_projections import refresh_products
from rgtg_fast.models.int8 import INT8, Int8Linear
from rgtg_fast.models.kv_cache import PrefixCache, cache_keyword
from rgtg_fast.models.lora import LowRankRows
from rgtg_fast.models.native_families import NATIVE_FAMILIES
from rgtg_fast.models.quantized import quantization
from rgtg_fast.models.split_cache import SplitCache, WindowCache
from rgtg_fast.models.tensor_parallel import spread_over
from rgtg_fast.models.triton_layers import TritonLayers
from rgtg_fast.models.verification import OUTPUTS
from rgtg_fast.ops import _triton

ENGINES = ("auto", "native", "triton", "transformers")


class Layers(Protocol):
    """Executes a model's blocks for the forward that its cache has begun.

    Attributes:
        final_norm: the norm after the last block, None where it cannot be left out of a forward.
    """

    final_norm: FinalNorm | None

    def compile(self, options: Mapping[str, Any] | None) -> None:
        """Steps run compiled code from now on; each shape is compiled at its first use, with these options."""
        ...

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PrefixCache | SplitCache,
        normed: bool = True,
    ) -> torch.Tensor:
        """States [B · branches, S, E] of tokens [B, S] at positions [B, S].

        `normed` says whether the final norm is part of the forward: False only where `final_norm` is known.
        """
        ...

    def refresh(self) -> None:
        """Takes over changes of the model's weights."""
        ...

    def adapt(self, adapters: Sequence[Adapter], rows: LowRankRows) -> None:
        """Forwards have a branch for each adapter from now on; `rows` does the same in the model's own modules."""
        ...

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        """Logits [B, V] of hidden states [B, E]."""
        ...


class TransformersLayers:
    """The model's own blocks, untouched, with our attention function."""

    def __init__(self, model: PreTrainedModel):
        use_prefix_attention(model)
        self.trunk = model.base_model
        self.final_norm = FinalNorm.of(self.trunk)
        self._keyword = cache_keyword(type(self.trunk))
        self._rows: LowRankRows | None = None
        self._compiled: Callable[..., torch.Tensor] | None = None

    def refresh(self) -> None:
        refresh_products(self.trunk)

    def adapt(self, adapters: Sequence[Adapter], rows: LowRankRows) -> None:
        self._rows = rows

    def compile(self, options: Mapping[str, Any] | None) -> None:
        try:
            # A step has few sizes, which are worth kernels of their own; a cache has any (`PrefixCache.reserve`).
            self._compiled = torch.compile(_run, fullgraph=True, dynamic=False, options=dict(options or {}))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RGTGError(f"torch.compile refuses the options {dict(options or {})}: {reason}") from error
        # The compiler fuses the norm with its neighbors itself.
        self.final_norm = None

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PrefixCache | SplitCache,
        normed: bool = True,
    ) -> torch.Tensor:
        # Prompts have any length: compiling a prefill would cost more than it saves.
        if self._compiled is None or cache.causal:
            norm = None if normed else self.final_norm
            with nullcontext() if norm is None else norm.skipped():
                return _run(self.trunk, self._rows, ids, positions, cache, self._keyword)
        # The compiler's own limit for one function is 8 sizes, over all models in the process.
        config = torch._dynamo.config
        with config.patch(recompile_limit=config.accumulated_recompile_limit):
            return self._compiled(self.trunk, self._rows, ids, positions, cache, self._keyword)

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        return head(hidden.to(head.weight.dtype))


def _run(
    trunk: nn.Module,
    rows: LowRankRows | None,
    ids: torch.Tensor,
    positions: torch.Tensor,
    cache: PrefixCache | SplitCache,
    keyword: str,
) -> torch.Tensor:
    with nullcontext() if rows is None else rows.interleaved(len(ids)):
        out = trunk(
            input_ids=ids,
            position_ids=positions,
            use_cache=True,
            prefix_cache=cache,
            **{keyword: cache},
            **OUTPUTS,
        )
    return out.last_hidden_state


class FusedLayers:
    """The same blocks fused into one C++ call a pass (CPU, Llama-like families)."""

    final_norm: FinalNorm | None = None

    def __init__(self, model: PreTrainedModel):
        self.native = NativeLayers(model.base_model)

    def compile(self, options: Mapping[str, Any] | None) -> None:
        raise RGTGError("compile=True and engine='native', which is compiled: use engine='transformers'")

    def refresh(self) -> None:
        self.native.refresh()

    def adapt(self, adapters: Sequence[Adapter], rows: LowRankRows) -> None:
        self.native.adapt(adapters)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PrefixCache | SplitCache,
        normed: bool = True,
    ) -> torch.Tensor:
        x, spread = ids, 1
        for first, last, branches, part in cache.parts:
            if branches > spread:
                spread = branches
                x, positions = x.repeat_interleave(branches, 0), positions.repeat_interleave(branches, 0)
            if isinstance(part, WindowCache):
                for window in self.native.windows[first:last] or [None]:
                    part.check(window)
            keys, values, lengths = part.active
            x = self.native.forward(
                x,
                positions,
                keys,
                values,
                lengths,
                part.k_new,
                part.v_new,
                causal=part.causal,
                ancestors=part.ancestors,
                slots=part.slots_of_rows,
                first=first,
                last=last,
                branches=branches,
            )
        return x

    def logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        scale = head.scale if isinstance(head, Int8Linear) else None
        return self.native.logits(hidden, head.weight, head.bias, scale)


def choose_layers(model: PreTrainedModel, engine: str) -> tuple[str, Layers]:
    """The engine that executes a model, and its layers.

    `"auto"` is the native engine on a CPU and the Triton engine on a GPU where they can execute the model, else the
    model's own blocks.

    Raises:
        RGTGError: an unknown engine, or `"native"` or `"triton"` for a model that it cannot execute (with the reason).
    """
    if not isinstance(engine, str) or engine not in ENGINES:
        raise RGTGError(f"engine={shown(engine)} is unknown: use one of {', '.join(map(repr, ENGINES))}")
    if spread_over(model) > 1:
        if engine not in ("auto", "transformers"):
            raise RGTGError(
                f"engine={engine!r} cannot run {type(model).__name__}: its weights are spread over "
                f"{spread_over(model)} processes; use engine='auto'"
            )
        return "transformers", TransformersLayers(model)
    rounded = quantization(model) == INT8
    if rounded and engine not in ("auto", "native"):
        raise RGTGError(
            f"engine={engine!r} does not run weights='int8', which {type(model).__name__} has: use engine='auto'"
        )
    if engine in ("auto", "native"):
        reason = native_refusal(model)
        if reason is None:
            return "native", FusedLayers(model)
        if rounded:
            raise RGTGError(
                f"weights='int8' needs the native engine, which cannot run {type(model).__name__}: {reason}; load the "
                "model again without weights"
            )
        if engine == "native":
            raise RGTGError(f"engine='native' cannot run {type(model).__name__}: {reason}; use engine='auto'")
    on_gpu = model.device.type == "cuda" and not _triton.missing_reason()
    if engine == "triton" or (engine == "auto" and on_gpu and TritonLayers.unsupported(model) is None):
        return "triton", TritonLayers(model, TransformersLayers(model))
    return "transformers", TransformersLayers(model)


def native_refusal(model: PreTrainedModel) -> str | None:
    """Why the native engine cannot run a model, in words; None where it can."""
    method = quantization(model)
    if method not in (None, INT8):
        return f"its weights are quantized ({method})"
    return NativeLayers.supported(model.base_model)


@dataclass(frozen=True)
class FinalNorm:
    """y = x / √(mean x² + eps) · (weight + offset).

    Attributes:
        module: the model's own.
        eps: as in `ops.score_and_sample`.
        offset: as in `ops.score_and_sample`.
    """

    module: nn.Module
    eps: float
    offset: float

    @classmethod
    def of(cls, trunk: nn.Module) -> FinalNorm | None:
        """The final norm of a model without its head; None for families whose norm is another, or not known."""
        family = NATIVE_FAMILIES.get(type(trunk).__name__)
        if family is None or not type(trunk).__module__.startswith(f"transformers.models.{family.package}."):
            return None
        decoder: Any = trunk
        norm = decoder.norm
        # A forward that was replaced, or that has hooks, must run.
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
        """A context in which forwards return the states before the norm."""
        self.module.forward = _unchanged
        try:
            yield
        finally:
            del self.module.forward


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
