"""Times every op on a GPU against PyTorch, attention also against other installed libraries, and matrix products.

    python -m benchmarks.ops.gpu_ops                     # all cases into benchmarks/results/gpu_ops.csv
    python -m benchmarks.ops.gpu_ops --ops commit --list # prints the cases; needs no GPU
    ncu ... python -m benchmarks.ops.gpu_ops --once      # runs each of our kernels once, for a profiler

A measurement is one CUDA graph that runs the op once on each of several copies of its inputs, together larger than
the second-level cache, so that no run finds its inputs there. Times are by CUDA events, per run, as quantiles over
replays. `linear` is a product of M rows with a layer's weights: PyTorch's, and our op invariant_linear.
Bytes and operations are those that any implementation needs; the ceilings are a device copy and a large product of
bfloat16 matrices, measured in the same way.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rgtg_fast import ops
from rgtg_fast.bench.roofline import machine
from rgtg_fast.ops import use_backend
from tests.ops.specs import SPECS

RESULTS = Path(__file__).parents[1] / "results" / "gpu_ops.csv"
COLUMNS = (
    *("op", "who", "shape", "dtype", "us_p20", "us_p50", "us_p80"),
    *("bytes", "operations", "gb_per_s", "of_copy"),
)
MACHINE = ("gpu", "driver", "torch", "triton", "commit", "copy_gb_per_s", "product_tflop_per_s")

# Several times the 50 to 126 MB of the GPUs' second-level caches.
COLD_BYTES = 400 << 20
MAX_COPIES = 128
REPLAYS = 40


@dataclass(frozen=True)
class Case:
    """One op on one shape."""

    op: str
    shape: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16


# Products of a layer of Llama-3.1-8B, q, k, v and gate, up joined, and the head's: outputs and inputs.
LINEAR = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}


def cases() -> Iterator[Case]:
    """Shapes of Llama-3.1-8B (V=128256, H=32, G=8, D=128, L=32)."""
    for B in (1, 8, 32):
        for k in (10, 40):
            yield Case("topk_logprobs", {"B": B, "V": 128256, "k": k})
    yield Case("topk_logprobs", {"B": 32, "V": 128256, "k": 10}, torch.float32)
    yield Case("topk_logprobs", {"B": 32, "V": 128256, "k": 10, "guided": True})
    for B, T in ((1, 512), (1, 4096), (1, 8192), (8, 4096), (32, 512), (32, 4096)):
        for S in (1, 10, 40):
            yield Case(
                "tree_attention", {"B": B, "H": 32, "G": 8, "S": S, "T": T, "D": 128, "lengths": [T] * B}
            )
    for B, K in ((1, 10), (32, 10), (32, 40), (1, 128256)):
        yield Case("resample", {"B": B, "K": K}, torch.float32)
    for B, K in ((1, 10), (32, 10), (1, 40)):
        yield Case("score_and_sample", {"B": B, "K": K, "E": 4096})
    for B in (1, 32):
        yield Case("finish_step", {"B": B, "K": 10, "Z": 2}, torch.float32)
    for B in (1, 32):
        yield Case("commit", {"L": 32, "B": B, "G": 8, "S": 10, "T": 256, "D": 128})
    # What lies between a layer's products: a row of the base model, ten candidates, ten of thirty-two rows.
    for B, S in ((1, 1), (1, 10), (32, 10)):
        yield Case("add_rms_norm", {"B": B, "S": S, "E": 4096})
        yield Case("rope_and_store", {"B": B, "S": S, "H": 32, "G": 8, "D": 128})
        yield Case("act_and_mul", {"B": B, "S": S, "F": 14336})
    for N in (16, 256):
        yield Case("partial_bt_loss", {"N": N, "T": 256, "mode": "repeat_last"}, torch.float32)
    # A row of the base model, ten and twenty candidates, forty, and ten of thirty-two rows.
    for M in (1, 10, 20, 40, 320):
        for layer, (N, K) in LINEAR.items():
            yield Case("linear", {"M": M, "N": N, "K": K, "layer": layer})


def moved_bytes(case: Case) -> int:
    """Bytes that any implementation must read and write."""
    size, s = case.dtype.itemsize, case.shape
    if case.op == "topk_logprobs":
        return s["B"] * (s["V"] * (size + (4 if s.get("guided") else 0)) + s["k"] * 12 + 4)
    if case.op == "tree_attention":
        new = 2 * s["B"] * s["S"] * (s["G"] + s["H"]) * s["D"]
        return size * (2 * s["G"] * sum(s["lengths"]) * s["D"] + new)
    if case.op == "resample":
        return s["B"] * (2 * s["K"] * size + 36)
    if case.op == "score_and_sample":
        return s["B"] * s["K"] * (s["E"] * size + 8) + 2 * s["E"] * size + 36 * s["B"]
    if case.op == "finish_step":
        return s["B"] * (s["K"] * size + 120) + 8 * s["Z"]
    if case.op == "partial_bt_loss":
        offsets = SPECS["partial_bt_loss"].make_inputs(s, case.dtype)["offsets"]
        return int(offsets[-1]) * (size + 4) + 8 * len(offsets)
    if case.op == "linear":
        return size * (s["N"] * s["K"] + s["M"] * (s["N"] + s["K"]))
    if case.op == "add_rms_norm":
        return size * s["E"] * (4 * s["B"] * s["S"] + 1)
    if case.op == "rope_and_store":
        return size * s["B"] * s["S"] * s["D"] * 2 * (s["H"] + 2 * s["G"] + 1)
    if case.op == "act_and_mul":
        return size * 3 * s["B"] * s["S"] * s["F"]
    return 4 * s["L"] * s["B"] * s["G"] * s["D"] * size


def operations(case: Case) -> int:
    """Additions, multiplications and exponentials that any implementation needs; 0 where it only copies."""
    s = case.shape
    if case.op == "topk_logprobs":
        # Shift, exponential, the sums for log-sum-exp and entropy, and one comparison.
        return s["B"] * s["V"] * (6 + (2 if s.get("guided") else 0))
    if case.op == "tree_attention":
        return 4 * s["H"] * s["S"] * (sum(s["lengths"]) + s["B"]) * s["D"]
    if case.op == "resample":
        return 6 * s["B"] * s["K"]
    if case.op == "score_and_sample":
        # The norm's squares and its scaling, then the head.
        return s["B"] * s["K"] * (6 * s["E"] + 6)
    if case.op == "partial_bt_loss":
        offsets = SPECS["partial_bt_loss"].make_inputs(s, case.dtype)["offsets"]
        return 6 * int(offsets[-1])
    if case.op == "add_rms_norm":
        return 6 * s["B"] * s["S"] * s["E"]
    if case.op == "rope_and_store":
        return 3 * s["B"] * s["S"] * (s["H"] + s["G"]) * s["D"]
    if case.op == "act_and_mul":
        return 10 * s["B"] * s["S"] * s["F"]
    return 2 * s["M"] * s["N"] * s["K"] if case.op == "linear" else 0


def copies(footprint: int) -> int:
    """Copies of the inputs that together exceed the cache; at most `MAX_COPIES`."""
    return max(2, min(MAX_COPIES, -(-COLD_BYTES // max(footprint, 1))))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    p = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return p[0].item(), p[1].item(), p[2].item()


def timed(function: Callable[[Any], Any], inputs: list[Any]) -> tuple[float, float, float]:
    """Microseconds of one run, as quantiles over replays of a graph that runs once on each of the inputs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(inputs[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for one in inputs:
            function(one)
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(inputs))
    return quantiles(times[2:])


def footprint(inputs: Any) -> int:
    """Bytes of all tensors among the inputs."""
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, torch.Tensor))


