"""A GGUF file gives the model that it was written from, or is refused by the name of what cannot be taken over."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from rgtg_fast import RewardGuidedDecoder, RGTGError, SequenceReward, TextReward
from rgtg_fast.bundled import embedded
from rgtg_fast.models.gguf_tokenizer import save_tokenizer
from rgtg_fast.models.pretrained import read_pretrained
from tests.models import gguf_files
from tests.rewards import naive

gguf = pytest.importorskip("gguf")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path: Path, dtype: torch.dtype = torch.float32, head: bool = False) -> tuple[Any, Any]:
    kind = tf.AutoModelForSequenceClassification if head else tf.AutoModelForCausalLM
    model, tokenizer, _ = read_pretrained(kind, str(path), "language model", dtype)
    return model, tokenizer


def refusal(path: Path, head: bool = False) -> str:
    with pytest.raises(RGTGError) as error:
        load(path, head=head)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 93).view(2, 45)
    with torch.no_grad():
        return model(ids).logits


def divisors(model: Any) -> np.ndarray:
    """By how much Llama 3's rope divides the frequencies, as llama.cpp's converter computes it."""
    rope, dim = model.config.rope_parameters, model.config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    found = []
    for frequency in frequencies.tolist():
        wavelength = 2 * np.pi / frequency
        if wavelength < length / rope["high_freq_factor"]:
            found.append(1.0)
        elif wavelength > length / rope["low_freq_factor"]:
            found.append(factor)
        else:
            smooth = (length / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "wide heads": ("llama", {"head_dim": 32}, {}),
    "linear rope": (
        "llama",
        {"rope_parameters": LINEAR},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
    ),
    "qwen2": ("qwen2", {}, {}),
    "yarn": (
        "qwen2",
        {"rope_parameters": YARN},
        {
            "qwen2__rope__scaling__type": "yarn",
            "qwen2__rope__scaling__factor": 2.0,
            "qwen2__rope__scaling__original_context_length": 64,
        },
    ),
    "qwen3": ("qwen3", {}, {}),
    "gemma2": (
        "gemma2",
        {**GEMMA, "sliding_window": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
        {},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window": 8, "num_hidden_layers": 7}, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_model_is_the_one_that_was_written(case: str, tmp_path: Path) -> None:
    kind, settings, metadata = MODELS[case]
    model = gguf_files.tiny(kind, **settings)
    loaded, tokenizer = load(gguf_files.save(tmp_path / "m.gguf", model, **metadata))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert tokenizer("he a").input_ids == [259, 260]
    assert loaded.config._name_or_path == str(tmp_path / "m.gguf")


def test_llama_3s_rope_is_restored_from_its_divisors(tmp_path: Path) -> None:
    model = gguf_files.tiny(rope_parameters=LLAMA3, max_position_embeddings=16384)
    tensors, metadata = gguf_files.tensors_of(model), gguf_files.metadata_of(model)
    metadata |= gguf_files.tokenizer_metadata()
    tensors["rope_freqs.weight"] = divisors(model)
    assert len(set(tensors["rope_freqs.weight"].tolist())) > 1
    loaded, _ = load(gguf_files.write(tmp_path / "m.gguf", tensors, metadata, "llama"))
    assert loaded.config.rope_parameters == {**LLAMA3, "factor": 8.0}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"][::-1].copy()
    assert "not Llama 3's" in refusal(gguf_files.write(tmp_path / "n.gguf", tensors, metadata, "llama"))


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_quantized_weights_are_dequantized_exactly(kind: str, quantization: str, tmp_path: Path) -> None:
    model = gguf_files.tiny(kind)
    path = gguf_files.save(tmp_path / "m.gguf", model, quantization)
    loaded, _ = load(path)
    # The reference: every matrix quantized and dequantized in GGUF's layout, then read as if it were float32.
    stored = gguf.GGMLQuantizationType[quantization]
    rounded = {
        name: gguf.dequantize(gguf.quantize(x, stored), stored) if x.ndim > 1 else x
        for name, x in gguf_files.tensors_of(model).items()
    }
    metadata = {**gguf_files.metadata_of(model), **gguf_files.tokenizer_metadata()}
    plain, _ = load(gguf_files.write(tmp_path / "plain.gguf", rounded, metadata, kind))
    assert torch.equal(logits(loaded), logits(plain))
    half, _ = load(path, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, value in half.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name].bfloat16())


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_with_a_line(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gguf_files.save(tmp_path / "a model.gguf", gguf_files.tiny())
    load(path)
    assert "Converting a model.gguf once (0.0 GB as float32" in capsys.readouterr().err
    load(path)
    assert "Converting" not in capsys.readouterr().err
    assert len(list(cache.iterdir())) == 1
    gguf_files.save(path, gguf_files.tiny(seed=1))
    changed, _ = load(path)
    assert "Converting" in capsys.readouterr().err
    torch.testing.assert_close(logits(changed), logits(gguf_files.tiny(seed=1)), rtol=1e-5, atol=1e-5)


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rgtg_fast.models.gguf.save_file", fail)
    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny())
    with pytest.raises(RGTGError, match=r"No space left on device.*RGTG_CACHE"):
        load(path)
    assert list(cache.iterdir()) == []


def test_weights_that_do_not_fit_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny())
    monkeypatch.setattr("rgtg_fast.models.gguf.free_bytes", lambda device: 1000)
    assert "GiB are free" in refusal(path)


# ---- what is named --------------------------------------------------------------------------------------------------


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    model = gguf_files.tiny()
    gguf_files.save(tmp_path / "one.gguf", model)
    decoder = RewardGuidedDecoder.from_pretrained(str(tmp_path), device="cpu")
    torch.testing.assert_close(logits(load(tmp_path)[0]), logits(model), rtol=1e-5, atol=1e-5)
    assert decoder.tokenizer is not None
    gguf_files.save(tmp_path / "two.gguf", model)
    with pytest.raises(
        RGTGError, match=r"holds 2 GGUF files \('one.gguf', 'two.gguf'\): name one, as .*one.gguf"
    ):
        load(tmp_path)


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hub's own cache, where a download would have put the files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--me--tiny-GGUF", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    model = gguf_files.tiny()
    gguf_files.save(repository / "snapshots" / commit / "tiny-Q8_0.gguf", model)
    for name in ("me/tiny-GGUF", "me/tiny-GGUF/tiny-Q8_0.gguf"):
        loaded, _, _ = read_pretrained(tf.AutoModelForCausalLM, name, "language model", torch.float32)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
        assert loaded.config._name_or_path == name
    gguf_files.save(repository / "snapshots" / commit / "tiny-Q4_0.gguf", model)
    with pytest.raises(RGTGError, match=r"holds 2 GGUF files .*: name one, as me/tiny-GGUF/tiny-Q4_0.gguf"):
        read_pretrained(tf.AutoModelForCausalLM, "me/tiny-GGUF", "language model", torch.float32)


@pytest.mark.parametrize(
    "name", ["/nowhere/model.gguf", "./model.gguf", "nobody/nothing/model.gguf", "no.gguf"]
)
def test_a_file_that_does_not_exist(name: str) -> None:
    with pytest.raises(RGTGError, match=r"does not exist: check the path|check the name"):
        RewardGuidedDecoder.from_pretrained(name)


# ---- files that are refused ----------------------------------------------------------------------------------------


# What is changed in the metadata of a tiny Llama, and a part of the message.
METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown setting": ({"llama__attention__clamp_kqv": 2.0}, "llama.attention.clamp_kqv = 2.0"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count = 8"),
    "partial rope": ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count = 8"),
    "another scaling": (
        {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0},
        "by 'longrope'",
    ),
    "no epsilon": ({"llama__attention__layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_eps"),
    "heads by layer": ({"llama__attention__head_count_kv": [2, 1]}, "head_count_kv for each layer"),
    "both directions": ({"llama__attention__causal": False}, "both directions"),
    "a part": ({"split__count": 3}, "one part of a GGUF in 3 files"),
    "no tokenizer": ({"tokenizer__ggml__tokens": None}, "holds no tokenizer"),
    "another split": ({"tokenizer__ggml__pre": "viking"}, "by the rule 'viking'"),
    "another kind": ({"tokenizer__ggml__model": "rwkv"}, "of kind 'rwkv'"),
    "no special token": (
        {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None},
        "adds BOS",
    ),
    "more layers": ({"llama__block_count": 3}, "states 3 layers (llama.block_count) and holds 2"),
    "fewer layers": ({"llama__block_count": 1}, "states 1 layers (llama.block_count) and holds 2"),
    # Layers and widths that the reader would build and allocate before it compares them.
    "millions of layers": ({"llama__block_count": 2**31}, "states 2147483648 layers"),
    "other shapes": ({"llama__feed_forward_length": 64}, "other shapes"),
    "gigabytes of other shapes": ({"llama__feed_forward_length": 2**30}, "other shapes"),
    "no heads": ({"llama__attention__head_count": 0}, "ZeroDivisionError"),
    "heads that do not divide": ({"llama__attention__head_count": 3}, "not a multiple of the number of attention"),
    "a word for a number": ({"llama__context_length": "x"}, "'max_position_embeddings' expected int, got str"),
    "a word for the parts": ({"split__count": "x"}, "in x files"),
    "NaN": ({"llama__attention__layer_norm_rms_epsilon": math.nan}, "rms_epsilon = nan, which must be positive"),
    "infinity": ({"llama__rope__freq_base": math.inf}, "llama.rope.freq_base = inf, which must be positive"),
    "an id without a token": ({"tokenizer__ggml__eot_token_id": 999}, "eot_token_id = 999 and 261 tokens"),
    "padding without a token": ({"tokenizer__ggml__padding_token_id": 999}, "padding_token_id = 999 and 261"),
    "kinds of other tokens": ({"tokenizer__ggml__token_type": [3]}, "1 kinds of tokens"),
    "a word for a switch": ({"tokenizer__ggml__add_bos_token": "no"}, "add_bos_token = 'no', not true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_what_cannot_be_taken_over_is_refused_by_name(case: str, tmp_path: Path, cache: Path) -> None:
    changed, part = METADATA[case]
    assert part in refusal(gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny(), **changed))
    assert not cache.exists() or list(cache.iterdir()) == []


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "one is missing": (without("blk.1.ffn_up.weight"), "lacks 'blk.1.ffn_up.weight'"),
    "no embedding": (without("token_embd.weight"), "lacks token_embd.weight"),
    "one more": (
        lambda tensors: {**tensors, "blk.0.attn_sinks.weight": np.ones(4, np.float32)},
        "does not have: 'blk.0.attn_sinks.weight'",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_the_models(case: str, tmp_path: Path) -> None:
    change, part = TENSORS[case]
    model = gguf_files.tiny()
    metadata = {**gguf_files.metadata_of(model), **gguf_files.tokenizer_metadata()}
    path = gguf_files.write(tmp_path / "m.gguf", change(gguf_files.tensors_of(model)), metadata, "llama")
    assert part in refusal(path)


def test_an_architecture_that_is_not_read_names_those_that_are(tmp_path: Path) -> None:
    model = gguf_files.tiny()
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.tensors_of(model), {}, "rwkv7")
    assert "'rwkv7', and llama, qwen2, qwen3, gemma2, gemma3 are read" in refusal(path)


def test_a_gemma_2_of_the_first_converters_has_its_familys_window_and_caps(tmp_path: Path) -> None:
    keys = ("attention__sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    model = gguf_files.tiny("gemma2", tie_word_embeddings=True)
    path = gguf_files.save(
        tmp_path / "m.gguf", model, **dict.fromkeys((f"gemma2__{key}" for key in keys), None)
    )
    loaded, _, _ = read_pretrained(tf.AutoModelForCausalLM, path, "language model", torch.float32)
    config: Any = loaded.config
    assert (config.sliding_window, config.attn_logit_softcapping, config.final_logit_softcapping) == (
        4096,
        50,
        30,
    )


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rgtg_fast.models import gguf as module

    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny())
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    assert "needs accelerate: `pip install gguf accelerate`" in refusal(path)


# ---- reward models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_reward_models_head(kind: str, tmp_path: Path) -> None:
    model = gguf_files.tiny(kind, head=True)
    path = gguf_files.save(tmp_path / "rm.gguf", model, "F16")
    loaded, tokenizer = load(path, head=True)
    for name, value in model.state_dict().items():
        rounded = value.half().float() if value.ndim > 1 else value
        torch.testing.assert_close(loaded.state_dict()[name], rounded, rtol=0, atol=0)
    lm = gguf_files.save(tmp_path / "lm.gguf", gguf_files.tiny(kind, seed=3))
    for reward in (SequenceReward(str(path)), TextReward(str(path), template="{prompt}{answer}")):
        decoder = RewardGuidedDecoder.from_pretrained(str(lm), reward=reward, device="cpu")
        ([found],) = decoder.score(["he a"], [[260]])
        assert found == pytest.approx(naive.scalar(loaded, [*tokenizer("he a").input_ids, 260]), abs=1e-4)
    assert "is a reward model" in refusal(path)
    with pytest.raises(
        RGTGError, match=r"lm.gguf has 2 labels .*saved as .*CausalLM, which has no reward head"
    ):
        RewardGuidedDecoder.from_pretrained(str(lm), reward=str(lm), device="cpu")


def test_heads_that_are_refused(tmp_path: Path) -> None:
    model = gguf_files.tiny(head=True)
    pooled = gguf_files.save(tmp_path / "mean.gguf", model, llama__pooling_type=1)
    assert "pools a text by 'mean'" in refusal(pooled, head=True)
    named = gguf_files.save(tmp_path / "two.gguf", model, llama__classifier__output_labels=["yes", "no"])
    assert "names 2 labels and its head has 1" in refusal(named, head=True)
    metadata = {**gguf_files.metadata_of(model), **gguf_files.tokenizer_metadata()}
    tensors = {**gguf_files.tensors_of(model), "cls.weight": np.ones((64, 64), np.float32)}
    assert "a head of two layers ('cls.weight')" in refusal(
        gguf_files.write(tmp_path / "mlp.gguf", tensors, metadata, "llama"), head=True
    )


# ---- the tokenizer -------------------------------------------------------------------------------------------------


def spm() -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp's converter writes it."""
    words = ["▁he", "he", "▁", "h", "e", "a", "▁a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    size = len(tokens)
    return {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__pre": None,
        "tokenizer__ggml__merges": None,
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * (size - 259),
        "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__ggml__padding_token_id": None,
        "tokenizer__ggml__add_bos_token": None,
    }


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    settings = spm()
    model = gguf_files.tiny(vocab_size=len(settings["tokenizer__ggml__tokens"]))
    _, tokenizer = load(gguf_files.save(tmp_path / "m.gguf", model, **settings))
    assert tokenizer.convert_ids_to_tokens(tokenizer("he a").input_ids) == ["<s>", "▁he", "▁a"]
    assert tokenizer.decode(tokenizer("he a").input_ids, skip_special_tokens=True) == "he a"
    settings["tokenizer__ggml__add_space_prefix"] = False
    assert "add_space_prefix" in refusal(gguf_files.save(tmp_path / "n.gguf", model, **settings))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_ends_of_texts_and_the_template_are_the_files(bos: bool, eos: bool, tmp_path: Path) -> None:
    ends: dict[str, Any] = {"tokenizer__ggml__add_bos_token": bos, "tokenizer__ggml__add_eos_token": eos}
    model, tokenizer = load(gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny(), **ends))
    assert tokenizer("he").input_ids == [*[1] * bos, 259, *[2] * eos]
    assert tokenizer.chat_template == gguf_files.TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert (tokenizer.unk_token, len(tokenizer)) == (None, 261)
    assert model.generation_config.eos_token_id == 2


