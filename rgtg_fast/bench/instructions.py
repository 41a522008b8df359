"""Which instructions the products of torch run with on this CPU, as its libraries tell."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

# Linear layers of many rows, whose products oneDNN or MKL compute; both report every call when asked to.
_PROBE = """
import torch
for dtype in (torch.bfloat16, torch.float32):
    x, w = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    with torch.inference_mode():
        torch.nn.functional.linear(x, w)
"""
_ASKED = {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
_ONEDNN = re.compile(r"exec,cpu,(?:matmul|inner_product),([^,]+),.*?\bsrc[:_](bf16|f32)")
_MKL = re.compile(r"MKL_VERBOSE (SGEMM|\w*GEMM_BF16\w*)\(")
# The first set that MKL's greeting names in brackets, for example "(Intel(R) AVX-512)".
_MKL_SET = re.compile(r"MKL_VERBOSE oneMKL .*?\(Intel\(R\) (AVX[\w-]*)\)")


@functools.cache
def torch_products() -> str | None:
    """What computes torch's products in bfloat16 and float32, asked for once in a process of its own.

    Returns:
        For example `"bf16 brg_matmul:avx10_1_512_amx; fp32 mkl:avx512"`; None where the libraries say nothing.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=os.environ | _ASKED,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return products_in(done.stdout)


def products_in(report: str) -> str | None:
    """The same from what oneDNN and MKL wrote.

    Args:
        report: the lines that they write with `ONEDNN_VERBOSE=1` and `MKL_VERBOSE=1`.
    """
    found: dict[str, str] = {}
    greeting = _MKL_SET.search(report)
    mkl = "mkl" + (f":{greeting[1].replace('-', '').lower()}" if greeting else "")
    for line in report.splitlines():
        if call := _ONEDNN.search(line):
            found.setdefault({"bf16": "bf16", "f32": "fp32"}[call[2]], call[1])
        elif call := _MKL.match(line):
            found.setdefault("fp32" if call[1] == "SGEMM" else "bf16", mkl)
    return "; ".join(f"{dtype} {found[dtype]}" for dtype in ("bf16", "fp32") if dtype in found) or None
