"""Converts GGUF files to folders that transformers loads, once, in the cache.

transformers' reader of GGUF dequantizes the weights and rebuilds the tokenizer. It leaves out settings of the model
that it does not know (rope scaling, caps), drops tensors that it does not map and fills missing ones at random. Here
the configuration comes from the file's metadata, of which every key must be known, and the file's tensors must be
exactly those of the model.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.util
import io
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rgtg_fast.bundled import embedded
from rgtg_fast.errors import RGTGError, one_line
from rgtg_fast.models.checkpoint import names
from rgtg_fast.models.device import free_bytes, too_large
from rgtg_fast.models.gguf_file import File, read, values
from rgtg_fast.models.gguf_tokenizer import INSTEAD, SPECIAL, check_special_tokens, save_tokenizer

SUFFIX = ".gguf"
INSTALL = "pip install gguf accelerate"
# The number changes with the converted files, so that an older cache is not used.
_VERSION = 1
# Bytes at a file's beginning that are part of its identity.
_HASHED = 2**20
# Files beside which a GGUF file is not what the folder's name means.
_OTHERS = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")

# Keys of the metadata, without the architecture's prefix, and the fields of the configuration that they set.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GEMMA = {"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
_OPTIONAL = {"attention.head_count_kv", *_GEMMA, "attn_logit_softcapping"}
# Keys that are read below, or that change nothing.
_READ = {
    "attention.causal",
    "attention.key_length",
    "attention.value_length",
    "classifier.output_labels",
    "pooling_type",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}
_HEAD, _HEAD_BIAS, _LLAMA3 = "cls.output.weight", "cls.output.bias", "rope_freqs.weight"
# How llama.cpp pools the states of a text; a classifier's head reads the last token's under "rank".
_POOLINGS = ("none", "mean", "cls", "last", "rank")
# The context and the two frequencies from which all Llama 3 models scale their rope.
_LLAMA3_ROPE = {
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


class _Family(NamedTuple):
    """How an architecture of GGUF is named in transformers, and what its files hold besides the common keys."""

    model_type: str
    classifier: str
    fields: Mapping[str, str] = {}


_FAMILIES = {
    "llama": _Family("llama", "LlamaForSequenceClassification"),
    "qwen2": _Family("qwen2", "Qwen2ForSequenceClassification"),
    "qwen3": _Family("qwen3", "Qwen3ForSequenceClassification"),
    "gemma2": _Family(
        "gemma2",
        "Gemma2ForSequenceClassification",
        {**_GEMMA, "attn_logit_softcapping": "attn_logit_softcapping"},
    ),
    "gemma3": _Family("gemma3_text", "Gemma3TextForSequenceClassification", _GEMMA),
}


def gguf_file(source: str | os.PathLike[str], title: str) -> Path | None:
    """The GGUF file that a source names: the file itself, or the only one of a folder or hub repository.

    Args:
        source: a path, a hub id, or `OWNER/NAME/FILE.gguf` for a file of a hub repository.
        title: role and name of the model, for messages.

    Returns:
        The local path, after a download; None where the source has other weights or none.

    Raises:
        RGTGError: a folder or repository with several GGUF files, or a download that fails.
    """
    path = Path(source)
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if path.is_dir():
        if any(next(path.glob(pattern), None) for pattern in _OTHERS):
            return None
        found = _only(sorted(file.name for file in path.glob("*.gguf")), str(path), title)
        return None if found is None else path / found
    parts = path.parts
    if path.is_absolute() or len(parts) < 2 or parts[0] in (".", "..", "~"):
        if path.suffix.lower() == SUFFIX:
            raise RGTGError(f"{title} does not exist: check the path")
        return None
    return _hub_file(parts, title)


def _hub_file(parts: tuple[str, ...], title: str) -> Path | None:
    """The GGUF file of a hub repository, downloaded; None where it has other weights or cannot be listed."""
    import huggingface_hub as hub

    repository = "/".join(parts[:2])
    if len(parts) > 2 and parts[-1].lower().endswith(SUFFIX):
        found = "/".join(parts[2:])
    elif len(parts) > 2:
        return None
    else:
        held = _listed(repository)
        if any(fnmatch.fnmatch(name, pattern) for name in held for pattern in _OTHERS):
            return None
        found = _only([name for name in held if name.lower().endswith(SUFFIX)], repository, title)
        if found is None:
            return None
    try:
        return Path(hub.hf_hub_download(repository, found))
    except Exception as error:  # the hub's client and the network raise many kinds
        raise RGTGError(
            f"{title} is neither a local file nor one that the hub provides: check the name ({one_line(error)})"
        ) from error


def _listed(repository: str) -> list[str]:
    """Names of a hub repository's files, of the downloaded ones without a connection; none where it is unknown."""
    import huggingface_hub as hub

    try:
        return sorted(hub.HfApi().list_repo_files(repository))
    except Exception:  # noqa: BLE001 - offline, unknown or private: what was downloaded decides
        pass
    try:
        folder = Path(hub.snapshot_download(repository, local_files_only=True))
    except Exception:  # noqa: BLE001 - the loader explains what is wrong with the name
        return []
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _only(found: list[str], place: str, title: str) -> str | None:
    if len(found) > 1:
        raise RGTGError(
            f"{title} holds {len(found)} GGUF files ({names(found, 3)}): name one, as {place}/{found[0]}"
        )
    return found[0] if found else None


