"""Loads language and reward models, and refuses by name those that the prefix cache cannot serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgtg_fast import bundled
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.adapter import CONFIG, Adapter, is_adapter
from rgtg_fast.models.attention import attentions, restore_attentions
from rgtg_fast.models.limits import Limit, limits, unknown_kind
from rgtg_fast.models.pretrained import fits_in_memory, read_pretrained, read_tokenizer
from rgtg_fast.models.runner import ModelRunner

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
    "falcon_h1",
)

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RGTGError(f"device={shown(device)} is unknown to torch: use 'cpu' or 'cuda'") from error
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
    elif isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise RGTGError(f"dtype={shown(dtype)} is unknown: use one of {', '.join(DTYPES)}")


def as_source(source: Any, role: str) -> str | os.PathLike[str] | ModelAndTokenizer:
    """Where a model comes from: a path or hub id, or a (model, tokenizer) pair.

    Args:
        role: of the model, for messages.

    Raises:
        RGTGError: something else, saying what to pass.
    """
    if isinstance(source, (str, os.PathLike)):
        if not str(source).strip():
            raise RGTGError(f"the {role} has an empty name: pass a path, a hub id or (model, tokenizer)")
        return source
    model, tokenizer = source if isinstance(source, (tuple, list)) and len(source) == 2 else (source, None)
    if hasattr(model, "merge_and_unload"):
        raise RGTGError(f"the {role} is a {type(model).__name__}: pass what its merge_and_unload() returns")
    if not isinstance(model, PreTrainedModel):
        raise RGTGError(
            f"the {role} is {shown(source)}: pass a path, a hub id or (model, tokenizer), a transformers model first"
        )
    if model is source:
        raise RGTGError(
            f"the {role} is a {type(model).__name__} alone: pass (model, tokenizer), or (model, None) for ids"
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RGTGError(
            f"the {role}'s tokenizer is {shown(tokenizer)}: pass a transformers tokenizer, or None for prompts of ids"
        )
    return model, tokenizer


def refusal(model: PreTrainedModel, length: int | None) -> str | None:
    """Why a model cannot work with a prefix cache of `length` tokens, or None.

    Args:
        length: tokens that a row may reach, None for the model's whole context.
    """
    config: Any = model.config.get_text_config()
    reason, nearest = _structure(model, config), _exceeded(config, length)
    if nearest is None:
        return reason
    cache = "its whole context" if length is None else f"{length} tokens"
    way_out = f"max_length={nearest.tokens} works" if reason is None else f"besides, {reason}"
    return f"it {nearest.beyond}, the cache is for {cache} ({way_out})"


def _exceeded(config: Any, length: int | None) -> Limit | None:
    """The first of the model's limits that a cache of `length` tokens exceeds."""
    context = _context(config)
    reach = min((tokens for tokens in (length, context) if tokens is not None), default=None)
    nearest = min(limits(config), default=None)
    return None if nearest is None or (reach is not None and reach <= nearest.tokens) else nearest


def _structure(model: PreTrainedModel, config: Any) -> str | None:
    """Why a model cannot work with a prefix cache of any length, or None."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    recurrent = [name for name in _RECURRENT if name in str(config.model_type)]
    kinds = set(getattr(config, "layer_types", None) or [])
    if recurrent or model._is_stateful or kinds & {"linear_attention", "mamba", "recurrent", "conv"}:
        return "it keeps a recurrent state"
    if model.base_model is model:
        return "its trunk cannot be told from its head"
    if not model._supports_attention_backend:
        return "its attention cannot be replaced"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention logits"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "its keys and values are compressed (multi-head latent attention)"
    if _varied(config):
        return "its layers differ in the size of their heads"
    if _context(config) is None:
        return "its config names no length of its context (max_position_embeddings)"
    return unknown_kind(config)


def _varied(config: Any) -> bool:
    try:
        for name in ("head_dim", "num_key_value_heads"):
            getattr(config, name, None)
    except Exception:  # noqa: BLE001 - the class that transformers raises is private to it
        return True
    return False


def _context(config: Any) -> int | None:
    """Tokens of the context that a config names."""
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model's context holds."""
    config: Any = model.config.get_text_config()
    limit = int(config.max_position_embeddings)
    if limit < 2:
        raise RGTGError(
            f"{_title(model)} has a context of {limit} tokens by its config.json: put back the right one"
        )
    return limit


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
    source = as_source(source, "language model")
    if isinstance(source, tuple):
        model, tokenizer = source
        on = resolve_device(model.device if device is None else device)
        return _placed(model, on, model.dtype if dtype is None else resolve_dtype(dtype, on)), tokenizer
    on = resolve_device(device)
    kind = resolve_dtype(dtype, on)
    if is_adapter(source):
        return _policy(Adapter.load(source), on, kind)
    model, tokenizer, _ = read_pretrained(AutoModelForCausalLM, source, "language model", kind, on)
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
    wrong = adapter.shape_mismatch(base) if adapter.base_fingerprint is None else adapter.base_mismatch(base)
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
    source = as_source(source, "reward model")
    if isinstance(source, tuple):
        model, tokenizer = source
        _one_label(model.config, type(model).__name__)
        return _placed(model, lm.device, dtype or model.dtype), tokenizer
    kind = dtype or lm.dtype
    model, tokenizer, _ = read_pretrained(
        AutoModelForSequenceClassification,
        source,
        "reward model",
        kind,
        lm.device,
        configure=lambda config: _one_label(config, source),
    )
    return _placed(model, lm.device, kind), tokenizer


