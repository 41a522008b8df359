"""Log-probabilities of tokens under a vocabulary-sized head on a GPU, a few at a time or by liger-kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rgtg_fast.training import vocabulary
from rgtg_fast.training.vocabulary import chunked_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(700, 256, generator=generator, dtype=torch.float64)
    weight = torch.randn(5003, 256, generator=generator, dtype=torch.float64) / 16
    tokens = torch.randint(5003, (700,), generator=generator)
    scale = torch.randn(700, generator=generator, dtype=torch.float64)
    # Rounded first, so that what is compared is the computation alone.
    return states.to(dtype), weight.to(dtype), tokens, scale


@pytest.mark.parametrize("way", ["chunked", "liger"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_logprobs_and_gradient_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, way: str
) -> None:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if way == "liger" and not installed:
        pytest.skip("liger-kernel is not installed")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(vocabulary, "_LOGITS", 300 * 5003)
    states, weight, tokens, scale = example(dtype)
    exact = states.double().requires_grad_()
    expected = chunked_logprobs(exact, weight.double(), None, tokens)
    (expected * scale).sum().backward()
    given = states.cuda().requires_grad_()
    if way == "liger":
        logprobs = vocabulary._LigerLogprobs.apply(given, weight.cuda(), None, tokens.cuda())
    else:
        logprobs = vocabulary._Logprobs.apply(given, weight.cuda(), None, tokens.cuda(), dtype)
    (logprobs * scale.to(logprobs).cuda()).sum().backward()
    assert exact.grad is not None
    assert given.grad is not None
    assert (logprobs.double().cpu() - expected).norm() / expected.norm() < tolerance
    assert (given.grad.double().cpu() - exact.grad).norm() / exact.grad.norm() < tolerance


def test_memory_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    states = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128_000, 512, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(128_000, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vocabulary._Logprobs.apply(states, weight, None, tokens, torch.bfloat16).sum().backward()
    # All logits in float32 would be 4 GiB.
    assert torch.cuda.max_memory_allocated() - before < 2**30
