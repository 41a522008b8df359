"""A model has exactly the weights of its files, or is refused in one line that names the key or the file."""

from __future__ import annotations

import ast
import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from rgtg_fast import RewardGuidedDecoder, RGTGError
from rgtg_fast.models import pretrained
from rgtg_fast.models.pretrained import read_pretrained, read_tokenizer
from rgtg_fast.training.model import load_base
from rgtg_fast.training.vocabulary import load_causal
from tests.conftest import make_lm, make_rm, make_tokenizer

PACKAGE = Path(__file__).parents[2] / "rgtg_fast"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a language model, one with tied embeddings, and a reward model."""
    root = tmp_path_factory.mktemp("saved")
    for name, model in (
        ("lm", make_lm()),
        ("tied", make_lm(tie_word_embeddings=True)),
        ("rm", make_rm()),
        ("rm-tied", make_rm(tie_word_embeddings=True)),
    ):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


def copied(saved: Path, name: str, target: Path) -> Path:
    return Path(shutil.copytree(saved / name, target / name))


def edited(saved: Path, name: str, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    folder = copied(saved, name, target)
    file = folder / "model.safetensors"
    tensors = {key: x.clone().contiguous() for key, x in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def configured(saved: Path, name: str, target: Path, **settings: Any) -> Path:
    folder = copied(saved, name, target)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def refusal(folder: object, kind: Any = tf.AutoModelForCausalLM) -> str:
    with pytest.raises(RGTGError) as error:
        read_pretrained(kind, folder, "language model", torch.float32)  # pyright: ignore[reportArgumentType]
    message = str(error.value)
    assert "\n" not in message
    assert "\x1b" not in message
    return message


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x for key, x in tensors.items() if part not in key}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new, 1) if old else new + key: x for key, x in tensors.items()}


def added(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{key.replace("__", "."): x for key, x in more.items()}}


# The model, the change to its weight file, a name in the message, and the reason in the message.
KEYS: dict[str, tuple[str, Callable[[Tensors], Tensors], str, str]] = {
    "a layer's part": ("lm", without("layers.1.mlp"), "model.layers.1.mlp.down_proj.weight", "lacks weights"),
    "a whole layer": ("lm", without("layers.1."), "model.layers.1.input_layernorm.weight", "lacks weights"),
    "the embedding": ("tied", without("embed_tokens"), "model.embed_tokens.weight", "lacks weights"),
    "the head": ("lm", without("lm_head"), "lm_head.weight", "no trained vocabulary head"),
    "compiled": ("lm", renamed("", "_orig_mod."), "_orig_mod.lm_head.weight", "save model._orig_mod"),
    "distributed": ("lm", renamed("", "module."), "module.lm_head.weight", "save model.module"),
    "sharded": ("lm", renamed("", "_fsdp_wrapped_module."), "_fsdp_wrapped_module.", "full state dict"),
    "wrapped": ("lm", renamed("", "net."), "net.lm_head.weight", "'net.' before those of the model"),
    "another trunk": (
        "lm",
        renamed("model.", "decoder."),
        "decoder.layers.0",
        "'decoder.' where the model has",
    ),
    "unmerged": (
        "lm",
        added(model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(2, 32)),
        "lora_A",
        "not merged",
    ),
    "biases": (
        "lm",
        added(model__layers__0__mlp__up_proj__bias=torch.ones(48)),
        "up_proj.bias",
        "does not have",
    ),
    "quantized": ("lm", renamed("up_proj.weight", "up_proj.qweight"), "qweight", "quantized"),
    "a head of TRL": ("lm", added(v_head__summary__weight=torch.ones(1, 32)), "v_head", "is a reward model"),
    "a terminal's": ("lm", added(**{"\x1b[31mred\n": torch.ones(1)}), "red", "does not have"),
    "a reward model": ("rm", lambda tensors: tensors, "score.weight", "is a reward model"),
    "a tied one": ("rm-tied", lambda tensors: tensors, "score.weight", "is a reward model"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_differ_are_refused_with_the_reason(case: str, saved: Path, tmp_path: Path) -> None:
    source, change, name, reason = KEYS[case]
    message = refusal(edited(saved, source, tmp_path, change))
    assert name in message
    assert reason in message
    assert str(tmp_path / source) in message


REWARD_KEYS: dict[str, tuple[str, Callable[[Tensors], Tensors], str, str]] = {
    "a layer's part": ("rm", without("layers.1.mlp"), "model.layers.1.mlp", "lacks weights"),
    "another prefix": ("rm", renamed("model.", "base_model.model."), "base_model.", "'base_model.' before"),
    "a bias": ("rm", added(score__bias=torch.ones(1)), "score.bias", "another reward head"),
    "OpenRLHF's": ("rm", renamed("score.", "value_head."), "value_head.weight", "another reward head"),
    "two labels": ("rm", added(score__weight=torch.ones(2, 32)), "score.weight", "head of 2 labels"),
    "a language model": ("lm", lambda tensors: tensors, "score.weight", "no trained reward head"),
}


@pytest.mark.parametrize("case", REWARD_KEYS)
def test_a_reward_models_keys_that_differ(case: str, saved: Path, tmp_path: Path) -> None:
    source, change, name, reason = REWARD_KEYS[case]
    folder = edited(saved, source, tmp_path, change)
    file = folder / "config.json"
    one = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **one}))
    message = refusal(folder, tf.AutoModelForSequenceClassification)
    assert name in message
    assert reason in message


def test_a_vocabulary_head_beside_a_reward_head_is_no_part_of_the_score(saved: Path, tmp_path: Path) -> None:
    folder = edited(saved, "rm", tmp_path, added(lm_head__weight=torch.ones(64, 32)))
    model, _, _ = read_pretrained(
        tf.AutoModelForSequenceClassification, folder, "reward model", torch.float32
    )
    torch.testing.assert_close(model.get_submodule("score").weight, make_rm().score.weight, rtol=0, atol=0)


def test_every_way_to_load_refuses_missing_weights(saved: Path, tmp_path: Path) -> None:
    lm = (make_lm(), make_tokenizer())
    part = str(edited(saved, "lm", tmp_path, without("layers.1.mlp")))
    reward = str(edited(saved, "rm", tmp_path, without("layers.1.mlp")))
    ways: list[Callable[[], object]] = [
        lambda: RewardGuidedDecoder.from_pretrained(part),
        *(
            lambda name=name: RewardGuidedDecoder.from_pretrained(lm, reward=name)
            for name in (reward, f"text:{reward}", f"rad:{reward}", f"farma:{part}", f"genarm:{part}")
        ),
        lambda: RewardGuidedDecoder.from_pretrained(lm, reward=f"eft:{saved / 'lm'},{part}"),
        lambda: load_base(part),
        lambda: load_base(reward),
        lambda: load_causal(part),
        lambda: load_causal(part, new_head=True),
    ]
    for way in ways:
        with pytest.raises(RGTGError, match="lacks weights, which would be random"):
            way()


def test_computed_buffers_in_files_are_ignored(saved: Path, tmp_path: Path) -> None:
    more = {
        "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4),
        "model__position_ids": torch.arange(8),
    }
    folder = edited(saved, "lm", tmp_path, added(**more))
    model, _, _ = read_pretrained(tf.AutoModelForCausalLM, folder, "language model", torch.float32)
    for name, value in tf.AutoModelForCausalLM.from_pretrained(saved / "lm").state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_masks_in_older_files_are_ignored(family: str, tmp_path: Path) -> None:
    config: tf.PretrainedConfig = (
        tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8)
        if family == "gpt2"
        else tf.GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
            max_position_embeddings=8,
        )
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    make_tokenizer().save_pretrained(tmp_path / family)
    inner = "transformer.h.0.attn." + ("attention." if family == "gpt_neo" else "")
    masks = {f"{inner}bias": torch.ones(1, 1, 8, 8).bool(), f"{inner}masked_bias": torch.tensor(-1e4)}
    (tmp_path / "to").mkdir()
    folder = edited(tmp_path, family, tmp_path / "to", lambda tensors: {**tensors, **masks})
    read_pretrained(tf.AutoModelForCausalLM, folder, "language model", torch.float32)


def test_tied_embeddings_need_no_head_of_their_own(saved: Path) -> None:
    model, _, _ = read_pretrained(tf.AutoModelForCausalLM, saved / "tied", "language model", torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_new_head_is_reported_and_starts_at_0(saved: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("lm", "tied"):
        model, _ = load_base(saved / name, progress=said.append)
        assert not model.get_submodule("score").weight.any()
    assert len(said) == 2
    assert "no reward head" in said[0]
    model, _ = load_base(saved / "rm", progress=said.append)
    assert len(said) == 2
    torch.testing.assert_close(model.get_submodule("score").weight, make_rm().score.weight, rtol=0, atol=0)
    model, _ = load_causal(saved / "tied", new_head=True)
    assert not model.get_output_embeddings().weight.any()
    other = edited(saved, "lm", tmp_path, added(v_head__weight=torch.ones(1, 32)))
    with pytest.raises(RGTGError, match=r"v_head\.weight"):
        load_base(other)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
)
@pytest.mark.parametrize(("content", "reason"), [(POINTER, "Git LFS"), (b"", "empty"), (b"{bad", "")])
def test_files_without_content(name: str, content: bytes, reason: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "lm", tmp_path)
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert f"its {name}" in message
    assert reason in message


def test_a_chat_template_that_is_a_pointer(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "lm", tmp_path)
    (folder / "chat_template.jinja").write_bytes(POINTER)
    assert "chat_template.jinja is a Git LFS pointer" in refusal(folder)


@pytest.mark.parametrize("kept", [4, 8, 100, 3000, -1])
def test_truncated_weights(kept: int, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "lm", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(folder)
    assert "model.safetensors" in message
    assert "cut off" in message


def test_flipped_bits_of_a_header(saved: Path, tmp_path: Path) -> None:
    """Each is refused, or changes no weight."""
    folder = copied(saved, "lm", tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    last = 8 + int.from_bytes(whole[:8], "little")
    own = tf.AutoModelForCausalLM.from_pretrained(saved / "lm").state_dict()
    for place in range(0, last, last // 40):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            model, _, _ = read_pretrained(tf.AutoModelForCausalLM, folder, "language model", torch.float32)
        except RGTGError:
            continue
        assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no model_type": ({"model_type": None}, "names no model_type"),
    "an unknown one": ({"model_type": "evilmodel"}, "of a family that is not supported"),
    "another vocabulary": ({"vocab_size": 70}, "[64, 32] in its files and [70, 32]"),
    "fewer layers": ({"num_hidden_layers": 1}, "holds 2 layers and its config.json says num_hidden_layers=1"),
    "untied": ({"num_key_value_heads": 4}, "[16, 32] in its files and [32, 32]"),
    "a negative size": ({"hidden_size": -1}, "hidden size (-1)"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "needs a package"),
    "awq": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        "needs a package",
    ),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "needs a package",
    ),
    "an unknown method": ({"quantization_config": {"quant_method": "nonsense"}}, "quantized by a method"),
    "no method": ({"quantization_config": {"bits": 4}}, "quant_method"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_do_not_fit(case: str, saved: Path, tmp_path: Path) -> None:
    settings, reason = CONFIGS[case]
    assert reason in refusal(configured(saved, "lm", tmp_path, **settings))


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn"])
def test_attention_kernels_in_a_configuration_are_not_downloaded(
    attention: str, saved: Path, tmp_path: Path
) -> None:
    folder = configured(saved, "lm", tmp_path, attn_implementation=attention)
    model, _, _ = read_pretrained(tf.AutoModelForCausalLM, folder, "language model", torch.float32)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_integer_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = edited(
        saved, "lm", tmp_path, lambda t: {k: x.to(torch.int8) if "proj" in k else x for k, x in t.items()}
    )
    assert "as I8" in refusal(folder)


def test_shards(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "lm", tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "shards without their model.safetensors.index.json" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    assert "names 2 files and 1 of them are absent ('model-00002-of-00002.safetensors')" in refusal(folder)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    assert "no weight_map" in refusal(folder)


def test_pickled_checkpoints_load_only_tensors(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "lm", tmp_path)
    (folder / "model.safetensors").unlink()
    file, ran = folder / "pytorch_model.bin", tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (ran,)  # pyright: ignore[reportReturnType]

    torch.save(load_file(saved / "lm" / "model.safetensors"), file)
    model, _, _ = read_pretrained(tf.AutoModelForCausalLM, folder, "language model", torch.float32)
    assert torch.equal(model.get_output_embeddings().weight, make_lm().lm_head.weight)
    file.write_bytes(file.read_bytes()[:5000])
    assert "was cut off" in refusal(folder)
    torch.save({"state_dict": load_file(saved / "lm" / "model.safetensors")}, file)
    assert "inside another object" in refusal(folder)
    torch.save({"a": Code()}, file)
    assert "holds more than tensors" in refusal(folder)
    assert not ran.exists()


def test_sources_that_are_no_model_folder(saved: Path, tmp_path: Path) -> None:
    assert "it is empty" in refusal(tmp_path)
    assert "name the folder inside it, such as 'tied'" in refusal(saved)
    assert "name the folder that holds it" in refusal(saved / "lm" / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "not a GGUF file that can be read" in refusal(tmp_path)
    assert "not a GGUF file that can be read" in refusal(tmp_path / "model.gguf")
    for name in ("", " ", None, 5, "x" * 5000):
        assert "language model" in refusal(name)


def test_a_folder_without_a_tokenizer(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "lm", tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "contains no tokenizer" in refusal(folder)
    (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE"}}')
    assert "tokenizer of language model" in refusal(folder)


# ---- code and memory -----------------------------------------------------------------------------------------------


def test_code_in_a_folder_never_runs_and_stdin_is_not_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    auto = {
        "model_type": "evilmodel",
        "auto_map": {
            "AutoConfig": "code.C",
            "AutoModelForCausalLM": "code.M",
            "AutoModelForSequenceClassification": "code.M",
        },
    }
    answers = io.StringIO("y\n" * 50)
    monkeypatch.setattr("sys.stdin", answers)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = configured(saved, "lm", tmp_path, **auto)
    (folder / "code.py").write_text(code)
    lm = (make_lm(), make_tokenizer())
    for way in (
        lambda: RewardGuidedDecoder.from_pretrained(folder),
        lambda: RewardGuidedDecoder.from_pretrained(lm, reward=str(folder)),
        lambda: RewardGuidedDecoder.from_pretrained(lm, reward=f"genarm:{folder}"),
        lambda: load_base(folder),
        lambda: load_causal(folder),
    ):
        with pytest.raises(RGTGError, match="needs code of its own"):
            way()
    tokenizer_file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    tokenizer_file.write_text(json.dumps({**json.loads(tokenizer_file.read_text()), **own}))
    with pytest.raises(RGTGError, match="needs code of its own"):
        read_tokenizer(folder, "language model")
    assert not ran.exists()
    assert answers.tell() == 0
    assert capsys.readouterr().out == ""


def test_one_module_calls_the_loaders_of_transformers() -> None:
    """Only these modules call transformers' loaders, and code runs only where `read_pretrained` is told to."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "Auto" in text else ():
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in ("from_pretrained", "from_config") and owner.startswith("Auto"):
                trusts = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                assert trusts is not None, f"{path}:{node.lineno}"
                allowed = {"False", *(["trust_remote_code"] if path.name == "pretrained.py" else [])}
                assert ast.unparse(trusts) in allowed, f"{path}:{node.lineno}"
            if node.func.attr == "from_pretrained" and owner.startswith("Auto"):
                found.append(path.relative_to(PACKAGE).as_posix())
    # GGUF files are converted, which needs other arguments.
    assert set(found) == {
        "models/pretrained.py",
        "models/gguf.py",
        "models/gguf_tokenizer.py",
        "bundled/embedded.py",
    }


def test_weights_larger_than_the_free_memory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "free_bytes", lambda device: 1000)
    message = refusal(saved / "lm")
    assert (
        "need 0.00 GiB as float32 and 0.00 GiB are free: use dtype bfloat16 (0.00 GiB) or a smaller model"
        in message
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "unable to mmap 538090408 bytes from file <model.safetensors>: Cannot allocate memory (12)"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_memory_that_runs_out_while_loading(
    error: Exception, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", fail)
    message = refusal(saved / "lm")
    assert "the weights of language model" in message
    assert "as float32, more than is free: use dtype bfloat16" in message


def test_threads_load_one_after_another(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loader sets torch's default dtype and initializers for the whole process."""
    load, free = tf.AutoModelForCausalLM.from_pretrained, []

    def another_thread_could_load() -> None:
        free.append(pretrained._LOADING.acquire(blocking=False))

    def loading(*args: Any, **settings: Any) -> Any:
        thread = threading.Thread(target=another_thread_could_load)
        thread.start()
        thread.join()
        return load(*args, **settings)

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", loading)
    read_pretrained(tf.AutoModelForCausalLM, saved / "lm", "language model", torch.float32)
    assert free == [False]
