"""resample against softmax and multinomial, which draw from one global state for the whole batch."""

from __future__ import annotations

import pytest
import torch

from rgtg_fast.ops import resample
from tests.ops.specs import SPECS

pytestmark = pytest.mark.usefixtures("cpp_only")


@pytest.mark.parametrize("K", [10, 40, 49152])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_resample(timed, who, B, K):
    case = SPECS["resample"].make_inputs({"B": B, "K": K}, torch.float32)
    case["temperature"] = torch.full((B,), 0.8)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return resample(**case)

    def scaled() -> torch.Tensor:
        return (
            (case["logprobs"] + case["beta"][:, None] * case["rewards"]) / case["temperature"][:, None]
        ).log_softmax(-1)

    def composed() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = scaled()
        choice = torch.multinomial(logprobs.exp(), 1)
        return choice[:, 0], logprobs.gather(1, choice)[:, 0]

    choice, logprob = ours()
    torch.testing.assert_close(logprob, scaled().gather(1, choice[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    timed(ours if who == "ours" else composed)
