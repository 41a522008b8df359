"""Checks an installed wheel: the C++ kernels are in it, and one op gives what its PyTorch reference gives."""

from pathlib import Path

import torch

import rgtg_fast
from rgtg_fast import ops

assert "site-packages" in Path(rgtg_fast.__file__).parts, f"not the installed package: {rgtg_fast.__file__}"
assert ops.backend_of("topk_logprobs", "cpu") == "cpp", "the wheel has no C++ kernels"

logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
logprobs, tokens, entropy = ops.topk_logprobs(logits, 10)
with ops.use_backend("reference"):
    expected_logprobs, expected_tokens, expected_entropy = ops.topk_logprobs(logits, 10)
assert torch.equal(tokens, expected_tokens)
torch.testing.assert_close(logprobs, expected_logprobs)
torch.testing.assert_close(entropy, expected_entropy)
