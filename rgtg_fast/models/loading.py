"""Loads language and reward models, and refuses by name those that the prefix cache cannot serve."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import CONFIG, Adapter, is_adapter
from rgtg_fast.models.backbone import Backbone

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TESTED = "Llama, Qwen2, Qwen3, Mistral, Gemma, Phi, GPT-NeoX, OPT, GPT-2"
_RECURRENT = (
    "mamba",
    "rwkv",
    "recurrent",
    "jamba",
    "zamba",
    "bamba",
    "hawk",
    "xlstm",
    "lfm",
    "minimax",
    "falcon_h1",
)

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise RGTGError(f"device={device!r} is unknown to torch: use 'cpu' or 'cuda'") from error
    if resolved.type not in ("cpu", "cuda"):
        raise RGTGError(f"device={str(device)!r} is not served: use 'cpu' or 'cuda'")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise RGTGError(
            f"device={str(device)!r} was asked for and torch sees no CUDA device: use device='cpu'"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RGTGError(f"device={str(device)!r} is beyond the {torch.cuda.device_count()} that torch sees")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default float32 on a CPU (exact) and bfloat16 on a GPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif dtype in DTYPES:
        return DTYPES[dtype]
    raise RGTGError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}")


def refusal(model: PreTrainedModel, length: int | None) -> str | None:
    """Why a model cannot work with a prefix cache of `length` tokens, or None.

    Args:
        length: tokens that a row may reach, None for the model's whole context.
    """
    config: Any = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    recurrent = [name for name in _RECURRENT if name in str(config.model_type)]
    kinds = set(getattr(config, "layer_types", None) or [])
    if recurrent or model._is_stateful or kinds & {"linear_attention", "mamba", "recurrent", "conv"}:
        return "it keeps a recurrent state"
    window = _window(config, kinds)
    if window is not None and (length is None or length > window):
        reach = "its whole context" if length is None else f"{length} tokens"
        return f"it attends a sliding window of {window} tokens, the cache is for {reach} (max_length={window} works)"
    if not model._supports_attention_backend:
        return "its attention cannot be replaced"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention logits"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "its keys and values are compressed (multi-head latent attention)"
    return None


def _window(config: Any, kinds: set[str]) -> int | None:
    if kinds:
        sliding = bool(kinds & {"sliding_attention", "chunked_attention"})
        return (config.sliding_window or config.attention_chunk_size) if sliding else None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model's context holds."""
    config: Any = model.config.get_text_config()
    return int(config.max_position_embeddings)


