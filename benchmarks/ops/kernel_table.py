"""Compiles every Triton kernel, without a GPU, and writes registers and shared memory to docs/kernels.md.

    python -m benchmarks.ops.kernel_table            # writes docs/kernels.md
    python -m benchmarks.ops.kernel_table --print    # to the screen

It needs Triton and no GPU. The table depends on the version of Triton, which it names.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ops.specs import SPECS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ programming guide, technical
# specifications per compute capability).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Launch options, which are not arguments of the kernel.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Arguments that are compiled away where they are None.
OPTIONAL = ("p_guidance", "p_normalizer", "window", "softcap", "p_sinks", "p_slots", "p_residual", "p_q_norm")
# Instructions of the tensor cores in PTX, by generation.
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass(frozen=True)
class Compiled:
    """Resources of one kernel with one signature on one architecture."""

    op: str
    kernel: str
    signature: Mapping[str, str]
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_cores: tuple[str, ...]
    asynchronous: bool

    @property
    def label(self) -> str:
        """Dtype and constants, which identify the signature."""
        return label(self.signature)


def label(signature: Mapping[str, str]) -> str:
    """Dtype of the first pointer and the constants, in one line."""
    pointer = next(t for t in signature.values() if t.startswith("*")).strip("*").partition(":")[0]
    constants = [
        f"{name}={t}" for name, t in signature.items() if _constant(name, t) and name != "enable_fp_fusion"
    ]
    optional = [name.removeprefix("p_") for name, t in signature.items() if name in OPTIONAL and t != "None"]
    return " ".join([pointer, *optional, *constants])


def _constant(name: str, kind: str) -> bool:
    return name in OPTIONS or kind.lstrip("-").isdigit()


def build(op: str, kernel: str, signature: Mapping[str, str], arch: int) -> Any:
    """Compiles one kernel to machine code, without a driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"rgtg_fast.ops.{op}.kernel"), kernel)
    types, constants, hints = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        kind, _, divisor = signature[name].partition(":")
        if _constant(name, kind) or kind == "None":
            types[name], constants[name] = "constexpr", None if kind == "None" else int(kind)
        else:
            types[name] = kind
            if divisor:
                hints[(i,)] = [["tt.divisibility", int(divisor)]]
    options = {
        name: {"True": True, "False": False}.get(signature[name]) for name in OPTIONS if name in signature
    }
    options = {name: int(signature[name]) if x is None else x for name, x in options.items()}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_one(op: str, kernel: str, signature: Mapping[str, str], arch: int) -> Compiled:
    """Compiles one kernel and reads its resources from the machine code."""
    done = build(op, kernel, signature, arch)
    registers, stack = _resources(done.asm["cubin"])
    found = tuple(sorted({m.group(1) for m in TENSOR_CORES.finditer(done.asm["ptx"])}))
    # Asynchronous copies of 16 bytes to shared memory.
    overlapped = bool(re.search(r"cp\.async\.cg\.shared\.global .*0x10\b", done.asm["ptx"]))
    return Compiled(
        op, kernel, dict(signature), arch, registers, stack, done.metadata.shared, found, overlapped
    )


def disassembled(tool: str, option: str, cubin: bytes) -> str:
    """The output of one of the disassemblers in the Triton package."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack, to which registers spill."""
    text = disassembled("cuobjdump", "--dump-resource-usage", cubin)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def signatures(arch: int) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Every signature of every kernel that an architecture launches."""
    for op, spec in SPECS.items():
        for kernel in spec.kernels:
            if not kernel.archs or arch in kernel.archs:
                for signature in kernel.signatures:
                    yield op, kernel.name, signature


def compile_all(archs: tuple[int, ...] = tuple(SHARED_LIMIT)) -> list[Compiled]:
    """Compiles everything, with one process per core."""
    jobs = [(*entry, arch) for arch in archs for entry in signatures(arch)]
    # Children must compile, not interpret.
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=1))


def may_spill(row: Compiled) -> bool:
    """The one exception: 4-byte numbers with D = 256, whose queries, split in two, fill the registers."""
    return (
        row.kernel == "tree_attention_kernel"
        and row.signature["p_q"].startswith("*fp32")
        and row.signature["D"] == "256"
    )


def page(rows: list[Compiled]) -> str:
    """The page in Markdown: one line per kernel and signature, one column per architecture."""
    import triton

    archs = sorted({row.arch for row in rows})
    places: dict[tuple[str, str, str], dict[int, Compiled]] = {}
    for row in rows:
        places.setdefault((row.op, row.kernel, row.label), {})[row.arch] = row
    lines = [
        "# The Triton kernels, compiled",
        "",
        f"Written by `python -m benchmarks.ops.kernel_table` with Triton {triton.__version__}; no GPU is needed. Per",
        "architecture: registers per thread, bytes of shared memory per program, and the tensor-core instruction.",
        "Registers spill to memory only where bytes of stack are named. Limits: 255 registers, and shared memory of",
        ", ".join(f"{SHARED_LIMIT[arch] // 1024} KiB on sm_{arch}" for arch in archs) + ".",
        "",
        "| op | kernel | signature | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|---|---|---|" + "---|" * len(archs),
    ]
    for (op, kernel, what), by_arch in places.items():
        cells = " | ".join(_cell(by_arch[arch]) if arch in by_arch else "–" for arch in archs)
        lines.append(f"| `{op}` | `{kernel}` | {what} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(row: Compiled) -> str:
    parts = [f"{row.registers} registers", f"{row.shared} B"]
    parts += [f"**{row.stack} B stack**"] if row.stack else []
    return ", ".join([*parts, *(name.partition(".")[0] for name in row.tensor_cores)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers and shared memory of every Triton kernel.")
    parser.add_argument("--print", action="store_true", help="to the screen, not to docs/kernels.md")
    arguments = parser.parse_args()
    text = page(compile_all())
    if arguments.print:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