def converted(path: Path, title: str, dtype: torch.dtype) -> Path:
    """Returns the folder of a GGUF file's model in the cache, converting it at the first use.

    Args:
        path: the file; a changed file (size, time or beginning) is another model.
        title: role and name of the model, for messages.
        dtype: dtype of the dequantized weights in the folder.

    Raises:
        RGTGError: a file that cannot be read or converted exactly, a package that is missing, or a cache that cannot
            be written.
    """
    if _PART.search(path.name):
        raise RGTGError(
            f"{title} is one part of a split GGUF: merge the parts (llama-gguf-split --merge FIRST-PART OUTPUT.gguf)"
        )
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RGTGError(f"{title} is a GGUF file, which needs {' and '.join(missing)}: `{INSTALL}`")
    name = f"{_identity(path)}-{str(dtype).removeprefix('torch.')}"
    folder = embedded.cache_folder() / name
    if folder.is_dir():
        return folder
    file = read(path, title)
    check_special_tokens(file.metadata, title)
    with _quiet(title):
        config = _configuration(file, title)
    count = sum(math.prod(tensor.shape.tolist()) for tensor in file.tensors.values())
    free = free_bytes(torch.device("cpu"))
    if free is not None and count * dtype.itemsize > free:
        raise RGTGError(too_large(title, count, dtype, free))
    size = f"{count * dtype.itemsize / 1e9:.1f} GB"

    def announce() -> None:
        kind = str(dtype).removeprefix("torch.")
        sys.stderr.write(f"Converting {path.name} once ({size} as {kind}, in memory too) into {folder}\n")

    return embedded.convert_once(name, lambda to: _convert(file, config, to, title, dtype), announce, size)


def _identity(path: Path) -> str:
    """The name of a file's conversions: its own name and a hash of its beginning, size and time."""
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_HASHED))
    digest.update(f"{status.st_size} {status.st_mtime_ns} {_VERSION}".encode())
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', path.stem)[:60]}-{digest.hexdigest()[:16]}"


# ---- the configuration ---------------------------------------------------------------------------------------------


