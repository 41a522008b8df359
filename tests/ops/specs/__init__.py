"""What tests and benchmarks need to know about each op: inputs, shapes, tolerances and compiled kernels.

One file per op; `SPECS` has them by name. Triton is imported only by `OpSpec.kernels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rgtg_fast import ops
from rgtg_fast.ops._registry import OPS

# How Triton's compiler writes the dtypes.
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
# Arguments that the references keep in float32 when the others are float64.
FLOAT32 = ("beta", "temperature", "guidance")
# Weights that belong to no row.
SHARED = ("norm", "head", "bias", "eos", "sinks", "weight", "q_norm", "k_norm")
# What has a row for every slot of the cache.
CACHED = ("k_cache", "v_cache", "lengths")


class Tolerance(NamedTuple):
    """How far a backend may be from the float64 reference.

    Attributes:
        rms: root mean square of the difference, divided by that of the expected values.
        max: largest absolute difference, divided by the largest absolute expected value.
    """

    rms: float
    max: float


# Where numbers are copied, not computed.
EXACT = dict.fromkeys((torch.float64, torch.float32, torch.bfloat16, torch.float16), Tolerance(0.0, 0.0))


@dataclass(frozen=True)
class KernelSpec:
    """One Triton kernel and the signatures for which it is compiled without a GPU.

    Attributes:
        name: the function in the op's `kernel.py`.
        signatures: by argument, its type as Triton's ahead-of-time compiler writes it (`"*bf16:16"` a pointer aligned
            to 16 bytes, `"i64:16"` a multiple of 16, `"None"` nothing, a number a constant), and the launch options.
        archs: compute capabilities, such as 90, that launch these; empty for all.
    """

    name: str
    signatures: tuple[Mapping[str, str], ...]
    archs: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpSpec:
    """How an op is tested.

    Attributes:
        name: its name in `rgtg_fast.ops`.
        make_inputs: `make_inputs(shape, dtype, device="cpu", seed=0)` returns the arguments as a dict.
        shapes: the shapes that tests loop over.
        tolerances: by dtype of the inputs.
        compiled: `compiled(kernel)` returns the signatures of the kernels in the module `kernel`.
    """

    name: str
    make_inputs: Callable[..., dict[str, Any]]
    shapes: tuple[Mapping[str, Any], ...]
    tolerances: Mapping[torch.dtype, Tolerance]
    compiled: Callable[[Any], tuple[KernelSpec, ...]]

    @property
    def reference(self) -> Callable[..., Any]:
        """The specification in plain PyTorch."""
        return OPS[self.name].reference

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the arguments that it writes in place."""
        return OPS[self.name].writes

    @property
    def has_cpp(self) -> bool:
        """Whether a C++ kernel serves it on the CPU."""
        return bool(OPS[self.name].cpp_dtypes)

    @property
    def kernel(self) -> Any:
        """The module of its Triton kernels; imports Triton."""
        return importlib.import_module(f"rgtg_fast.ops.{self.name}.kernel")

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """Its Triton kernels and their signatures; imports Triton."""
        return self.compiled(self.kernel)


def signature(arguments: Mapping[str, str], configuration: Mapping[str, object]) -> dict[str, str]:
    """A compile signature: the types of the arguments, then the values of constants and options."""
    return {**arguments, **{name: str(value) for name, value in configuration.items()}}


def slots_of(shape: Mapping[str, Any], device: str | torch.device) -> torch.Tensor | None:
    """The slots of B rows among `shape["slots"]`, in no order; None where the shape has none."""
    if not shape.get("slots"):
        return None
    order = torch.randperm(shape["slots"], generator=torch.Generator().manual_seed(5))
    return order[: shape["B"]].to(device)


def spread(x: torch.Tensor, slots: torch.Tensor, count: int, other: float, dim: int = 0) -> torch.Tensor:
    """The rows of x in their slots of `count`; the other slots are filled with `other`."""
    size = list(x.shape)
    size[dim] = count
    return torch.full(size, other, dtype=x.dtype, device=x.device).index_copy_(dim, slots, x)


def call(name: str, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The op's results, then the arguments that it has written in place."""
    result = getattr(ops, name)(**arguments)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    return (*results, *(arguments[argument] for argument in OPS[name].writes))


def row_of(arguments: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The arguments of one row of the batch; a cache with slots stays whole."""
    whole = (*SHARED, *CACHED) if arguments.get("slots") is not None else SHARED
    return {
        name: x[row : row + 1] if isinstance(x, torch.Tensor) and name not in whole else x
        for name, x in arguments.items()
    }


def in_double(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the arguments for the float64 reference."""
    return {
        name: (x.double() if x.is_floating_point() and name not in FLOAT32 else x).clone()
        if isinstance(x, torch.Tensor)
        else x
        for name, x in arguments.items()
    }


SPECS: dict[str, OpSpec] = {name: importlib.import_module(f"{__name__}.{name}").SPEC for name in OPS}
