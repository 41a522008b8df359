"""A folded checkpoint served by vLLM: the tokens of the decoder and of transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: bash tests/integrations/run vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from rgtg_fast import Guidance, RewardGuidedDecoder
from rgtg_fast.integrations.fold import export_folded
from tests.conftest import make_lm, make_tokenizer
from tests.models.adapters import write_adapter

PROMPTS = [[7, 12, 30, 9], [41, 8], [10, 11, 12, 13, 14, 15, 16], [20]]
TOKENS, BETA = 16, 1.5


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_serves_a_folded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    lm = make_lm(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    reward = f"farma:{write_adapter(tmp_path / 'reward', base, fork=2, seed=1, head=64)}"
    folded = export_folded(tmp_path / "lm", reward, BETA, tmp_path / "folded")

    decoder = RewardGuidedDecoder.from_pretrained(tmp_path / "lm", reward)
    rows = decoder.generate(PROMPTS, TOKENS, Guidance(beta=BETA, support="all", temperature=0))
    own = AutoModelForCausalLM.from_pretrained(folded)
    monkeypatch.undo()  # `poison` of tests/conftest.py: vLLM reads memory that it never writes
    llm = LLM(
        str(folded), dtype="float32", max_model_len=64, block_size=32, enforce_eager=True,
        generation_config="vllm", max_num_seqs=4,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=TOKENS)
    served = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], settings, use_tqdm=False)
    for prompt, row, answer in zip(PROMPTS, rows, served, strict=True):
        ids = torch.tensor([prompt])
        generated = own.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        assert list(answer.outputs[0].token_ids) == generated
        assert [token for token in generated if token != 1] == row.tokens
    unguided = RewardGuidedDecoder.from_pretrained(tmp_path / "lm").generate(
        PROMPTS, TOKENS, Guidance(temperature=0)
    )
    assert any(row.tokens != other.tokens for row, other in zip(rows, unguided, strict=True))