def _configuration(file: File, title: str) -> Any:
    """The configuration that the metadata states.

    Raises:
        RGTGError: an architecture or a setting that cannot be taken over, by name.
    """
    architecture = str(file.metadata.get("general.architecture"))
    family = _FAMILIES.get(architecture)
    if family is None:
        raise RGTGError(
            f"{title} is a GGUF file of architecture {architecture!r}, and {', '.join(_FAMILIES)} are read: {INSTEAD}"
        )
    prefix = architecture + "."
    stated = {key.removeprefix(prefix): x for key, x in file.metadata.items() if key.startswith(prefix)}
    table = {**_FIELDS, **family.fields}
    unknown = sorted(set(stated) - set(table) - _READ)
    if unknown:
        key = unknown[0]
        raise RGTGError(
            f"{title} has {prefix}{key} = {stated[key]!r} in its metadata, which cannot be taken over: {INSTEAD}"
        )
    absent = [key for key in table if key not in stated and key not in _OPTIONAL]
    if absent or "token_embd.weight" not in file.tensors:
        what = prefix + absent[0] if absent else "token_embd.weight"
        raise RGTGError(f"{title} lacks {what}: {INSTEAD}, or convert it again")
    broken = [key for key, x in stated.items() if isinstance(x, float) and not _is_usable(key, x)]
    if broken:
        raise RGTGError(
            f"{title} has {prefix}{broken[0]} = {stated[broken[0]]}, which must be positive and finite: "
            "download it again"
        )
    by_layer = [key for key in [*table, *_READ] if isinstance(stated.get(key), list) and "labels" not in key]
    if by_layer:
        raise RGTGError(f"{title} has a {prefix}{by_layer[0]} for each layer: {INSTEAD}")
    fields: dict[str, Any] = {field: stated.get(key) for key, field in table.items()}
    layers = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if fields["num_hidden_layers"] != layers:
        raise RGTGError(
            f"{title} states {fields['num_hidden_layers']} layers ({prefix}block_count) and holds {layers}: {INSTEAD}"
        )
    if family.model_type == "gemma2":
        # Files of the first converters lack the window and the caps: llama.cpp then takes the family's, as the
        # configuration class does.
        fields = {field: x for field, x in fields.items() if x is not None}
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    head_dim = stated.get("attention.key_length", fields["hidden_size"] // fields["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if stated.get(key, head_dim) != head_dim:
            raise RGTGError(
                f"{title} has {prefix}{key} = {stated[key]} and heads of {head_dim} numbers, which cannot be taken "
                f"over: {INSTEAD}"
            )
    if stated.get("attention.causal") is False:
        raise RGTGError(
            f"{title} attends in both directions: use reward='text:FOLDER' with the folder of the original model"
        )
    fields |= {
        "head_dim": head_dim,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, stated, family, head_dim, title),
        **{
            f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{SPECIAL[name]}_token_id")
            for name in ("bos", "eos", "pad")
        },
    }
    if family.model_type.startswith("gemma"):
        fields["query_pre_attn_scalar"] = _gemma_scale(family, fields)
    elif any(name.endswith("attn_q.bias") for name in file.tensors):
        fields["attention_bias"] = True
    if any(name.endswith("ffn_gate.bias") for name in file.tensors):
        fields["mlp_bias"] = True
    return _with_head(AutoConfig.for_model(family.model_type, **fields), file, stated, family, title)


def _is_usable(key: str, value: float) -> bool:
    return 0 < value < math.inf or (value == 0 and key == "rope.scaling.factor")


def _gemma_scale(family: _Family, fields: dict[str, Any]) -> int:
    """The square of the divisor of Gemma's scores, which files do not state: the 27B models alone use another one.

    llama.cpp recognizes them by their depth as well (`LLM_TYPE_27B` in its Gemma 2 and 3 models).
    """
    largest = 46 if family.model_type == "gemma2" else 62
    wide = fields["num_hidden_layers"] == largest
    return fields["hidden_size"] // fields["num_attention_heads"] if wide else fields["head_dim"]