def adapter_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, None where the folder has none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return read_tokenizer(folder, "adapter")


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
    if adapter.base_mismatch(model) is not None:
        beneath = _beneath(model, dtype or model.dtype)
        if beneath is not None and adapter.base_mismatch(beneath[0]) is None:
            model, tokenizer = beneath
        else:
            refuse_bundled(adapter, model)
            if adapter.base_name:
                model, tokenizer = load_causal_lm(adapter.base_name, model.device, dtype or model.dtype)
    shape_mismatch = adapter.shape_mismatch(model)
    if shape_mismatch is not None:
        raise RGTGError(f"{shape_mismatch}: name the model that the adapter was trained on")
    own = adapter.merged(model)
    own.config._name_or_path = adapter.name
    return own, tokenizer


def refuse_bundled(adapter: Adapter, model: PreTrainedModel) -> None:
    """Refuses a guide that comes with the package beside another model than its own.

    Raises:
        RGTGError: the adapter comes with the package.
    """
    name = bundled.name_of(adapter.name)
    if name is not None:
        raise RGTGError(
            f"{name} cannot guide {_title(model)}: {bundled.BELONGS}; leave out lm, or use reward='contrastive', a "
            "reward model over this tokenizer, or 'text:PATH' with any reward model"
        )


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
    source = as_source(source, "reward model")
    if isinstance(source, tuple):
        model, tokenizer = source
        return _placed(model, lm.device, dtype or model.dtype), tokenizer
    kind = dtype or lm.dtype

    def causal(config: Any) -> None:
        made_as = config.architectures or [""]
        if "Classification" in made_as[0]:
            raise RGTGError(
                f"{source} is a {made_as[0]} and this guide needs a vocabulary head: "
                "use SequenceReward for a reward model with one label"
            )

    model, tokenizer, _ = read_pretrained(
        AutoModelForCausalLM, source, "reward model", kind, lm.device, configure=causal
    )
    return _placed(model, lm.device, kind), tokenizer


def language_runner(model: PreTrainedModel, engine: str, max_length: int | None) -> ModelRunner:
    """The base model as a ModelRunner, refused by name where it cannot work."""
    head: object = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RGTGError(
            f"{_title(model)} has no linear vocabulary head: use a causal language model ({TESTED})"
        )
    return _backbone(model, head, engine, max_length, "language model")


def reward_runner(model: PreTrainedModel, engine: str, max_length: int | None) -> ModelRunner:
    """A causal reward model as a ModelRunner, refused by name where it cannot work."""
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise RGTGError(
            f"{_title(model)} has no one-label `score` head over a causal trunk: for an encoder or another tokenizer "
            "use reward=TextReward(...)"
        )
    return _backbone(model, head, engine, max_length, "reward model")


def _backbone(
    model: PreTrainedModel, head: nn.Linear, engine: str, max_length: int | None, role: str
) -> ModelRunner:
    cannot = f"{_title(model)} cannot serve as {role}"
    attention = attentions(model)
    try:
        return _verified(model.eval(), head, engine, max_length, cannot)
    except Exception as error:
        # The model stays its owner's, as it was.
        restore_attentions(attention)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        if isinstance(error, RGTGError):
            known = type(model).__name__ in str(error)
            raise (error if known else RGTGError(f"{cannot}: {error}")) from error.__cause__
        # A family's own code raises what it likes over a cache that it does not know.
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise RGTGError(f"{cannot}: its forward fails ({detail}); tested families: {TESTED}") from error


def _verified(
    model: PreTrainedModel, head: nn.Linear, engine: str, max_length: int | None, cannot: str
) -> ModelRunner:
    """A ModelRunner that computes what the model does, up to the length asked for."""
    config: Any = model.config.get_text_config()
    reason, nearest = refusal(model, max_length), _exceeded(config, max_length)
    refused = None if reason is None else RGTGError(f"{cannot}: {reason}; tested families: {TESTED}")
    if refused is not None and (nearest is None or _structure(model, config) is not None):
        raise refused
    limit = context_length(model) if max_length is None else min(context_length(model), max_length)
    # A shorter length is only named as the way out where it is one.
    runner = ModelRunner(model, head, engine, limit if nearest is None else min(limit, nearest.tokens))
    runner.verify()
    if refused is not None:
        raise refused
    return runner


def _title(model: PreTrainedModel) -> str:
    name = model.config._name_or_path
    return f"{name} ({type(model).__name__})" if name else type(model).__name__


def _one_label(config: Any, name: object) -> None:
    if config.num_labels != 1:
        made_as = (config.architectures or [""])[0]
        causal = f" (it was saved as {made_as}, which has no reward head)" if "Classif" not in made_as else ""
        raise RGTGError(
            f"{name} has {config.num_labels} labels and a reward model needs 1{causal if made_as else ''}: use a model "
            "with num_labels=1"
        )


def _placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with fits_in_memory(_title(model), sum(p.numel() for p in model.parameters()), dtype):
        try:
            return model.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
        except ValueError as error:  # quantised weights cannot become another dtype
            raise RGTGError(
                f"{_title(model)} cannot be moved to {device} as {dtype} ({str(error)[:120]}): use an unquantised model"
            ) from error