def load_causal_lm(
    source: str | os.PathLike[str] | ModelAndTokenizer,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> ModelAndTokenizer:
    """The base language model and its tokenizer, from a path, a hub id or a pair already loaded.

    A folder with an adapter (a policy) is merged into a copy of its base.

    Args:
        device, dtype: None keeps a loaded pair as it is, and takes the defaults of `resolve_device` and
            `resolve_dtype` for a name.

    Raises:
        RGTGError: nothing there, or an adapter of a reward model or of another base.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        on = model.device if device is None else resolve_device(device)
        return _placed(model, on, model.dtype if dtype is None else resolve_dtype(dtype, on)), tokenizer
    on = resolve_device(device)
    kind = resolve_dtype(dtype, on)
    if is_adapter(source):
        return _policy(Adapter.load(source), on, kind)
    with _one_line(source, "language model"):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
        tokenizer = AutoTokenizer.from_pretrained(source)
    return _placed(model, on, kind), tokenizer


def _policy(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> ModelAndTokenizer:
    """A trained policy: its base with the adapter merged, and the tokenizer saved with it."""
    if adapter.head is not None and adapter.head_name == "score":
        raise RGTGError(
            f"{adapter.name} is a reward model's adapter: pass it as reward, and a language model as lm"
        )
    base, tokenizer = _base_of(adapter, device, dtype)
    model = adapter.merged(base)
    model.generation_config = base.generation_config
    model.config._name_or_path = adapter.name
    return _placed(model, device, dtype), adapter_tokenizer(adapter.name) or tokenizer


def _base_of(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> ModelAndTokenizer:
    if not adapter.base_name:
        raise RGTGError(f"{adapter.name} names no base model: add base_model_name_or_path to its {CONFIG}")
    base, tokenizer = load_causal_lm(adapter.base_name, device, dtype)
    wrong = adapter.misfit(base) if adapter.base_fingerprint is None else adapter.mismatch(base)
    if wrong is not None:
        raise RGTGError(
            f"{wrong}: put back the model that it was trained on, or use one that was saved merged"
        )
    return base, tokenizer


def load_sequence_classifier(
    source: str | os.PathLike[str] | ModelAndTokenizer, lm: PreTrainedModel, dtype: torch.dtype | None
) -> ModelAndTokenizer:
    """A reward model (one label) and its tokenizer, from a path, a hub id or a pair already loaded.

    Args:
        lm: the base model, whose device it shares.
        dtype: None keeps a loaded pair as it is, and takes the base model's for a name.

    Raises:
        RGTGError: nothing there, several labels, or no trained head in the files.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        _one_label(model.config, type(model).__name__)
        return _placed(model, lm.device, dtype or model.dtype), tokenizer
    kind = dtype or lm.dtype
    with _one_line(source, "reward model"):
        _one_label(AutoConfig.from_pretrained(source), source)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=kind, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    missing = [key for key in info["missing_keys"] if "score" in key or "classifier" in key]
    if missing:
        raise RGTGError(
            f"{source} has no trained reward head ({missing[0]} is missing from its files): "
            "name a reward model saved with its head (AutoModelForSequenceClassification, num_labels=1)"
        )
    return _placed(model, lm.device, kind), tokenizer


def adapter_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, None where the folder has none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    with _one_line(folder, "adapter's tokenizer"):
        return AutoTokenizer.from_pretrained(folder)


def adapter_model(adapter: Adapter, base: ModelAndTokenizer, dtype: torch.dtype | None) -> ModelAndTokenizer:
    """A model of its own from an adapter, merged into a copy of its base, and the base's tokenizer.

    Args:
        base: copied where it is the adapter's base; where it is a policy made from that base, the base is loaded by the
            policy's name for it, else by the name that the adapter keeps.
        dtype: of a base that is loaded; None for the given one's.

    Raises:
        RGTGError: the adapter does not fit its base.
    """
    model, tokenizer = base
    if adapter.mismatch(model) is not None:
        beneath = _beneath(model, dtype or model.dtype)
        if beneath is not None and adapter.mismatch(beneath[0]) is None:
            model, tokenizer = beneath
        elif adapter.base_name:
            model, tokenizer = load_causal_lm(adapter.base_name, model.device, dtype or model.dtype)
    misfit = adapter.misfit(model)
    if misfit is not None:
        raise RGTGError(f"{misfit}: name the model that the adapter was trained on")
    own = adapter.merged(model)
    own.config._name_or_path = adapter.name
    return own, tokenizer


def _beneath(model: PreTrainedModel, dtype: torch.dtype) -> ModelAndTokenizer | None:
    """The base of a policy that was loaded from its adapter, on which a guide's adapter may have been trained too."""
    name = model.config._name_or_path
    return _base_of(Adapter.load(name), model.device, dtype) if is_adapter(name) else None


def load_vocabulary_model(
    source: str | os.PathLike[str] | ModelAndTokenizer, lm: PreTrainedModel, dtype: torch.dtype | None
) -> ModelAndTokenizer:
    """A guide's causal language model and its tokenizer, from a path, a hub id or a pair already loaded.

    Args:
        lm: the base model, whose device it shares.
        dtype: None keeps a loaded pair as it is, and takes the base model's for a name.

    Raises:
        RGTGError: nothing there, or no vocabulary head in the files.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        return _placed(model, lm.device, dtype or model.dtype), tokenizer
    kind = dtype or lm.dtype
    with _one_line(source, "reward model"):
        made_as = AutoConfig.from_pretrained(source).architectures or [""]
        if "Classification" in made_as[0]:
            raise RGTGError(
                f"{source} is a {made_as[0]} and this guide needs a vocabulary head: "
                "use SequenceReward for a reward model with one label"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=kind, output_loading_info=True)
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source)
    missing = [key for key in info["missing_keys"] if "head" in key or "embed_out" in key]
    if missing:
        raise RGTGError(
            f"{source} has no trained vocabulary head ({missing[0]} is missing from its files): "
            "name a model saved with its head (AutoModelForCausalLM)"
        )
    return _placed(model, lm.device, kind), tokenizer


def language_backbone(model: PreTrainedModel, engine: str, max_length: int | None) -> Backbone:
    """The base model as a Backbone, refused by name where it cannot work."""
    head: object = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RGTGError(
            f"{_title(model)} has no linear vocabulary head: use a causal language model ({TESTED})"
        )
    return _backbone(model, head, engine, max_length, "language model")


def reward_backbone(model: PreTrainedModel, engine: str, max_length: int | None) -> Backbone:
    """A causal reward model as a Backbone, refused by name where it cannot work."""
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise RGTGError(
            f"{_title(model)} has no one-label `score` head over a causal trunk: for an encoder or another tokenizer "
            "use reward=TextReward(...)"
        )
    return _backbone(model, head, engine, max_length, "reward model")


def _backbone(
    model: PreTrainedModel, head: nn.Linear, engine: str, max_length: int | None, role: str
) -> Backbone:
    reason = refusal(model, max_length)
    if reason is not None:
        raise RGTGError(f"{_title(model)} cannot serve as {role}: {reason}; tested families: {TESTED}")
    limit = context_length(model)
    backbone = Backbone(model.eval(), head, engine, limit if max_length is None else min(limit, max_length))
    backbone.verify()
    return backbone


def _title(model: PreTrainedModel) -> str:
    name = model.config._name_or_path
    return f"{name} ({type(model).__name__})" if name else type(model).__name__


def _one_label(config: Any, name: object) -> None:
    if config.num_labels != 1:
        raise RGTGError(
            f"{name} has {config.num_labels} labels and a reward model needs 1: use a model with num_labels=1"
        )


def _placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return model.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize / 2**30
        raise RGTGError(
            f"{_title(model)} needs {size:.1f} GiB as {dtype} and {device} has less free: use a smaller dtype"
        ) from error


@contextlib.contextmanager
def _one_line(source: str | os.PathLike[str], role: str) -> Iterator[None]:
    """Turns the loaders' long errors into one line."""
    try:
        yield
    except RGTGError:
        raise
    except (OSError, ValueError, KeyError) as error:
        path = Path(source)
        if not path.exists() and (len(path.parts) > 2 or path.is_absolute()):
            raise RGTGError(f"{role} {str(source)!r} does not exist: check the path") from error
        why = (
            "is not a folder that transformers can load"
            if path.exists()
            else "is neither a local folder nor to be had from the hub"
        )
        detail = " ".join(str(error).split())[:160]
        raise RGTGError(f"{role} {str(source)!r} {why}: check the name ({detail})") from error
