"""topk_logprobs against log_softmax, topk and the entropy as torch composes them."""

from __future__ import annotations

import pytest
import torch

from rgtg_fast.ops import topk_logprobs
from tests.ops.specs import SPECS

pytestmark = pytest.mark.usefixtures("cpp_only")


def composed(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(k)
    return values, tokens, -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("k", [10, 40])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_topk_logprobs(timed, who, dtype, B, k):
    logits = SPECS["topk_logprobs"].make_inputs({"B": B, "V": 49152, "k": k}, dtype)["logits"]
    for got, want in zip(topk_logprobs(logits, k)[::2], composed(logits, k)[::2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    timed(topk_logprobs if who == "ours" else composed, logits, k)