def test_a_turns_end_ends_an_answer_too(tmp_path: Path) -> None:
    model, _ = load(gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny(), tokenizer__ggml__eot_token_id=7))
    assert model.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_splits_of_texts(pre: str, tmp_path: Path) -> None:
    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny(), tokenizer__ggml__pre=pre)
    _, tokenizer = load(path)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 12345")]
    split = {
        "llama-bpe": ["ab", "Ġ", "123", "45"],
        "qwen2": ["ab", "Ġ", *"12345"],
        "smollm": ["ab", "Ġ", *"12345"],
    }
    assert pieces == split[pre]


def test_control_tokens_beyond_the_bytes(tmp_path: Path) -> None:
    tokens = [*gguf_files.byte_tokens(), "<｜User｜>", "日本"]
    types = [3] * 3 + [1] * (len(tokens) - 5) + [3, 3]
    path = gguf_files.save(
        tmp_path / "m.gguf",
        gguf_files.tiny(vocab_size=len(tokens)),
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=types,
    )
    _, tokenizer = load(path)
    assert tokenizer("he<｜User｜> a").input_ids == [259, 261, 260]
    assert tokenizer.decode([261]) == "<｜User｜>"
    assert len(tokenizer) == len(tokens)


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny(vocab_size=100))
    with pytest.raises(RGTGError, match="261 tokens and embeddings for 100"):
        save_tokenizer(path, gguf_files.tokenizer_metadata(), 100, tmp_path, "it")


# ---- a real file ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_bit_for_bit(smollm2: Path) -> None:
    weights = embedded.weights_file()
    assert weights is not None
    ours, tokenizer = load(weights)
    theirs, reference, _ = read_pretrained(tf.AutoModelForCausalLM, smollm2, "language model", torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for text in ("It's 12 345 o'clock, b7!", "  two\n\n\tx", "<|im_start|>user\nhi<|im_end|>", "日本 été"):
        assert tokenizer(text).input_ids == reference(text).input_ids
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.eos_token_id == reference.eos_token_id
