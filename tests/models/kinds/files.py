"""Kinds of files: GGUF, quantized weights, and models that come with their own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import make_lm, make_tokenizer
from tests.models import code_models, gguf_files, quantized_models
from tests.models.kinds import Kind, Sources

GROUP = "file format"
CONTRASTIVE = "contrastive"


def gguf_model(folder: Path, kind: str = "llama", quantization: str = "Q8_0") -> Sources:
    path = gguf_files.save(
        folder / "lm.gguf", gguf_files.tiny(kind, max_position_embeddings=512), quantization
    )
    return Sources(str(path), CONTRASTIVE)


def gguf_folder(folder: Path) -> Sources:
    gguf_model(folder)
    return Sources(str(folder), CONTRASTIVE)


def two_gguf_files(folder: Path) -> Sources:
    gguf_model(folder)
    (folder / "another.gguf").write_bytes((folder / "lm.gguf").read_bytes())
    return Sources(str(folder), CONTRASTIVE)


def gguf_reward(folder: Path) -> Sources:
    lm = gguf_model(folder).lm
    return Sources(lm, str(gguf_files.save(folder / "rm.gguf", gguf_files.tiny(head=True, seed=1), "F16")))


def gguf_without_head(folder: Path) -> Sources:
    lm = gguf_model(folder).lm
    return Sources(lm, str(gguf_files.save(folder / "rm.gguf", gguf_files.tiny(seed=1))))


def gguf_architecture(folder: Path) -> Sources:
    tensors = {"token_embd.weight": np.ones((4, 32), np.float32)}
    return Sources(str(gguf_files.write(folder / "lm.gguf", tensors, {}, "rwkv7")), CONTRASTIVE)


def gguf_setting(folder: Path) -> Sources:
    path = gguf_files.save(folder / "lm.gguf", gguf_files.tiny(), llama__expert_count=8)
    return Sources(str(path), CONTRASTIVE)


def quantized(method: str, reward: bool = False) -> Kind:
    def build(folder: Path) -> Sources:
        if not reward:
            return Sources(str(quantized_models.saved(folder, method)), CONTRASTIVE)
        make_lm(**quantized_models.SIZES).save_pretrained(folder / "lm")
        make_tokenizer().save_pretrained(folder / "lm")
        return Sources(str(folder / "lm"), str(quantized_models.saved(folder, method, head=True)))

    return Kind(
        f"{method}{', reward model' if reward else ''}",
        GROUP,
        build,
        served="engine transformers, by its own modules",
        needs=quantized_models.METHODS[method],
    )


def gptq(folder: Path) -> Sources:
    return Sources(str(quantized_models.claimed(folder, quant_method="gptq", bits=4)), CONTRASTIVE)


def unknown_quantization(folder: Path) -> Sources:
    return Sources(str(quantized_models.claimed(folder, quant_method="nobody-knows")), CONTRASTIVE)


def own_code(folder: Path) -> Sources:
    return Sources(str(code_models.save(folder / "own-code", folder / "ran")), CONTRASTIVE)


def trusted_code(folder: Path) -> Sources:
    return Sources(own_code(folder).lm, CONTRASTIVE, ("--trust-remote-code",))


def code_elsewhere(folder: Path) -> Sources:
    path = code_models.save(folder / "code-elsewhere", folder / "ran", repository="someone/else")
    return Sources(str(path), CONTRASTIVE, ("--trust-remote-code",))


def wrapped_logits(folder: Path) -> Sources:
    path = code_models.save(folder / "scaled-code", folder / "ran", scale=0.5)
    return Sources(str(path), CONTRASTIVE, ("--trust-remote-code",))


def damaged(folder: Path) -> Sources:
    path = Path(gguf_model(folder).lm)
    path.write_bytes(path.read_bytes()[:5000])
    return Sources(str(path), CONTRASTIVE)


def without_tokenizer(folder: Path) -> Sources:
    path = gguf_files.save(folder / "lm.gguf", gguf_files.tiny(), tokenizer__ggml__tokens=None)
    return Sources(str(path), CONTRASTIVE)


_CONVERTED = "converted once into the cache, weights dequantized"
KINDS = [
    Kind("GGUF (llama, Q8_0)", GROUP, gguf_model, served=_CONVERTED, needs="gguf"),
    Kind(
        "GGUF (qwen2, Q4_0)",
        GROUP,
        lambda folder: gguf_model(folder, "qwen2", "Q4_0"),
        _CONVERTED,
        needs="gguf",
    ),
    Kind(
        "GGUF (qwen3, F16)",
        GROUP,
        lambda folder: gguf_model(folder, "qwen3", "F16"),
        _CONVERTED,
        needs="gguf",
    ),
    Kind("a folder with one GGUF file", GROUP, gguf_folder, served=_CONVERTED, needs="gguf"),
    Kind(
        "a folder with several GGUF files", GROUP, two_gguf_files, refused="holds 2 GGUF files", needs="gguf"
    ),
    Kind("GGUF reward model (cls.output.weight)", GROUP, gguf_reward, served=_CONVERTED, needs="gguf"),
    Kind(
        "GGUF without a head, as reward",
        GROUP,
        gguf_without_head,
        refused="which has no reward head",
        needs="gguf",
    ),
    Kind(
        "GGUF of another architecture",
        GROUP,
        gguf_architecture,
        refused="is a GGUF file of architecture 'rwkv7'",
        needs="gguf",
    ),
    Kind("GGUF with experts", GROUP, gguf_setting, refused="llama.expert_count = 8", needs="gguf"),
    Kind("GGUF without a tokenizer", GROUP, without_tokenizer, refused="holds no tokenizer", needs="gguf"),
    Kind("GGUF that was cut off", GROUP, damaged, refused="was cut off", needs="gguf"),
    quantized("bitsandbytes 4-bit"),
    quantized("bitsandbytes 4-bit", reward=True),
    quantized("torchao int8"),
    quantized("compressed-tensors 4-bit"),
    Kind("GPTQ, without its package", GROUP, gptq, refused="needs a package that is missing"),
    Kind(
        "quantized by an unknown method",
        GROUP,
        unknown_quantization,
        refused="quantized by a method that transformers does not know",
    ),
    Kind("code of its own", GROUP, own_code, refused="runs only with trust_remote_code=True"),
    Kind("code of its own, trusted", GROUP, trusted_code, served="verified as any other"),
    Kind(
        "code of its own that scales its logits",
        GROUP,
        wrapped_logits,
        refused="differ from its head's output",
    ),
    Kind("code of another repository", GROUP, code_elsewhere, refused="runs code of another repository"),
]