def _rope(file: File, stated: dict[str, Any], family: _Family, head_dim: int, title: str) -> dict[str, Any]:
    """transformers' `rope_parameters`, with the scaling that the metadata or the tensor `rope_freqs` states."""
    gemma3 = family.model_type == "gemma3_text"
    # Without a base llama.cpp takes this one as well.
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": stated.get("rope.freq_base", 10000.0)}
    kind, factor = stated.get("rope.scaling.type", "none"), stated.get("rope.scaling.factor")
    length = stated.get("rope.scaling.original_context_length")
    if kind == "linear" and factor:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor and length:
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    elif kind != "none" or (factor or 1.0) != 1.0:
        raise RGTGError(
            f"{title} scales its rope by {kind!r} ({factor}), which cannot be taken over: {INSTEAD}"
        )
    if _LLAMA3 in file.tensors:
        if rope["rope_type"] != "default" or gemma3:
            raise RGTGError(f"{title} has {_LLAMA3} beside another scaling of its rope: {INSTEAD}")
        rope |= _llama3(values(file.tensors[_LLAMA3]).float(), rope["rope_theta"], head_dim, title)
    if gemma3:
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _llama3(divisors: torch.Tensor, theta: float, head_dim: int, title: str) -> dict[str, Any]:
    """The settings of Llama 3's rope that give the divisors [head_dim / 2] of a file's frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), **_LLAMA3_ROPE}
    config: Any = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=dict(settings))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    expected = plain / scaled
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise RGTGError(f"{title} scales its rope by a {_LLAMA3} that is not Llama 3's: {INSTEAD}")
    return settings


def _with_head(config: Any, file: File, stated: dict[str, Any], family: _Family, title: str) -> Any:
    """Completes the configuration by the kind of the model: a reward model where the file has a head."""
    dense = sorted(name for name in file.tensors if name in ("cls.weight", "cls.bias"))
    if dense:
        raise RGTGError(
            f"{title} has a head of two layers ({dense[0]!r}), and {_HEAD} alone is read: {INSTEAD}"
        )
    head = file.tensors.get(_HEAD)
    if head is None:
        config.architectures = [family.classifier.replace("ForSequenceClassification", "ForCausalLM")]
        return config
    pooling = int(stated.get("pooling_type", _POOLINGS.index("rank")))
    kind = _POOLINGS[pooling] if 0 <= pooling < len(_POOLINGS) else str(pooling)
    if kind not in ("last", "rank"):
        raise RGTGError(f"{title} pools a text by {kind!r} and its head cannot read prefixes: {INSTEAD}")
    config.architectures = [family.classifier]
    labels = values(head).reshape(-1, config.hidden_size).shape[0]
    given = stated.get("classifier.output_labels") or [f"LABEL_{i}" for i in range(labels)]
    given = [given] if isinstance(given, str) else given
    if len(given) != labels:
        raise RGTGError(f"{title} names {len(given)} labels and its head has {labels}: {INSTEAD}")
    config.id2label = dict(enumerate(given))
    config.label2id = {label: i for i, label in enumerate(given)}
    return config


# ---- weights -------------------------------------------------------------------------------------------------------


def _convert(file: File, config: Any, folder: Path, title: str, dtype: torch.dtype) -> None:
    """Writes the model's folder: weights, configuration and tokenizer."""
    weights = _weights(file, config, title, dtype)
    folder.mkdir()
    config.dtype = dtype
    config.save_pretrained(folder)
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = sorted({token for token in ends if token is not None})
    if config.architectures[0].endswith("CausalLM"):
        generation = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends or None,
            pad_token_id=config.pad_token_id,
        )
        generation.save_pretrained(folder)
    save_tokenizer(file.path, file.metadata, config.vocab_size, folder, title)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(file: File, config: Any, title: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The dequantized weights by transformers' names.

    Raises:
        RGTGError: a tensor that the model lacks, or a weight that the file lacks, by name.
    """
    _check_tensors(file, config, title)
    with _quiet(title):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            config=_without_head(config),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, info = loaded
    state = {key: x for key, x in model.state_dict().items() if key not in _tied(model, config)}
    wrong = {
        "lacks the weights of": set(info["missing_keys"]) - _tied(model, config),
        "has other shapes than its metadata for": {key for key, *_ in info["mismatched_keys"]},
    }
    _refuse(wrong, title)
    if _HEAD in file.tensors:
        state["score.weight"] = values(file.tensors[_HEAD]).reshape(-1, config.hidden_size).to(dtype)
    if _HEAD_BIAS in file.tensors:
        state["score.bias"] = values(file.tensors[_HEAD_BIAS]).reshape(-1).to(dtype)
    return {key: x.contiguous() for key, x in state.items()}


def _check_tensors(file: File, config: Any, title: str) -> None:
    """Compares names and shapes with the model's before any is read: the reader allocates what the metadata says."""
    with _quiet(title), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(_without_head(config), trust_remote_code=False)
    state = {key: x for key, x in model.state_dict().items() if key not in _tied(model, config)}
    expected = {_gguf_name(key, file, config): list(x.shape) for key, x in state.items()}
    found = {name: tensor.shape.tolist()[::-1] for name, tensor in file.tensors.items()}
    more = set(found) - set(expected) - {_HEAD, _HEAD_BIAS, _LLAMA3}
    wrong = {
        "lacks": set(expected) - set(found),
        "holds tensors that the model does not have:": more,
        "has other shapes than its metadata for": {
            name for name, shape in expected.items() if found.get(name, shape) != shape
        },
    }
    _refuse(wrong, title)


def _refuse(wrong: dict[str, set[str]], title: str) -> None:
    for what, keys in wrong.items():
        if keys:
            raise RGTGError(f"{title} {what} {names(keys)}: {INSTEAD}, or convert it again")


def _without_head(config: Any) -> Any:
    """The configuration of the language model over the same trunk."""
    return type(config).from_dict({key: x for key, x in config.to_dict().items() if "label" not in key})


def _tied(model: Any, config: Any) -> set[str]:
    return set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()


def _gguf_name(key: str, file: File, config: Any) -> str:
    """The name that a weight of transformers has in a GGUF file; the weight's own name where it has none there."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    mapping = gguf.get_tensor_name_map(kinds[file.metadata["general.architecture"]], config.num_hidden_layers)
    return mapping.get_name(key, try_suffixes=(".weight", ".bias")) or key


@contextlib.contextmanager
def _quiet(title: str) -> Iterator[None]:
    """Hides the reader's progress bars, which no setting turns off, and replaces its errors with one line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (RGTGError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a file that it does not expect the reader may raise anything
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise RGTGError(f"{title} cannot be read by transformers ({detail}): {INSTEAD}") from error
