"""Quantized weights are served by their own modules, exactly, and never cast, merged, fused or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rgtg_fast import FunctionReward, Guidance, RewardGuidedDecoder, RGTGError, SequenceReward, TextReward
from rgtg_fast.evaluation.inspection import inspect_decoder
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.fused_projections import fuse_projections
from rgtg_fast.models.quantized import quantization
from rgtg_fast.training.model import load_base
from rgtg_fast.training.vocabulary import load_causal
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models import quantized_models
from tests.models.adapters import write_adapter
from tests.rewards import naive

PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [20, 21, 22]]
GREEDY = Guidance(k=1, beta=0.0, temperature=0.0)
# What transformers calls the methods.
NAMES = {
    "bitsandbytes 4-bit": "bitsandbytes",
    "torchao int8": "torchao",
    "compressed-tensors 4-bit": "compressed-tensors",
}


@pytest.fixture(params=quantized_models.METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if (package := quantized_models.missing(name)) is not None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    return name


def own_answer(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens by the model's own uncached forward."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(naive.logits_after(model, ids).argmax()))
    return ids[len(prompt) :]


def test_a_saved_language_model_is_served_exactly(method: str, tmp_path: Path) -> None:
    folder = quantized_models.saved(tmp_path, method)
    decoder = RewardGuidedDecoder.from_pretrained(str(folder), device="cpu")
    described = decoder.describe()
    assert described["lm_engine"] == "transformers"
    assert described["lm_quantization"] == NAMES[method]
    runner = decoder.lm.runner
    model = quantized_models.quantized(tmp_path, method)
    with torch.inference_mode():
        runner.reserve(len(PROMPTS), 16)
        for slot, prompt in enumerate(PROMPTS):
            runner.prefill(slot, prompt[:-1])
        runner.step(torch.tensor([[prompt[-1]] for prompt in PROMPTS]))
        states = runner.logits(runner.stepped[:, 0, 0])
        own = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(states, own, rtol=1e-4, atol=1e-4)


def test_answers_are_the_models_own(method: str, tmp_path: Path) -> None:
    model = quantized_models.quantized(tmp_path, method)
    decoder = RewardGuidedDecoder.from_pretrained((model, make_tokenizer()))
    rows = decoder.generate(PROMPTS, max_new_tokens=5, guidance=GREEDY)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        own = own_answer(model, prompt, 5)
        assert row.tokens == own[: len(row.tokens)]
        assert len(row.tokens) == 5 or own[len(row.tokens)] == 1


def test_a_quantized_reward_model(method: str, tmp_path: Path) -> None:
    folder = quantized_models.saved(tmp_path, method, head=True)
    lm = (make_lm(**quantized_models.SIZES), make_tokenizer())
    model = quantized_models.quantized(tmp_path, method, head=True)
    decoder = RewardGuidedDecoder.from_pretrained(lm, reward=SequenceReward(str(folder)))
    assert decoder.describe()["reward_quantization"] == NAMES[method]
    [scores] = decoder.score([PROMPTS[0]], [[9, 10, 11]])
    with torch.no_grad():
        # compressed-tensors unpacks its weights in the model's first forward.
        model(torch.tensor([PROMPTS[0]]))
        trunk = model.base_model(torch.tensor([PROMPTS[0] + [9, 10, 11]])).last_hidden_state
        own = model.score(trunk)[0, -3:, 0]
    torch.testing.assert_close(torch.tensor(scores), own.float(), rtol=1e-4, atol=1e-4)
    text = RewardGuidedDecoder.from_pretrained(lm, reward=TextReward(str(folder)))
    assert len(text.generate(["w1 w2"], max_new_tokens=2)) == 1
    assert text.describe()["reward_quantization"] == NAMES[method]


def test_a_dtype_and_an_engine_that_cannot_be(method: str, tmp_path: Path) -> None:
    model = quantized_models.quantized(tmp_path, method)
    pair = (model, make_tokenizer())
    with pytest.raises(RGTGError, match=r"is quantized .* not cast to bfloat16: leave out dtype"):
        RewardGuidedDecoder.from_pretrained(pair, dtype="bfloat16")
    with pytest.raises(RGTGError, match=r"engine='native' cannot run .*: its weights are quantized"):
        RewardGuidedDecoder.from_pretrained(pair, engine="native")
    reward = (quantized_models.quantized(tmp_path, method, head=True), make_tokenizer())
    lm = (make_lm(**quantized_models.SIZES), make_tokenizer())
    with pytest.raises(RGTGError, match="not cast to float64"):
        RewardGuidedDecoder.from_pretrained(lm, reward=SequenceReward(reward), dtype="float64")


def test_a_folder_keeps_its_dtype(method: str, tmp_path: Path) -> None:
    folder = quantized_models.saved(tmp_path, method, dtype=torch.bfloat16)
    decoder = RewardGuidedDecoder.from_pretrained(str(folder), device="cpu")
    assert decoder.describe()["dtype"] == "bfloat16"
    assert len(decoder.generate([PROMPTS[0]], max_new_tokens=2)) == 1
    with pytest.raises(RGTGError, match="for bfloat16 and is not cast to float32: leave out dtype"):
        RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["bitsandbytes 8-bit", "torchao activations"])
def test_quantized_activations_are_refused(name: str, tmp_path: Path) -> None:
    if (package := quantized_models.missing(name)) is not None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    model = quantized_models.quantized(tmp_path, name)
    with pytest.raises(RGTGError, match="may quantize its activations too: quantize the weights alone"):
        RewardGuidedDecoder.from_pretrained((model, make_tokenizer()))


def test_adapters_and_training(method: str, tmp_path: Path) -> None:
    model = quantized_models.quantized(tmp_path, method)
    base: Any = make_lm(**quantized_models.SIZES)
    write_adapter(tmp_path / "adapter", base)
    adapter = Adapter.load(str(tmp_path / "adapter"))
    with pytest.raises(
        RGTGError, match=r"quantized weights .* which cannot have an adapter merged into them"
    ):
        adapter.merged(model)
    assert "are quantized" in str(adapter.base_mismatch(model))
    with pytest.raises(RGTGError, match="are quantized"):
        RewardGuidedDecoder.from_pretrained((model, make_tokenizer()), reward=str(tmp_path / "adapter"))
    with pytest.raises(RGTGError, match="cannot be trained"):
        load_causal(quantized_models.saved(tmp_path, method))
    reward = quantized_models.quantized(tmp_path, method, head=True)
    with pytest.raises(RGTGError, match="cannot be trained"):
        load_base((reward, make_tokenizer()))
    assert fuse_projections(model) == 0


# ---- without the packages ------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear layer with weights in 4 bits, as GPTQ's modules hold them, in a buffer of 32-bit integers."""

    qweight: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        rows = linear.weight.detach()
        self.scale = float(rows.abs().max()) / 7
        signed = (rows / self.scale).round().clamp(-8, 7).int() + 8
        shifts = torch.arange(8) * 4
        self.register_buffer("qweight", (signed.view(len(rows), -1, 8) << shifts).sum(-1, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(8) * 4
        signed = (self.qweight[..., None] >> shifts & 15).flatten(1) - 8
        return nn.functional.linear(x, signed.to(x.dtype) * self.scale)


def packed(model: Any) -> Any:
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            model.base_model.set_submodule(name, Packed(module))
    return model


def test_modules_of_other_packages() -> None:
    model = packed(make_lm())
    decoder = RewardGuidedDecoder.from_pretrained((model, make_tokenizer()), reward=FunctionReward(zeros))
    assert decoder.describe()["lm_quantization"] == "int32"
    assert decoder.describe()["lm_engine"] == "transformers"
    (facts,) = inspect_decoder(decoder, PROMPTS[0])["models"]
    assert (facts["quantization"], facts["why"]) == ("int32", "its weights are quantized (int32)")
    for row, prompt in zip(decoder.generate(PROMPTS, 4, GREEDY), PROMPTS, strict=True):
        assert row.tokens == own_answer(model, prompt, 4)[: len(row.tokens)]
    with pytest.raises(RGTGError, match=r"is quantized \(int32\).*not cast to bfloat16"):
        RewardGuidedDecoder.from_pretrained((model, make_tokenizer()), dtype="bfloat16")
    with pytest.raises(RGTGError, match="cannot be trained"):
        load_base((packed(make_rm()), make_tokenizer()))


def zeros(prefix: Any, candidates: Any) -> Any:
    return torch.zeros(len(candidates), len(candidates[0]))


def test_plain_models_are_not_quantized() -> None:
    for model in (make_lm(), make_rm(), make_lm(dtype=torch.bfloat16)):
        assert quantization(model) is None


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("optimum", {"quant_method": "gptq", "bits": 4}),
        ("gptqmodel", {"quant_method": "awq", "bits": 4, "version": "gemm"}),
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
    ],
)
def test_a_package_that_is_missing_is_named(package: str, settings: dict[str, Any], tmp_path: Path) -> None:
    if quantized_models.missing(package) is None:
        pytest.skip(f"{package} is installed")
    folder = quantized_models.claimed(tmp_path, **settings)
    with pytest.raises(RGTGError, match=f"needs a package that is missing.*{package}") as error:
        RewardGuidedDecoder.from_pretrained(str(folder), device="cpu")
    assert "\n" not in str(error.value)
