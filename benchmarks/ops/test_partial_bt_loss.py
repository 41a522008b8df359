"""partial_bt_loss with its gradient against the composition in PyTorch and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rgtg_fast.ops import partial_bt_loss
from tests.ops.specs import SPECS

pytestmark = pytest.mark.usefixtures("cpp_only")


@pytest.mark.parametrize(("N", "T"), [(8, 200), (64, 200)])
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_partial_bt_loss(timed, who, N, T):
    case = SPECS["partial_bt_loss"].make_inputs({"N": N, "T": T, "mode": "repeat_last"}, torch.float32)
    rewards = case.pop("rewards").requires_grad_()
    lengths = case["offsets"].diff()
    term = torch.arange(T)
    at = case["offsets"][:-1, None] + term.minimum(lengths[:, None] - 1)
    used = term < lengths.view(N, 2).amax(1)[:, None]

    def ours() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False):
            loss = partial_bt_loss(rewards, **case)
            return loss, *torch.autograd.grad(loss, rewards)

    def composed() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False):
            answers = rewards[at].view(N, 2, T)
            loss = -F.logsigmoid(answers[:, 0] - answers[:, 1])[used].mean()
            return loss, *torch.autograd.grad(loss, rewards)

    for a, b in zip(ours(), composed(), strict=True):
        torch.testing.assert_close(a, b)
    timed(ours if who == "ours" else composed)
