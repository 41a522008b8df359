"""One torch.library handle, on which every op is defined, and the choice of which implementation serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import RGTGError
from . import _extension

LIBRARY = torch.library.Library("rgtg_fast", "DEF")

BACKENDS = ("reference", "cpp", "triton")

# What `use_backend` asks for; None: the fastest that there is.
_asked: ContextVar[str | None] = ContextVar("rgtg_fast_backend", default=None)


class Tolerance(NamedTuple):
    """How far a backend may stand from the float64 reference.

    Attributes:
        rms: root mean square of the difference over that of the expected values.
        max: largest absolute difference over the largest absolute expected value.
    """

    rms: float
    max: float


@dataclass(frozen=True)
class KernelSpec:
    """One Triton kernel and the signatures it is compiled for without a GPU."""

    name: str
    signatures: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class OpSpec:
    """What tests and benchmarks need to know about an op.

    Attributes:
        name: its name under `torch.ops.rgtg_fast` and in `rgtg_fast.ops`.
        reference: the specification in plain PyTorch, with the op's own signature.
        make_inputs: `make_inputs(shape, dtype, device="cpu", seed=0)` gives the arguments as a dict.
        shapes: the shapes that tests loop over.
        tolerances: by dtype of the inputs.
        kernels: the Triton kernels behind it.
    """

    name: str
    reference: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    shapes: tuple[Mapping[str, Any], ...]
    tolerances: Mapping[torch.dtype, Tolerance]
    kernels: tuple[KernelSpec, ...] = ()


@dataclass(frozen=True)
class _Op:
    spec: OpSpec
    cpp_dtypes: frozenset[torch.dtype]


_ops: dict[str, _Op] = {}


def specs() -> dict[str, OpSpec]:
    """Every registered op's spec, by name."""
    return {name: op.spec for name, op in _ops.items()}


def register(
    spec: OpSpec,
    schema: str,
    fake: Callable[..., Any],
    check: Callable[..., None],
    cpp: Callable[..., Any],
    cpp_dtypes: frozenset[torch.dtype],
) -> None:
    """Defines an op and its implementations on the handle.

    Args:
        spec: name, reference and the rest.
        schema: the op's schema without its name, e.g. `"(Tensor x) -> Tensor"`.
        fake: shapes and strides of the result, for tracing.
        check: raises `RGTGError` where the values of the arguments (not their shapes) cannot work. It reads
            tensors, so it runs on the CPU only; the C++ kernels check for themselves.
        cpp: calls the C++ kernel.
        cpp_dtypes: what the C++ kernel takes; other dtypes are served by the reference.
    """
    _ops[spec.name] = _Op(spec, cpp_dtypes)

    def cpu(first: torch.Tensor, *rest: Any) -> Any:
        if backend_of(spec.name, "cpu", first.dtype) == "cpp":
            return cpp(first, *rest)
        check(first, *rest)
        return spec.reference(first, *rest)

    def cuda(first: torch.Tensor, *rest: Any) -> Any:
        backend_of(spec.name, "cuda", first.dtype)
        return spec.reference(first, *rest)

    LIBRARY.define(spec.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(spec.name, cpu, "CPU")
    LIBRARY.impl(spec.name, cuda, "CUDA")
    torch.library.register_fake(f"rgtg_fast::{spec.name}", fake, lib=LIBRARY)


def _reason_against(op: _Op, backend: str, device: str, dtype: torch.dtype) -> str:
    """Why `backend` cannot serve `op` there; empty where it can."""
    if backend == "cpp":
        if device != "cpu":
            return f"the C++ kernels serve tensors on the CPU, not on {device}"
        if dtype not in op.cpp_dtypes:
            return f"its C++ kernel does not take {dtype}: use float32, bfloat16 or float16"
        return _extension.missing_reason()
    if backend == "triton":
        return "this release has no Triton kernels"
    return ""


def backend_of(name: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Says which implementation serves an op.

    On the CPU that is `"cpp"` for float32, bfloat16 and float16, and `"reference"` for other dtypes or where
    the extension is missing; on CUDA it is `"reference"`. `use_backend` overrides the choice.

    Args:
        name: the op's name, e.g. `"tree_attention"`.
        device: a device or its name.
        dtype: dtype of the op's first argument.

    Returns:
        `"reference"`, `"cpp"` or `"triton"`.

    Raises:
        RGTGError: there is no such op, or `use_backend` asked for a backend that cannot serve it.

    Example:
        >>> from rgtg_fast.ops import backend_of
        >>> backend_of("tree_attention", "cpu", torch.float64)
        'reference'
    """
    op = _ops.get(name)
    if op is None:
        raise RGTGError(f"there is no op {name!r}: use one of {', '.join(sorted(_ops))}")
    kind = device if isinstance(device, str) else device.type
    kind = kind.partition(":")[0]
    asked = _asked.get()
    if asked is not None:
        reason = _reason_against(op, asked, kind, dtype)
        if reason:
            raise RGTGError(f"backend {asked!r} cannot serve {name}: {reason}")
        return asked
    if kind == "cpu" and dtype in op.cpp_dtypes and _extension.load() is not None:
        return "cpp"
    return "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes one implementation serve every op within a `with` block, and refuses what it cannot serve.

    Args:
        name: `"reference"`, `"cpp"` or `"triton"`.

    Raises:
        RGTGError: the name is unknown, or the backend is missing (with the reason); within the block, an op
            is called with a device or dtype that the backend does not take.

    Example:
        >>> from rgtg_fast.ops import topk_logprobs, use_backend
        >>> with use_backend("reference"):
        ...     logprobs, tokens, entropy = topk_logprobs(torch.zeros(1, 4), k=2)
        >>> tokens
        tensor([[0, 1]])
    """
    if name not in BACKENDS:
        raise RGTGError(f"there is no backend {name!r}: use one of {', '.join(BACKENDS)}")
    if name == "cpp" and _extension.missing_reason():
        raise RGTGError(f"backend 'cpp' is missing: {_extension.missing_reason()}; {_extension.REMEDY}")
    if name == "triton":
        raise RGTGError(
            "backend 'triton' is missing: this release has no Triton kernels; use 'reference' on CUDA"
        )
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)
