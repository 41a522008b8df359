"""One torch.library handle, on which every op is defined, and the choice of which implementation serves."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import RGTGError
from . import _extension, _triton

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
    """One Triton kernel and the signatures it is compiled for without a GPU.

    Attributes:
        name: the function in the op's `kernel.py`.
        signatures: by name of the argument, its type as Triton's ahead-of-time compiler writes it (`"*bf16:16"`
            a pointer aligned to 16 bytes, `"i64:16"` a multiple of 16, `"None"` nothing, a number a constant),
            and the options of the launch.
        archs: compute capabilities, such as 90, that launch these; empty for all.
    """

    name: str
    signatures: tuple[Mapping[str, str], ...]
    archs: tuple[int, ...] = ()


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

    @property
    def has_cpp(self) -> bool:
        """Whether a C++ kernel serves it on the CPU."""
        return bool(_ops[self.name].cpp_dtypes)


@dataclass(frozen=True)
class _Op:
    spec: OpSpec
    cpp_dtypes: frozenset[torch.dtype]
    triton_dtypes: frozenset[torch.dtype]
    triton_against: Callable[..., str]


_ops: dict[str, _Op] = {}


def specs() -> dict[str, OpSpec]:
    """Every registered op's spec, by name."""
    return {name: op.spec for name, op in _ops.items()}


def register(
    spec: OpSpec,
    schema: str,
    fake: Callable[..., Any],
    check: Callable[..., None],
    cpp: Callable[..., Any] | None,
    cpp_dtypes: frozenset[torch.dtype],
    triton_dtypes: frozenset[torch.dtype],
    triton_against: Callable[..., str] = lambda **_: "",
    sizes: Callable[..., Mapping[str, int]] = lambda *_: {},
) -> None:
    """Defines an op and its implementations on the handle.

    Args:
        spec: name, reference and the rest.
        schema: the op's schema without its name, e.g. `"(Tensor x) -> Tensor"`.
        fake: shapes and strides of the result, for tracing.
        check: raises `RGTGError` where the values of the arguments (not their shapes) cannot work. It reads
            tensors, so it runs on the CPU only, and for the C++ kernels only after they have refused.
        cpp: calls the C++ kernel, which checks everything and raises `ValueError`; None where there is none.
        cpp_dtypes: what the C++ kernel takes; other dtypes are served by the reference.
        triton_dtypes: what the Triton kernels take; other dtypes are served by the reference.
        triton_against: why they cannot serve the sizes, empty where they can; the reference serves those.
        sizes: those sizes, from the arguments.
    """
    _ops[spec.name] = _Op(spec, cpp_dtypes, triton_dtypes, triton_against)

    def cpu(first: torch.Tensor, *rest: Any) -> Any:
        backend = backend_of(spec.name, "cpu", first.dtype, **sizes(first, *rest))
        if backend == "cpp" and cpp is not None:
            try:
                return cpp(first, *rest)
            except ValueError as error:
                check(first, *rest)
                # What the public function would have refused.
                raise RGTGError(f"{spec.name}: {error}") from error
        check(first, *rest)
        return _launch(spec.name, first, *rest) if backend == "triton" else spec.reference(first, *rest)

    def cuda(first: torch.Tensor, *rest: Any) -> Any:
        backend = backend_of(spec.name, "cuda", first.dtype, **sizes(first, *rest))
        return _launch(spec.name, first, *rest) if backend == "triton" else spec.reference(first, *rest)

    LIBRARY.define(spec.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(spec.name, cpu, "CPU")
    LIBRARY.impl(spec.name, cuda, "CUDA")
    torch.library.register_fake(f"rgtg_fast::{spec.name}", fake, lib=LIBRARY)


def _launch(name: str, *arguments: Any) -> Any:
    """Launches the op's Triton kernels; their module is imported here because it imports Triton."""
    return importlib.import_module(f".{name}.kernel", __package__).launch(*arguments)


def _reason_against(op: _Op, backend: str, device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """Why `backend` cannot serve `op` there; empty where it can."""
    if backend == "cpp":
        if device != "cpu":
            return f"the C++ kernels serve tensors on the CPU, not on {device}"
        if not op.cpp_dtypes:
            return "it has no C++ kernel: the reference serves it on the CPU"
        if dtype not in op.cpp_dtypes:
            return f"its C++ kernel does not take {dtype}: use float32, bfloat16 or float16"
        return _extension.missing_reason()
    if backend == "triton":
        if device != "cuda" and not _triton.interpreted():
            return (
                f"the Triton kernels serve tensors on CUDA, not on {device} "
                "(there, only in Triton's interpreter: TRITON_INTERPRET=1)"
            )
        if dtype not in op.triton_dtypes:
            return f"its Triton kernel does not take {dtype}: use float32, bfloat16 or float16"
        return op.triton_against(**sizes) or _triton.missing_reason()
    return ""


def backend_of(
    name: str, device: str | torch.device, dtype: torch.dtype = torch.float32, **sizes: int
) -> str:
    """Says which implementation serves an op.

    On the CPU that is `"cpp"` for float32, bfloat16 and float16 (commit and partial_bt_loss: float64 too), and
    `"reference"` for score_and_sample and advance, for other dtypes and where the extension is missing. On CUDA it is
    `"triton"` for these three (commit: float64 too), and `"reference"` for others, where Triton is missing, and beyond
    the sizes that the kernels take: topk_logprobs with k > 256 (128 where V > 524288), tree_attention with D > 256.
    `use_backend` overrides the choice.

    Args:
        name: the op's name, e.g. `"tree_attention"`.
        device: a device or its name.
        dtype: dtype of the op's first argument.
        sizes: k and V of topk_logprobs, D of tree_attention; what is not given counts as small.

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
        reason = _reason_against(op, asked, kind, dtype, sizes)
        if reason:
            raise RGTGError(f"backend {asked!r} cannot serve {name}: {reason}")
        return asked
    if kind == "cpu" and dtype in op.cpp_dtypes and _extension.load() is not None:
        return "cpp"
    if kind == "cuda" and not _reason_against(op, "triton", kind, dtype, sizes):
        return "triton"
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
        raise RGTGError(f"backend 'cpp' is missing: {_extension.missing_reason()}; {_extension.remedy()}")
    if name == "triton" and _triton.missing_reason():
        raise RGTGError(f"backend 'triton' is missing: {_triton.missing_reason()}")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)
