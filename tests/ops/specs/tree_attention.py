"""Inputs, shapes, tolerances and compiled kernels of tree_attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.ops.specs import TYPES, KernelSpec, OpSpec, Tolerance, signature, slots_of, spread


def make_inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Ragged prefixes from T down to about T/2 (`lengths` overrides); positions that no token sees hold NaN.

    With `slots`, the rows' prefixes are in so many slots, of which the others hold NaN and lengths outside the cache.
    Generated on the device, so the numbers of a seed depend on the device.
    """
    B, H, G, S, T, D = (shape[name] for name in "BHGSTD")
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=device)

    lengths = torch.tensor(shape.get("lengths", [T - b * T // (2 * B) for b in range(B)]), dtype=torch.int64)
    lengths = lengths.to(device)
    position = torch.arange(T, device=device)
    window = shape.get("window", 0)
    seen = (position < lengths[:, None]) & (position > lengths[:, None] - (window or 1 << 40))
    empty = ~seen[:, None, :, None]
    k_cache = normal(B, G, T, D).masked_fill(empty, float("nan"))
    v_cache = normal(B, G, T, D).masked_fill(empty, float("nan"))
    slots = slots_of(shape, device)
    if slots is not None:
        k_cache, v_cache = (spread(x, slots, shape["slots"], float("nan")) for x in (k_cache, v_cache))
        lengths = spread(lengths, slots, shape["slots"], T + 1)
    mask = shape.get("mask")
    ancestors = None
    if mask == "chain":
        ancestors = torch.tensor([(2 << s) - 1 if s < 63 else -1 for s in range(S)]).expand(B, S)
    elif mask == "tree":
        # Token s descends from token (s − 1) // 2, a binary tree; and one token of the first row sees
        # nothing new.
        masks = [1]
        for s in range(1, S):
            masks.append(masks[(s - 1) // 2] | 1 << s)
        ancestors = torch.tensor([m - (1 << 64) if m >> 63 else m for m in masks]).repeat(B, 1)
        ancestors[0, -1] = 0
    return {
        "q": normal(B, H, S, D).to(dtype),
        "k": normal(B, G, S, D).to(dtype),
        "v": normal(B, G, S, D).to(dtype),
        "k_cache": k_cache.to(dtype),
        "v_cache": v_cache.to(dtype),
        "lengths": lengths,
        "ancestors": None if ancestors is None else ancestors.to(device),
        "scale": D**-0.5,
        "causal": mask == "causal",
        "window": window,
        "softcap": shape.get("softcap", 0.0),
        "sinks": normal(H).to(dtype) if shape.get("sinks") else None,
        "slots": slots,
    }


def _shape(B: int, H: int, G: int, S: int, T: int, D: int, **more: Any) -> dict[str, Any]:
    return {"B": B, "H": H, "G": G, "S": S, "T": T, "D": D, **more}


STRIDED = ("q", "k", "v", "k_cache", "v_cache", "out")


def _attention(
    kernel: Any,
    dtype: torch.dtype,
    D: int,
    rows: int,
    mode: int,
    leaves: int = 1,
    arch: int = 90,
    variant: tuple[str, ...] = (),
) -> dict[str, str]:
    pointer = f"*{TYPES[dtype]}:16"
    arguments = {f"p_{name}": pointer for name in STRIDED}
    arguments |= {"p_acc": "*fp32:16", "p_m": "*fp32:16", "p_l": "*fp32:16"}
    arguments |= {"p_tickets": "*i32:16", "p_lengths": "*i64:16"}
    arguments["p_ancestors"] = "*i64:16" if mode == kernel.MASKED else "None"
    arguments["p_sinks"] = pointer if "sinks" in variant else "None"
    arguments["p_slots"] = "*i64:16" if "slots" in variant else "None"
    arguments |= {
        "scale": "fp32",
        "N": "i32" if "slots" in variant else "None",
        "G": "i32",
        "S": "i32",
        "T": "i32",
        "R": "i32",
        "span": "i32",
    }
    arguments["least"] = "i32"
    arguments["window"] = "i32" if "window" in variant else "None"
    arguments["softcap"] = "fp32" if "softcap" in variant else "None"
    for name in STRIDED:
        arguments |= {f"{name}_{letter}": "i64:16" for letter in ("b", "h", "s")}
    return signature(arguments, {**kernel.configuration(D, rows, mode, dtype, arch), "LEAVES": leaves})


def _merge(
    kernel: Any, dtype: torch.dtype, D: int, leaves: int = 1, variant: tuple[str, ...] = ()
) -> dict[str, str]:
    arguments = {"p_acc": "*fp32:16", "p_m": "*fp32:16", "p_l": "*fp32:16", "p_lengths": "*i64:16"}
    arguments["p_sinks"] = f"*{TYPES[dtype]}:16" if "sinks" in variant else "None"
    arguments["p_slots"] = "*i64:16" if "slots" in variant else "None"
    arguments |= {
        "p_out": f"*{TYPES[dtype]}:16",
        "N": "i32" if "slots" in variant else "None",
        "G": "i32",
        "S": "i32",
        "T": "i32",
        "R": "i32",
    }
    arguments |= {"span": "i32", "least": "i32", "splits": "i32"}
    arguments["window"] = "i32" if "window" in variant else "None"
    arguments |= {f"out_{letter}": "i64:16" for letter in ("b", "h", "s")}
    return signature(arguments, kernel.merge_configuration(D, leaves))


# By head, what models with a window, a softcap or sinks add to the kernel (64: gpt-oss; 128: Mistral, Gemma 2 27B; 256:
# Gemma 2) or a cache with slots, in which modes, and over a leaf (1) or a span (0).
_DECODED = ((0, 1), (0, 0), (2, 0))
VARIANTS = {
    64: ((("window", "sinks"), (*_DECODED, (1, 0))), (("sinks",), ((0, 0),)), (("slots",), _DECODED)),
    128: ((("window",), _DECODED), (("window", "softcap"), ((0, 0),)), (("slots",), _DECODED)),
    256: ((("window", "softcap"), _DECODED), (("softcap",), ((0, 0),)), (("slots",), ((0, 0),))),
}


def _signatures(kernel: Any, arch: int) -> tuple[dict[str, str], ...]:
    """What an architecture launches: every block of query rows, over a leaf (1) and over a span (0)."""
    alone, masked, causal = kernel.MODES
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    half = [(D, rows) for D, tiles in kernel.TILES[arch][2].items() for rows in tiles if D != 127]
    return (
        *(_attention(kernel, bf16, D, rows, alone, leaves, arch) for D, rows in half for leaves in (1, 0)),
        *(_attention(kernel, bf16, D, rows, mode, 0, arch) for D, rows in half for mode in (masked, causal)),
        *(_attention(kernel, bf16, D, 64, alone, 0, arch) for D in (80, 96)),
        *(_attention(kernel, fp16, 128, rows, alone, 0, arch) for rows in (16, 64)),
        *(
            _attention(kernel, bf16, D, rows, mode, leaves, arch, variant)
            for D, rows in half
            for variant, launches in VARIANTS[D]
            for mode, leaves in launches
        ),
        *(_attention(kernel, fp32, 64, rows, alone, 0, arch) for rows in (16, 32)),
        *(_attention(kernel, fp32, 128, 16, mode, 0, arch) for mode in (alone, causal)),
        _attention(kernel, fp32, 256, 16, alone, 0, arch),
        *(
            _attention(kernel, fp32, 128, 16, mode, 0, arch, ("window", "softcap"))
            for mode in (alone, causal)
        ),
    )


def compiled(kernel: Any) -> tuple[KernelSpec, ...]:
    merges = (
        *(_merge(kernel, torch.bfloat16, D) for D in (64, 80, 128, 256)),
        _merge(kernel, torch.bfloat16, 128, 0),
        _merge(kernel, torch.bfloat16, 64, 1, ("window", "sinks")),
        _merge(kernel, torch.bfloat16, 128, 0, ("window",)),
        _merge(kernel, torch.bfloat16, 128, 1, ("slots",)),
    )
    return (
        *(
            KernelSpec("tree_attention_kernel", _signatures(kernel, arch), archs=(arch,))
            for arch in kernel.TILES
        ),
        KernelSpec("tree_attention_merge_kernel", merges),
    )


SPEC = OpSpec(
    name="tree_attention",
    make_inputs=make_inputs,
    shapes=(
        _shape(1, 1, 1, 1, 0, 1),
        _shape(1, 9, 3, 1, 512, 64),
        _shape(1, 9, 3, 10, 512, 64),
        _shape(2, 9, 3, 40, 700, 64),
        _shape(3, 4, 4, 5, 130, 16, lengths=[0, 130, 1]),
        _shape(2, 6, 2, 7, 33, 40, mask="tree"),
        _shape(2, 8, 1, 64, 257, 32, mask="chain"),
        _shape(1, 4, 2, 64, 20, 24, mask="tree"),
        _shape(2, 2, 2, 3, 19, 5),
        _shape(2, 4, 2, 11, 300, 128),
        _shape(1, 2, 1, 256, 70, 80),
        _shape(1, 2, 1, 2, 2500, 16),
        _shape(1, 4, 2, 3, 600, 256, mask="chain"),
        _shape(1, 9, 3, 300, 0, 64, mask="causal"),
        _shape(3, 4, 2, 37, 90, 48, mask="causal", lengths=[0, 90, 41]),
        _shape(2, 3, 3, 70, 5, 20, mask="causal"),
        _shape(3, 4, 2, 5, 700, 64, lengths=[700, 0, 90], window=200),
        _shape(2, 8, 2, 3, 300, 128, softcap=30.0),
        _shape(2, 6, 3, 4, 200, 32, sinks=True, lengths=[200, 0]),
        _shape(2, 2, 1, 3, 130, 16, window=1, sinks=True),
        _shape(2, 4, 2, 70, 300, 48, mask="causal", lengths=[300, 17], window=90, softcap=4.0, sinks=True),
        _shape(1, 3, 1, 300, 0, 20, mask="causal", window=33),
        _shape(2, 4, 2, 64, 140, 24, mask="tree", lengths=[140, 1], window=3, softcap=2.0),
        _shape(2, 4, 1, 9, 60, 16, mask="chain", lengths=[60, 4], window=5, sinks=True),
        _shape(1, 2, 1, 2, 5000, 16, window=4500, sinks=True),
        _shape(3, 6, 2, 5, 130, 16, lengths=[0, 130, 41], slots=5),
        _shape(2, 4, 2, 20, 300, 48, mask="causal", slots=2),
        _shape(
            2, 4, 2, 9, 150, 24, mask="tree", lengths=[140, 1], window=30, softcap=2.0, sinks=True, slots=4
        ),
        _shape(1, 2, 1, 2, 2500, 16, slots=4),
    ),
    # 16-bit inputs are rounded before the comparison; the output is rounded once more.
    tolerances={
        torch.float64: Tolerance(1e-12, 1e-11),
        torch.float32: Tolerance(2e-6, 4e-6),
        torch.bfloat16: Tolerance(4e-3, 8e-3),
        torch.float16: Tolerance(5e-4, 1e-3),
    },
    compiled=compiled,
)
