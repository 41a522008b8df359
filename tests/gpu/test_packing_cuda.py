"""Packed rows on a GPU, through flex_attention's kernel, against the exact path of the CPU."""

from __future__ import annotations

import pytest
import torch

from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.packing import collate, pack, packed_rewards, use_packed_attention
from tests.conftest import make_rm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_rewards_and_gradients_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 60, (12, 3), generator=generator).tolist()
    pairs = [
        TokenizedPair([3 + i] * p, [4 + i] * c + [1], [5 + i] * r + [1], i)
        for i, (p, c, r) in enumerate(sizes)
    ]
    # Two lengths: a second batch is a second shape for the compiled kernel.
    for budget in (512, 300):
        results = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
            model = make_rm(
                hidden_size=96, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.1
            )
            model = model.to(device=device, dtype=dtype)
            use_packed_attention(model)
            batch = collate(pairs, pack(pairs, budget), 0).to(device)
            rewards, _ = packed_rewards(model, batch)
            rewards.square().mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((rewards.detach().double().cpu(), gradient.double().cpu()))
        for exact, fast in zip(*results, strict=True):
            assert (fast - exact).norm() / exact.norm() < 1e-4
