"""Tiny models with quantized weights, by the packages that people quantize with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.conftest import make_lm, make_rm, make_tokenizer

SIZES: Any = {"hidden_size": 64, "intermediate_size": 128}
# What quantizes weights alone, and the package that it needs.
METHODS = {
    "bitsandbytes 4-bit": "bitsandbytes",
    "torchao int8": "torchao",
    "compressed-tensors 4-bit": "compressed_tensors",
}


def missing(method: str) -> str | None:
    """The package that a method needs and that is not installed."""
    package = METHODS.get(method, method.split()[0])
    return None if importlib.util.find_spec(package) else package


def settings(method: str) -> Any:
    """transformers' configuration of a method."""
    if method == "bitsandbytes 4-bit":
        return tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    if method == "bitsandbytes 8-bit":
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    import torchao.quantization as quantization

    kind = "Int8WeightOnlyConfig" if method == "torchao int8" else "Int8DynamicActivationInt8WeightConfig"
    return tf.TorchAoConfig(getattr(quantization, kind)())


def quantized(folder: Path, method: str, head: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny language model, a reward model with `head`, that transformers quantized from a folder that it makes."""
    plain = folder / f"plain-{head}"
    if not plain.is_dir():
        (make_rm if head else make_lm)(**SIZES).save_pretrained(plain)
        make_tokenizer().save_pretrained(plain)
    kind: Any = tf.AutoModelForSequenceClassification if head else tf.AutoModelForCausalLM
    if method.startswith("compressed"):
        return _compressed(folder, plain, kind, head, dtype).eval()
    model = kind.from_pretrained(plain, quantization_config=settings(method), dtype=dtype)
    return model.eval()


def _compressed(folder: Path, plain: Path, kind: Any, head: bool, dtype: torch.dtype) -> Any:
    """A model in the format of compressed-tensors, as llm-compressor writes it: 4 bits in groups of 32."""
    from compressed_tensors import compressors, quantization

    target = folder / f"compressed-{head}-{dtype}"
    if not target.is_dir():
        weights = quantization.QuantizationArgs(num_bits=4, type="int", group_size=32, strategy="group")
        settings = quantization.QuantizationConfig(
            config_groups={"all": quantization.QuantizationScheme(targets=["Linear"], weights=weights)},
            ignore=["lm_head", "score"],
            format="pack-quantized",
            quantization_status=quantization.QuantizationStatus.FROZEN,
        )
        model = kind.from_pretrained(plain, dtype=dtype)
        quantization.apply_quantization_config(model, settings)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                groups = module.weight.data.view(len(module.weight), -1, 32)
                module.weight_scale.data = (groups.abs().amax(-1) / 7).to(module.weight_scale.dtype)
        compressor = compressors.ModelCompressor.from_pretrained_model(
            model, quantization_format="pack-quantized"
        )
        compressor.compress_model(model)
        model.save_pretrained(target)
        compressor.update_config(str(target))
    return kind.from_pretrained(target)


def saved(folder: Path, method: str, head: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a quantized model and its tokenizer."""
    target = folder / f"{method.replace(' ', '-')}-{head}"
    model = quantized(folder, method, head, dtype)
    if method.startswith("compressed"):
        target = folder / f"compressed-{head}-{dtype}"
    else:
        model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


def claimed(folder: Path, **configuration: Any) -> Path:
    """A folder of plain weights whose configuration says that they are quantized."""
    make_lm(**SIZES).save_pretrained(folder / "claimed")
    make_tokenizer().save_pretrained(folder / "claimed")
    file = folder / "claimed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": configuration}))
    return folder / "claimed"
