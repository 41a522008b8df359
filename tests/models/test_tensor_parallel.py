"""What a base model that is spread over several processes cannot be, in one line each.

Two real processes decode with one in tests/cli/test_processes.py.
"""

from typing import Any

import pytest
import torch
from transformers import GPT2Config

from rgtg_fast import RewardGuidedDecoder, SequenceReward
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.tensor_parallel import loader_arguments
from tests.conftest import make_lm, make_rm, make_tokenizer, tiny_config
from tests.models.adapters import write_adapter


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "in a single process: start the program with torchrun"),
        ({"tp_plan": "other"}, "tp_plan='other' is unknown"),
        ({"engine": "native"}, "engine='native': a model in several processes"),
        ({"lm": (make_lm(), make_tokenizer())}, "a model that is loaded already: pass its path"),
    ],
    ids=["one process", "plan", "engine", "pair"],
)
def test_what_a_plan_needs(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RGTGError, match=said):
        RewardGuidedDecoder.from_pretrained(**({"lm": "some/path", "tp_plan": "auto"} | settings))


@pytest.mark.parametrize(
    ("config", "count", "said"),
    [
        (tiny_config(), 3, "num_attention_heads=4 is not a multiple of 3"),
        (tiny_config(), 4, "num_key_value_heads=2 is not a multiple of 4"),
        (tiny_config(quantization_config={"quant_method": "fp8"}), 2, "its weights are quantized"),
        (GPT2Config(), 2, "transformers has no tensor-parallel plan for gpt2"),
    ],
    ids=["heads", "key heads", "quantized", "no plan"],
)
def test_models_that_cannot_be_spread(
    config: Any, count: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(RGTGError, match=rf"a model cannot be spread over {count} processes .*: {said}"):
        loader_arguments("auto", config, "a model")


def test_what_a_spread_model_does_not_have() -> None:
    tokenizer, reward = make_tokenizer(), (make_rm(), make_tokenizer())

    def decoder(reward: Any, **settings: Any) -> RewardGuidedDecoder:
        lm: Any = make_lm()
        lm._tp_size = 2
        return RewardGuidedDecoder.from_pretrained((lm, tokenizer), reward, **settings)

    for name in ("graphs", "compile", "fuse_projections"):
        with pytest.raises(RGTGError, match=f"{name}=True and a model that is spread"):
            decoder(reward, **{name: True})
    with pytest.raises(
        RGTGError, match=r"engine='native' cannot run LlamaForCausalLM: its weights are spread"
    ):
        decoder(reward, engine="native")


def test_an_adapter_has_no_rows_in_a_spread_model(tmp_path: Any) -> None:
    lm: Any = make_lm()
    decoder = RewardGuidedDecoder.from_pretrained((lm, make_tokenizer()))
    folder = write_adapter(tmp_path, lm)
    lm._tp_size = 2
    with pytest.raises(RGTGError, match=r"is an adapter and the base model is spread over 2 processes"):
        SequenceReward(str(folder)).bind(decoder.lm, dtype=torch.float32, engine="auto", max_length=None)
