"""Registers the ops with torch.library and chooses the implementation that runs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RGTGError
from . import _extension, _triton

LIBRARY = torch.library.Library("rgtg_fast", "DEF")

BACKENDS = ("reference", "cpp", "triton")

# The backend named by `use_backend`; None: the fastest available.
_requested: ContextVar[str | None] = ContextVar("rgtg_fast_backend", default=None)


@dataclass(frozen=True)
class Op:
    """One op and its implementations; the fields are the arguments of `register`."""

    name: str
    reference: Callable[..., Any]
    outputs: Callable[..., Any]
    writes: tuple[str, ...]
    cpp_dtypes: frozenset[torch.dtype]
    triton_dtypes: frozenset[torch.dtype]
    sizes: Callable[..., Mapping[str, int]]
    triton_limit: Callable[..., str]

    def reason_against(
        self, backend: str, device: str, dtype: torch.dtype, sizes: Callable[[], Mapping[str, int]]
    ) -> str:
        """Why `backend` cannot run this op on such tensors; empty where it can."""
        if backend == "cpp":
            if device != "cpu":
                return f"the C++ kernels serve tensors on the CPU, not on {device}"
            if not self.cpp_dtypes:
                return "it has no C++ kernel: the reference is used on the CPU"
            if dtype not in self.cpp_dtypes:
                return f"its C++ kernel does not take {dtype}: use float32, bfloat16 or float16"
            return _extension.missing_reason()
        if backend == "triton":
            if device != "cuda" and not _triton.interpreted():
                return (
                    f"the Triton kernels serve tensors on CUDA, not on {device} "
                    "(there, only in Triton's interpreter: TRITON_INTERPRET=1)"
                )
            if dtype not in self.triton_dtypes:
                return f"its Triton kernel does not take {dtype}: use float32, bfloat16 or float16"
            return self.triton_limit(**sizes()) or _triton.missing_reason()
        return ""

    def backend(self, device: str, dtype: torch.dtype, sizes: Callable[[], Mapping[str, int]]) -> str:
        """The backend that runs this op: the one requested, else the fastest that can."""
        requested = _requested.get()
        if requested is not None:
            reason = self.reason_against(requested, device, dtype, sizes)
            if reason:
                raise RGTGError(f"backend {requested!r} cannot serve {self.name}: {reason}")
            return requested
        if device == "cpu" and dtype in self.cpp_dtypes and _extension.load() is not None:
            return "cpp"
        if device == "cuda" and not self.reason_against("triton", device, dtype, sizes):
            return "triton"
        return "reference"

    def launch(self, *arguments: Any) -> Any:
        """Runs the Triton kernels. Imports their module here, because it imports Triton."""
        return importlib.import_module(f".{self.name}.kernel", __package__).launch(*arguments)


# By name, in the order of registration.
OPS: dict[str, Op] = {}


def register(
    reference: Callable[..., Any],
    outputs: Callable[..., Any],
    *,
    name: str,
    check: Callable[..., None] | None = None,
    writes: tuple[str, ...] = (),
    cpp_dtypes: frozenset[torch.dtype] = frozenset(),
    cpp_arguments: Callable[..., tuple[Any, ...]] | None = None,
    triton_dtypes: frozenset[torch.dtype] = frozenset(),
    triton_limit: Callable[..., str] = lambda **_: "",
    sizes: Callable[..., Mapping[str, int]] = lambda *_: {},
) -> None:
    """Registers an op: `torch.ops.rgtg_fast.<name>`.

    The schema is inferred from the reference, whose parameters have annotations and no defaults: torch leaves trailing
    arguments out of a call where they equal the schema's defaults.

    Args:
        reference: the specification in plain PyTorch.
        outputs: allocates the results, from the same arguments; also what tracing sees of the op.
        name: the op's name, which is its folder's.
        check: raises `RGTGError` where values of the arguments (not their shapes) are invalid. Its parameters are the
            names of the arguments that it reads. It runs on the CPU only, because on a GPU reading them would
            synchronize; before the reference and the interpreted Triton kernels, and after the C++ kernel has refused.
        writes: names of the arguments that the op writes in place.
        cpp_dtypes: dtypes that the C++ kernel takes (see `_extension.run`); none: there is no C++ kernel.
        cpp_arguments: converts the arguments for the C++ kernel, where it takes others than the op.
        triton_dtypes: dtypes that the Triton kernels take.
        triton_limit: says, from `sizes`, why the Triton kernels cannot run; empty where they can.
        sizes: the sizes that limit the Triton kernels, from the arguments.
    """
    op = Op(name, reference, outputs, writes, cpp_dtypes, triton_dtypes, sizes, triton_limit)
    OPS[name] = op
    parameters = list(inspect.signature(reference).parameters)
    checked = [parameters.index(read) for read in inspect.signature(check).parameters] if check else []
    written = frozenset(parameters.index(argument) for argument in writes)

    def check_values(arguments: tuple[Any, ...]) -> None:
        if check is not None:
            check(*(arguments[i] for i in checked))

    def cpu(*arguments: Any) -> Any:
        backend = op.backend("cpu", arguments[0].dtype, lambda: sizes(*arguments))
        if backend == "cpp":
            try:
                results = outputs(*arguments)
                inputs = arguments if cpp_arguments is None else cpp_arguments(*arguments)
                _extension.run(name, inputs, results, written)
                return results
            except ValueError as error:
                check_values(arguments)
                # The public function would have refused these arguments; this call bypassed it.
                raise RGTGError(f"{name}: {error}") from error
        check_values(arguments)
        return op.launch(*arguments) if backend == "triton" else reference(*arguments)

    def cuda(*arguments: Any) -> Any:
        backend = op.backend("cuda", arguments[0].dtype, lambda: sizes(*arguments))
        return op.launch(*arguments) if backend == "triton" else reference(*arguments)

    schema = torch.library.infer_schema(reference, mutates_args=writes)
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"rgtg_fast::{name}", outputs, lib=LIBRARY)


def backend_of(
    name: str, device: str | torch.device, dtype: torch.dtype = torch.float32, **sizes: int
) -> str:
    """Says which implementation of an op runs.

    On the CPU that is `"cpp"` for float32, bfloat16 and float16 (commit and partial_bt_loss: float64 too), and
    `"reference"` for the ops without a C++ kernel (README.md), for other dtypes and where the extension is missing. On
    CUDA it is `"triton"` for these three dtypes (commit: float64 too), and `"reference"` for others, where Triton is
    missing, and beyond the sizes that the kernels take: topk_logprobs with k > 256 (128 where V > 524288),
    tree_attention with D > 256, add_rms_norm with E > 16384, rope_and_store with D > 512. `use_backend` overrides the
    choice.

    Args:
        name: the op's name, e.g. `"tree_attention"`.
        device: a device or its name.
        dtype: dtype of the op's first argument.
        sizes: k and V of topk_logprobs, D of tree_attention and rope_and_store, E of add_rms_norm; a size that is not
            given counts as small.

    Returns:
        `"reference"`, `"cpp"` or `"triton"`.

    Raises:
        RGTGError: there is no such op, or `use_backend` names a backend that cannot serve it.

    Example:
        >>> from rgtg_fast.ops import backend_of
        >>> backend_of("tree_attention", "cpu", torch.float64)
        'reference'
    """
    op = OPS.get(name)
    if op is None:
        raise RGTGError(f"there is no op {name!r}: use one of {', '.join(sorted(OPS))}")
    kind = device if isinstance(device, str) else device.type
    return op.backend(kind.partition(":")[0], dtype, lambda: sizes)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes one implementation run every op within a `with` block.

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
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)
