"""tree_attention against torch's scaled_dot_product_attention.

For the candidates of one step: `torch_replicated` is what the published decoders do, k copies of the
prefix, given here for nothing (its copying is not timed); `torch_masked` is one prefix and a mask.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rgtg_fast.ops import tree_attention
from tests.ops.specs import SPECS

pytestmark = pytest.mark.usefixtures("cpp_only")

# SmolLM2-135M.
H, G, D = 9, 3, 64


@pytest.mark.parametrize(("B", "S"), [(1, 1), (1, 10), (1, 40), (8, 10)])
@pytest.mark.parametrize("T", [128, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "torch_masked", "torch_replicated"])
def test_candidates(timed, who, dtype, T, B, S):
    shape = {"B": B, "H": H, "G": G, "S": S, "T": T, "D": D, "lengths": [T] * B}
    case = SPECS["tree_attention"].make_inputs(shape, dtype)
    q, k, v, k_cache, v_cache = (case[name] for name in ("q", "k", "v", "k_cache", "v_cache"))
    keys, values = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    mask = torch.cat([torch.ones(S, T, dtype=torch.bool), torch.eye(S, dtype=torch.bool)], 1)

    def ours() -> torch.Tensor:
        return tree_attention(**case)

    def masked() -> torch.Tensor:
        return sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)

    def candidates(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(B * S, -1, 1, D)

    # One row per candidate, one prefix per row: [B S, G, T + 1, D].
    own_k = torch.cat([k_cache.repeat_interleave(S, 0), candidates(k)], 2)
    own_v = torch.cat([v_cache.repeat_interleave(S, 0), candidates(v)], 2)
    own_q = candidates(q)

    def replicated() -> torch.Tensor:
        return sdpa(own_q, own_k, own_v, enable_gqa=True)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours(), masked(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(candidates(ours()), replicated(), rtol=tolerance, atol=tolerance)
    timed({"ours": ours, "torch_masked": masked, "torch_replicated": replicated}[who])


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("who", ["ours", "torch_masked"])
def test_window(timed, who, window):
    """Candidates after a long prefix: with a window only its slots are read, a mask alone saves nothing."""
    T, S = 8192, 10
    case = SPECS["tree_attention"].make_inputs(
        {"B": 1, "H": H, "G": G, "S": S, "T": T, "D": D}, torch.float32
    )
    case["window"] = window
    keys, values = (torch.cat([case[f"{name}_cache"], case[name]], 2) for name in "kv")
    seen = (torch.arange(T) > T - (window or T + 1)).expand(S, T)
    mask = torch.cat([seen, torch.eye(S, dtype=torch.bool)], 1)

    def ours() -> torch.Tensor:
        return tree_attention(**case)

    def masked() -> torch.Tensor:
        return sdpa(case["q"], keys, values, attn_mask=mask, enable_gqa=True)

    torch.testing.assert_close(ours(), masked(), rtol=1e-5, atol=1e-5)
    timed(ours if who == "ours" else masked)


@pytest.mark.parametrize("P", [512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_prefill(timed, who, dtype, P):
    case = SPECS["tree_attention"].make_inputs(
        {"B": 1, "H": H, "G": G, "S": P, "T": 0, "D": D, "mask": "causal"}, dtype
    )

    def ours() -> torch.Tensor:
        return tree_attention(**case)

    def composed() -> torch.Tensor:
        return sdpa(case["q"], case["k"], case["v"], is_causal=True, enable_gqa=True)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours(), composed(), rtol=tolerance, atol=tolerance)
    timed(ours if who == "ours" else composed)
