"""The packed loss is the published one: each prefix of each answer in a row of its own, to 1e-10 in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rgtg_fast.ops import partial_bt_loss
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.packing import collate, pack, packed_rewards, use_packed_attention
from tests.conftest import make_rm

EOS, PAD = 1, 0
# Answers of unlike lengths, either side the longer one; one prompt of a single token, one pair with equal lengths.
LENGTHS = [(7, 5, 9), (1, 6, 2), (4, 1, 3), (3, 4, 4), (9, 12, 8)]


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch) -> None:
    """Transformers' norm computes in float32 whatever the model's dtype, which would end the comparison at 1e-7."""

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def make_pairs() -> list[TokenizedPair]:
    random = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(6, 64, (n,), generator=random).tolist()

    return [
        TokenizedPair(ids(p), [*ids(w - 1), EOS], [*ids(l_ - 1), EOS], index)
        for index, (p, w, l_) in enumerate(LENGTHS)
    ]


def reward_of_one_row(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """r(x, y_{1:i}) of a text that is a batch of its own: nothing is packed, padded or masked."""
    hidden = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return model.score(hidden[0, -1])[0]


def loss_of_one_row_per_prefix(
    model: torch.nn.Module, pairs: list[TokenizedPair], mode: str, weight: str
) -> torch.Tensor:
    losses, terms = [], 0
    for pair in pairs:
        chosen, rejected = pair.chosen_ids, pair.rejected_ids
        n = min(len(chosen), len(rejected)) if mode == "truncate" else max(len(chosen), len(rejected))
        if mode == "eos":
            chosen = chosen + [EOS] * (n - len(chosen))
            rejected = rejected + [EOS] * (n - len(rejected))
        # A slice past the end is the whole answer: its last reward is carried on.
        margins = torch.stack(
            [
                reward_of_one_row(model, pair.prompt_ids + chosen[:i])
                - reward_of_one_row(model, pair.prompt_ids + rejected[:i])
                for i in range(1, n + 1)
            ]
        )
        total = -F.logsigmoid(margins).sum()
        losses.append(total / n if weight == "pair" else total)
        terms += n
    return torch.stack(losses).sum() / (len(pairs) if weight == "pair" else terms)


@pytest.mark.parametrize("weight", ["prefix", "pair"])
@pytest.mark.parametrize("mode", ["eos", "repeat_last", "truncate"])
def test_the_gradient_is_that_of_one_row_per_prefix(mode, weight):
    pairs = make_pairs()
    model = make_rm(dtype=torch.float64)
    want_loss = loss_of_one_row_per_prefix(model, pairs, mode, weight)
    want = torch.autograd.grad(want_loss, list(model.parameters()))

    use_packed_attention(model)
    eos_padding = mode == "eos"
    rows = pack(pairs, 48, eos_padding)
    assert len(rows) < len(pairs)  # some row holds several pairs
    batch = collate(pairs, rows, PAD, length=48, eos_padding=eos_padding)
    loss = partial_bt_loss(*packed_rewards(model, batch), mode, weight)
    got = torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        assert b.abs().max() > 0, name
        difference = (a - b).abs().max() / b.abs().max()
        assert difference < 1e-10, f"{name}: {difference:.2g}"


def test_the_modes_differ():
    """The test above would pass for one formula three times; it is three."""
    pairs = make_pairs()
    model = make_rm(dtype=torch.float64)
    losses = [
        loss_of_one_row_per_prefix(model, pairs, mode, weight).item()
        for mode in ("eos", "repeat_last", "truncate")
        for weight in ("prefix", "pair")
    ]
    assert len({round(loss, 6) for loss in losses}) == 6
