"""The machine that measured, and the least time that its memory allows for a token."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from rgtg_fast import __version__
from rgtg_fast.bench.instructions import torch_products
from rgtg_fast.bench.methods import BenchMethod, RewardModel
from rgtg_fast.bench.models import RewardModels
from rgtg_fast.models.quantized import FORMATS
from rgtg_fast.ops._extension import instruction_set


def memory_bandwidth(device: torch.device | str = "cpu") -> float:
    """Measured bandwidth of reading memory, in bytes per second: the best of six sums over 1 GiB.

    On CUDA, events time ten sums at once, so that neither launches nor waiting are counted.
    """
    device = torch.device(device)
    x = torch.ones(2**28, device=device)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            with torch.cuda.device(device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(10):
                    x.sum()
                end.record()
                end.synchronize()
            seconds = begin.elapsed_time(end) / 1e4
        else:
            start = time.perf_counter()
            x.sum()
            seconds = time.perf_counter() - start
        best = min(best, seconds)
    return x.nbytes / best


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on: processor, instruction sets, threads, memory bandwidth, versions, commit.

    `isa` is the instruction set of our kernels on the CPU, `peer_isa` what torch's own products run with there; both
    are None on a GPU and where they are not known.
    The environment variable `RGTG_COMMIT` names the commit of sources that were copied without their history.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "isa": None if cuda else instruction_set(),
        "peer_isa": None if cuda else torch_products(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _driver() if cuda else None,
        "memory_bandwidth_gb_s": round(memory_bandwidth(device) / 1e9, 2),
        "python": platform.python_version(),
    }
    info |= {"torch": torch.__version__, "triton": _triton()}
    info |= {"transformers": transformers.__version__, "rgtg_fast": __version__}
    return info | {"commit": os.environ.get("RGTG_COMMIT") or _commit()}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where `nvidia-smi` is missing or fails."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this package runs from, "+" appended where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        head = git("rev-parse", "--short=12", "HEAD")
        root = git("rev-parse", "--show-toplevel")
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", f"{root}/rgtg_fast", f"{root}/csrc"
        )
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one pass reads: all but an input embedding that is not the output's.

    What layers with rounded weights hold as buffers counts too.
    """
    embedding = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    rounded = tuple(form.layer for form in FORMATS.values())
    buffers = (
        x for module in model.modules() if isinstance(module, rounded) for x in module.buffers(recurse=False)
    )
    return sum(x.nbytes for x in (*model.parameters(), *buffers)) - (0 if tied else embedding.nbytes)


def _token_cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token, 2·L·G·D·bytes."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * groups * size * model.dtype.itemsize


def bytes_read(method: BenchMethod, lm: PreTrainedModel, rewards: RewardModels) -> tuple[int, float]:
    """Bytes of the weights that a method's step reads, and of the caches that it keeps for a token of a row.

    Args:
        method: its entry in the table of methods.
        lm: base model.
        rewards: the reward models of this benchmark.
    """
    weights, stored = read_bytes(lm), float(_token_cache_bytes(lm))
    adapter = rewards.adapter
    if method.reward is RewardModel.NONE:
        return weights, stored
    if method.reward is RewardModel.SHARED_ADAPTER and adapter is not None:
        layers = lm.config.get_text_config().num_hidden_layers
        above = 0 if adapter.fork is None else layers - adapter.fork
        return weights + adapter.nbytes, stored * (1 + above / layers)
    second = rewards.model_of(method)
    if second is not None:
        return weights + read_bytes(second), stored + _token_cache_bytes(second)
    # An adapter merged into its own copy of the base model, which has no vocabulary head.
    head = lm.get_output_embeddings()
    return 2 * weights - (0 if head is None else head.weight.nbytes), 2 * stored


def floor(
    weights: int, stored: float, prompt_length: int, new_tokens: int, batch: int, bandwidth_gb_s: float
) -> dict[str, float]:
    """What a token must read when weights and caches are read once a step of B tokens, and how long that takes.

    Args:
        weights: bytes of weights that a step reads.
        stored: bytes of the caches for a token of a row.
        prompt_length: tokens of a prompt.
        new_tokens: tokens of an answer.
        batch: rows B.
        bandwidth_gb_s: measured memory bandwidth.
    """
    per_token = weights / batch
    caches = (prompt_length + (new_tokens - 1) / 2) * stored
    return {
        "weight_bytes_per_token": per_token,
        "cache_bytes_per_token": caches,
        "bandwidth_gb_s": bandwidth_gb_s,
        "floor_ms_per_token": (per_token + caches) / bandwidth_gb_s / 1e6,
    }
