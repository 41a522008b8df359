"""Weights in 4 bits on a GPU: the product against the weights that it stands for, and a reward model in graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.int4 import Int4Linear, dequantized, quantized
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: weights in 4 bits are NOT tested on a GPU"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (64, 576), (4096, 1024)])
@pytest.mark.parametrize("tokens", [1, 10, 33, 320])
@torch.no_grad()
def test_the_product_is_that_of_the_rounded_weight(rows: int, columns: int, tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=bias).to("cuda", torch.bfloat16)
    small = Int4Linear(layer)
    weight = dequantized(*quantized(layer.weight, small.group)).double()
    x = torch.randn(2, tokens, columns, device="cuda").bfloat16()
    want = nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    # The kernel rounds the weight to bfloat16 too.
    assert (small(x).double() - want).norm() / want.norm() <= 8e-3
    assert small.packed.nbytes == layer.weight.numel() / 2


def test_another_dtype_is_refused() -> None:
    with pytest.raises(RGTGError, match=r"it is torch\.float32 on CUDA: use bfloat16"):
        Int4Linear(nn.Linear(32, 16).cuda())


def test_replayed_steps_of_a_rounded_reward_model_give_the_tokens_of_eager_ones(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    rm: Any = make_rm(**shape)
    rm.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows = []
    for graphs in (False, None):
        pair: Any = (make_lm(**shape), make_tokenizer())
        decoder = RewardGuidedDecoder.from_pretrained(
            pair,
            SequenceReward(str(tmp_path), weights="int4"),
            device="cuda",
            dtype="bfloat16",
            max_batch=3,
            graphs=graphs,
        )
        assert decoder.describe()["reward_quantization"] == "int4"
        rows.append([row.tokens for row in decoder.generate(prompts_of(5), 9, Guidance(5, temperature=0))])
    assert rows[0] == rows[1]
