"""Tiny models, tokenizers and folders that tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers are as many as there are cores to use.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils._device import _device_constructors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", *(f"w{i}" for i in range(58))]


def tiny_config(vocab_size: int = 64, **settings: object) -> LlamaConfig:
    """A Llama small enough for a millisecond a forward; token 1 ends a text."""
    return LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "initializer_range": 0.4,  # wide, so that distributions are not flat
            **settings,
        }
    )


def make_lm(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(**settings)).to(dtype).eval()


def make_rm(seed: int = 1, dtype: torch.dtype = torch.float32, **settings: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = tiny_config(**{"num_labels": 1, **settings})
    return AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def make_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, words: list[str] = WORDS
) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def lm() -> torch.nn.Module:
    return make_lm()


@pytest.fixture
def rm() -> torch.nn.Module:
    return make_rm()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


_empty = torch.empty
# torch remembers which functions `torch.device("meta")` is about when it is first asked: not the one that stands in.
_device_constructors()


def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
    """torch.empty, but of NaN."""
    out = _empty(*args, **kwargs)
    return out.fill_(torch.nan) if out.is_floating_point() and out.device.type != "meta" else out


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty is NaN, so that a test notices a read of what nothing wrote."""
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session", autouse=True)
def no_probe() -> Iterator[None]:
    """The machine that a benchmark names: torch's libraries are not asked, which takes a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rgtg_fast.bench.roofline.torch_products", lambda: "bf16 some; fp32 some")
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted into the cache at the first use."""
    from rgtg_fast.bundled import default_model
    from rgtg_fast.errors import RGTGError

    try:
        return Path(default_model())
    except RGTGError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not installed: {error}")


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Conversions of GGUF files, and the code of models that transformers copies, go to folders of this test alone."""
    modules = str(tmp_path / "modules")
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    _forget_code_of_models()
    yield tmp_path
    _forget_code_of_models()


def _forget_code_of_models() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