def ours(op: str) -> Callable[[dict[str, Any]], Any]:
    function = getattr(ops, op)
    return lambda inputs: function(**inputs)


def torch_topk(a: dict[str, Any]) -> Any:
    logprobs = a["logits"].float().log_softmax(-1)
    score = logprobs if a["guidance"] is None else logprobs + a["beta"][:, None] * a["guidance"]
    tokens = score.topk(a["k"]).indices
    return logprobs.gather(-1, tokens), tokens


def torch_resample(a: dict[str, Any]) -> Any:
    scores = (a["logprobs"] + a["beta"][:, None] * a["rewards"]) / a["temperature"][:, None]
    return scores.softmax(-1).multinomial(1)


def torch_tail(a: dict[str, Any]) -> Any:
    """As in transformers: the norm's small kernels, the head in float32, then softmax and multinomial."""
    x = a["hidden"].float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + a["eps"])
    rewards = F.linear((a["norm"] * x.to(a["norm"].dtype)).float(), a["head"].float()[None]).squeeze(-1)
    return torch_resample({**a, "rewards": rewards})


def padded(a: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the usual implementation: answers padded to one length, the last reward repeated."""
    lengths = a["offsets"].diff()  # [2N]
    term = torch.arange(int(lengths.max()), device=lengths.device)
    at = a["offsets"][:-1, None] + term.minimum(lengths[:, None] - 1)
    used = term < lengths.view(-1, 2).amax(1)[:, None]
    rewards = a["rewards"][at].view(len(used), 2, -1)
    # Copies that autograd may save, even if the caller is in inference mode.
    with torch.inference_mode(False):
        return {"rewards": rewards.clone().requires_grad_(), "used": used.clone()}


def torch_bt_loss(a: dict[str, Any]) -> Any:
    with torch.inference_mode(False):
        margin = a["rewards"][:, 0] - a["rewards"][:, 1]
        loss = -(F.logsigmoid(margin) * a["used"]).sum() / a["used"].sum()
        return loss, *torch.autograd.grad(loss, a["rewards"])


def replicated(a: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the usual implementation: every candidate is a row of its own with a copy of the prefix."""
    S = a["q"].shape[2]

    def keys(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        old = cache.repeat_interleave(S, 0)  # [B·S, G, T, D]
        return torch.cat([old, new.transpose(1, 2).flatten(0, 1)[:, :, None]], 2)

    return {
        "q": a["q"].transpose(1, 2).flatten(0, 1)[:, :, None].contiguous(),  # [B·S, H, 1, D]
        "k": keys(a["k_cache"], a["k"]),
        "v": keys(a["v_cache"], a["v"]),
    }


def torch_sdpa(a: dict[str, Any]) -> torch.Tensor:
    return F.scaled_dot_product_attention(a["q"], a["k"], a["v"], enable_gqa=True)


def one_prefix(a: dict[str, Any]) -> dict[str, Any]:
    """For SDPA: the candidates of a group's heads as query rows over one prefix, without the token itself."""
    B, H, S, D = a["q"].shape
    G = a["k"].shape[1]
    return {"q": a["q"].reshape(B, G, H // G * S, D).contiguous(), "k": a["k_cache"], "v": a["v_cache"]}


def packed(a: dict[str, Any]) -> dict[str, Any]:
    """For flash-attn: candidates as extra query heads over the prefix alone, without the token itself."""
    B, H, S, D = a["q"].shape
    G = a["k"].shape[1]
    heads = a["q"].view(B, G, H // G, S, D).reshape(B, 1, H * S, D)
    cache = {name: a[name].transpose(1, 2).contiguous() for name in ("k_cache", "v_cache")}
    return {"q": heads, **cache, "cache_seqlens": a["lengths"].int()}


def rivals(case: Case) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any], Callable[[Any], Any]]]:
    """Other implementations: name, conversion of our inputs, call."""
    if case.op == "topk_logprobs":
        yield "torch log_softmax + topk", dict, torch_topk
    elif case.op == "resample":
        yield "torch softmax + multinomial", dict, torch_resample
    elif case.op == "score_and_sample":
        yield "torch norm, linear, softmax + multinomial", dict, torch_tail
    elif case.op == "linear":
        yield "torch linear", dict, lambda a: F.linear(a["x"], a["weight"])
        yield "invariant_linear", dict, lambda a: ops.invariant_linear(a["x"][None], a["weight"])
    elif case.op == "commit":
        yield "torch index_put", dict, lambda a: SPECS["commit"].reference(**a)
    elif case.op in ("add_rms_norm", "rope_and_store", "act_and_mul"):
        yield "torch, as transformers does", dict, lambda a: SPECS[case.op].reference(**a)
    elif case.op == "finish_step":
        yield "torch, some twenty-five small kernels", dict, lambda a: SPECS["finish_step"].reference(**a)
    elif case.op == "partial_bt_loss":
        yield "torch logsigmoid and autograd, padded", padded, torch_bt_loss
    elif case.op == "tree_attention":
        yield "torch SDPA, packed query rows, prefix only", one_prefix, torch_sdpa
        # The published implementation, for at most ten candidates.
        if case.shape["S"] <= 10:
            yield "torch SDPA, replicated prefix", replicated, torch_sdpa
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_with_kvcache

            yield "flash-attn, packed heads, prefix only", packed, lambda a: flash_attn_with_kvcache(**a)
        if importlib.util.find_spec("flashinfer") and case.shape["B"] == 1:
            from flashinfer import single_prefill_with_kv_cache

            def flashinfer(a: dict[str, Any]) -> torch.Tensor:
                q, k, v = (a[name][0].transpose(0, 1) for name in ("q", "k_cache", "v_cache"))
                return single_prefill_with_kv_cache(q, k, v, causal=False)

            yield "FlashInfer, prefix only", dict, flashinfer


def inputs_of(case: Case) -> dict[str, Any]:
    """Inputs on the device with which a run can be repeated."""
    if case.op == "linear":
        M, N, K = (case.shape[name] for name in "MNK")
        x = torch.randn(M, K, device="cuda", dtype=case.dtype)
        return {"x": x, "weight": torch.randn(N, K, device="cuda", dtype=case.dtype)}
    inputs = SPECS[case.op].make_inputs(case.shape, case.dtype, "cuda")
    if case.op in ("resample", "score_and_sample"):
        inputs["temperature"].fill_(1.0)
    if case.op == "commit":
        # From length 0, so that there is a slot for every replay.
        inputs["choice"].fill_(0)
        inputs["lengths"].zero_()
    return inputs


def measure(case: Case, ceiling: float) -> Iterator[dict[str, Any]]:
    """Result rows of one case: our op, then the other implementations."""
    implementations = [*([("ours", dict, ours(case.op))] if case.op in SPECS else []), *rivals(case)]
    need = moved_bytes(case)
    base = inputs_of(case)
    for who, prepare, function in implementations:
        first = prepare(base)
        n = copies(footprint(first))
        inputs = [first, *(prepare({k: _clone(x) for k, x in base.items()}) for _ in range(n - 1))]
        with use_backend("triton"):
            times = timed(function, inputs)
        rate = need / times[1] / 1000
        yield {
            "op": case.op,
            "who": who,
            "shape": shape_text(case),
            "dtype": str(case.dtype).removeprefix("torch."),
            **{f"us_p{p}": round(t, 2) for p, t in zip((20, 50, 80), times, strict=True)},
            "bytes": need,
            "operations": operations(case),
            "gb_per_s": round(rate, 1),
            "of_copy": round(rate / ceiling, 3),
        }
        del first, inputs
        torch.cuda.empty_cache()


def shape_text(case: Case) -> str:
    """The shape as in the result files."""
    return " ".join(f"{k}={v}" for k, v in case.shape.items() if k != "lengths")


def _clone(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x


def copy_bandwidth() -> float:
    """GB/s of a device copy of 1 GiB, read and written bytes."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    _, p50, _ = timed(lambda _: target.copy_(source), [None, None])
    return 2 * source.numel() / p50 / 1000


def product_throughput() -> float:
    """TFLOP/s of a product of two bfloat16 matrices of 8192 rows and columns."""
    n = 8192
    a, b, out = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    _, p50, _ = timed(lambda _: torch.mm(a, b, out=out), [None, None])
    return 2 * n**3 / p50 / 1e6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(dict.fromkeys(case.op for case in cases()))
    parser.add_argument("--ops", nargs="+", choices=names, default=names, help="in this order (default: all)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--once", action="store_true", help="run our kernels once each, and time nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    wanted = [case for op in given.ops for case in cases() if case.op == op]
    if given.list:
        for case in wanted:
            print(case.op, case.shape, case.dtype, f"{moved_bytes(case)} bytes")
        return 0
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured")
        return 2
    if given.once:
        with use_backend("triton"), torch.inference_mode():
            wanted = [case for case in wanted if case.op in SPECS]
            for case in wanted:
                inputs = inputs_of(case)
                # The name of the launches in a profiler.
                with torch.cuda.nvtx.range(f"{case.op} {shape_text(case)}"):
                    ours(case.op)(inputs)
        torch.cuda.synchronize()
        print(f"{len(wanted)} cases")
        return 0
    ceiling, product = copy_bandwidth(), product_throughput()
    about = machine("cuda")
    where = {name: about[name] for name in ("gpu", "driver", "torch", "triton", "commit")}
    where |= {"copy_gb_per_s": f"{ceiling:.1f}", "product_tflop_per_s": f"{product:.1f}"}
    print(f"{where['gpu']}: a device copy moves {ceiling:.0f} GB/s, a product does {product:.0f} TFLOP/s")
    torch.cuda.empty_cache()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with given.output.open("w", newline="", encoding="utf-8") as file, torch.inference_mode():
        writer = csv.DictWriter(file, (*COLUMNS, *MACHINE), lineterminator="\n")
        writer.writeheader()
        for case in wanted:
            try:
                for row in measure(case, ceiling):
                    writer.writerow({**row, **where})
                    file.flush()
                    print(*(row[name] for name in COLUMNS), sep="  ")
            except RuntimeError as error:  # out of memory, or a capture that failed: go on with the next case
                reason = str(error).partition("\n")[0]
                print(f"{case.op} {shape_text(case)}: the rest of this case is left out: {reason}")
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
