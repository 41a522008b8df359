"""Compiled blocks: the same rows, no new compilation for a longer cache, and what cannot be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter

GREEDY = Guidance(k=3, beta=1.0, temperature=0)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: torch.compile has nothing to compile with"
)


def make_decoder(compile: bool) -> RewardGuidedDecoder:
    tokenizer = make_tokenizer()
    lm = make_lm()
    lm.generation_config.eos_token_id = []
    guide = SequenceReward((make_rm(num_hidden_layers=1), tokenizer))
    return RewardGuidedDecoder.from_pretrained(
        (lm, tokenizer), guide, max_batch=2, engine="transformers", compile=compile
    )


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_give_the_same_rows_and_serve_any_length() -> None:
    plain, compiled = make_decoder(compile=False), make_decoder(compile=True)
    assert compiled.describe()["compiled"]
    assert not plain.describe()["compiled"]
    prompts = [[5, 6, 7], [8, 9]]
    want = plain.generate(prompts, 6, GREEDY, trace=True)
    torch._dynamo.reset()
    counters.clear()
    got = compiled.generate(prompts, 6, GREEDY, trace=True)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2, "one for the base model's token, one for the candidates"
    assert [row.tokens for row in got] == [row.tokens for row in want]
    for a, b in zip(got, want, strict=True):
        assert a.rewards == pytest.approx(b.rewards, abs=1e-4)
    longer = compiled.generate(prompts, 20, GREEDY)
    assert [row.tokens[:6] for row in longer] == [row.tokens for row in want]
    assert counters["stats"]["unique_graphs"] == graphs, "a longer cache compiles nothing"


def test_what_cannot_be_compiled_is_said(tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(), make_lm()
    adapter = write_adapter(tmp_path / "guide", model, fork=1)
    with pytest.raises(RGTGError, match="an adapter shares the base model's forward"):
        RewardGuidedDecoder.from_pretrained(
            (model, tokenizer), SequenceReward(adapter), engine="transformers", compile=True
        )
    native = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer))
    if native.describe()["lm_engine"] != "native":
        pytest.skip("the C++ extension is missing: its refusal is NOT tested")
    with pytest.raises(RGTGError, match="use engine='transformers'"):
        native.compile()
