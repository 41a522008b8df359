"""Head-only rewards inside vLLM, with guidance per request: the tokens of the decoder."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: bash tests/integrations/run vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError
from rgtg_fast.integrations.vllm_head import WORKER, HeadRewardGuide
from tests.conftest import make_lm, make_tokenizer
from tests.models.adapters import write_adapter

TOKENS = 12
ASKED: list[dict[str, Any]] = [
    {},
    {"rgtg": 0},
    {"rgtg_beta": 0.5, "rgtg_support": "all"},
    {"rgtg_beta": 3.0, "rgtg_k": 3},
    {"rgtg_support": "combined", "rgtg_k": 4, "rgtg_beta": 2},
    {"rgtg_beta": -1, "rgtg_support": "all"},
    {"rgtg_beta": 0.5, "rgtg_k": 100},  # more than there are tokens
    {"rgtg": "false"},
]


def test_every_request_has_its_own_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # `poison` of tests/conftest.py: vLLM reads memory that it never writes
    lm = make_lm(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    lm.save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    reward = f"farma:{write_adapter(tmp_path / 'reward', base, fork=2, seed=1, head=64)}"
    monkeypatch.setenv("RGTG_FAST_REWARD", reward)
    llm = LLM(
        str(tmp_path / "lm"), dtype="float32", max_model_len=128, block_size=32, enforce_eager=True,
        generation_config="vllm", worker_cls=WORKER, enable_chunked_prefill=True, max_num_batched_tokens=16,
        max_num_seqs=3, logits_processors=["rgtg_fast.integrations.vllm_head:HeadRewardGuide"],
    )  # fmt: skip
    # Prompts of several chunks, and more requests than run at once.
    prompts = [[6 + (7 * i + 11 * j) % 58 for j in range(3 + 9 * i)] for i in range(len(ASKED))]
    settings = [
        SamplingParams(
            temperature=0, max_tokens=TOKENS, extra_args=asked or None, prompt_logprobs=None if i else 1
        )
        for i, asked in enumerate(ASKED)
    ]
    served = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    decoder = RewardGuidedDecoder.from_pretrained(tmp_path / "lm", reward)
    plain = RewardGuidedDecoder.from_pretrained(tmp_path / "lm")
    guided = 0
    for prompt, asked, answer in zip(prompts, ASKED, served, strict=True):
        changes = {name.removeprefix("rgtg_"): value for name, value in asked.items() if name != "rgtg"}
        changes["k"] = min(changes.get("k", 10), 64)
        (alone,) = plain.generate([prompt], TOKENS, Guidance(temperature=0))
        (row,) = decoder.generate([prompt], TOKENS, Guidance(**{"temperature": 0, **changes}))
        own = [token for token in answer.outputs[0].token_ids if token != 1]
        assert own == (alone if "rgtg" in asked else row).tokens
        guided += own != alone.tokens
    assert guided >= 4
    for bad in ({"rgtg_beta": "x"}, {"rgtg_k": 0}, {"rgtg_weights": [1]}, {"rgtg_bets": 1}):
        with pytest.raises(VLLMValidationError, match=r"rgtg_|weights is not served"):
            llm.generate([{"prompt_token_ids": [7]}], SamplingParams(extra_args=bad), use_tqdm=False)
    beam = SamplingParams(max_tokens=1, logprobs=4, detokenize=False)
    with pytest.raises(
        VLLMValidationError, match="beam search ranks by log-probabilities without the reward"
    ):
        llm.generate([{"prompt_token_ids": [7]}], beam, use_tqdm=False)
    (again,) = llm.generate([{"prompt_token_ids": prompts[0]}], settings[0], use_tqdm=False)
    assert again.outputs[0].token_ids == served[0].outputs[0].token_ids


def guide(worker: str) -> HeadRewardGuide:
    parallel = SimpleNamespace(pipeline_parallel_size=1, worker_cls=worker)
    config = SimpleNamespace(speculative_config=None, parallel_config=parallel, model_config=None)
    return HeadRewardGuide(config, torch.device("cpu"), False)


def test_another_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGTG_FAST_REWARD", "farma:some/folder")
    with pytest.raises(RGTGError, match=f"add --worker-cls {WORKER}"):
        guide("vllm.v1.worker.cpu_worker.CPUWorker")


def test_what_only_the_engine_refuses_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front end reads the settings again, whose file may have changed: it let k=500 through."""
    monkeypatch.setenv("RGTG_FAST_REWARD", "farma:some/folder")
    made = guide(WORKER)
    made._weight, made._bias, made._states = torch.randn(64, 8), torch.zeros(64), torch.randn(3, 8)
    params, large = SamplingParams(), SamplingParams(stop_token_ids=[5], extra_args={"rgtg_k": 500})
    added = [(0, params, [7], []), (1, large, [7], []), (2, SamplingParams(extra_args={"rgtg": 0}), [7], [])]
    made.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))
    logits = torch.randn(3, 64)
    out = made.apply(logits.clone())
    assert out[0].isfinite().sum() == 10
    assert out[1].isfinite().nonzero().flatten().tolist() == [5]
    assert torch.equal(out[2], logits[2])
