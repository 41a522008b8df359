"""Loads language models and reward models, and makes a ModelRunner of those that a prefix cache can serve."""

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
from rgtg_fast.errors import RGTGError, one_line, shown
from rgtg_fast.models.adapter import CONFIG, Adapter, is_adapter
from rgtg_fast.models.attention import attentions, restore_attentions
from rgtg_fast.models.device import fits_in_memory, resolve_device, resolve_dtype
from rgtg_fast.models.head_files import ClassifierLoader, check_labels
from rgtg_fast.models.heads import SCORE, Head, RewardHead, with_reward_head
from rgtg_fast.models.model_state import lock_of
from rgtg_fast.models.pretrained import read_pretrained, read_tokenizer
from rgtg_fast.models.quantized import quantization
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.models.support import (
    TESTED_FAMILIES,
    changes_beyond,
    context_length,
    exceeded_limit,
    refusal,
    title,
    unsupported_architecture,
)
from rgtg_fast.models.verification import verify

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
Source = str | os.PathLike[str] | ModelAndTokenizer


# ---- models and tokenizers -------------------------------------------------------------------------------------------


def load_causal_lm(
    source: Source,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool = False,
    tp_plan: str | None = None,
) -> ModelAndTokenizer:
    """Loads the base language model and its tokenizer.

    Args:
        source: a path or hub id, or a loaded pair. An adapter's folder (a trained policy) is merged into a copy of
            its base.
        device: None keeps a loaded pair where it is, and takes the default of `resolve_device` otherwise.
        dtype: None keeps a loaded pair's, and takes the default of `resolve_dtype` otherwise.
        trust_remote_code: whether code that comes with this model may run; never that of an adapter's base.
        tp_plan: "auto" spreads the weights over the processes of the run, which has checked it (`check_plan`).

    Raises:
        RGTGError: nothing there, or an adapter of a reward model or of another base.
    """
    source = _as_source(source, "language model")
    if isinstance(source, tuple):
        model, tokenizer = source
        target = resolve_device(model.device if device is None else device)
        kind = None if dtype is None else resolve_dtype(dtype, target)
        _check_dtype(model, kind)
        return _place(model, target, kind or model.dtype), tokenizer
    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    if is_adapter(source):
        if tp_plan is not None:
            raise RGTGError(
                f"tp_plan={tp_plan!r} and {source}, an adapter: merge it into its base and name that"
            )
        return _load_policy(Adapter.load(source), target, kind)
    model, tokenizer, _ = read_pretrained(
        AutoModelForCausalLM,
        source,
        "language model",
        kind,
        target,
        trust_remote_code=trust_remote_code,
        tp_plan=tp_plan,
    )
    _check_dtype(model, None if dtype is None else kind)
    return _place(model, target, kind), tokenizer


def load_sequence_classifier(
    source: Source,
    lm: PreTrainedModel | ModelRunner,
    dtype: torch.dtype | None,
    label: str | int | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> ModelAndTokenizer:
    """Loads a reward model that gives one score, and its tokenizer.

    Over a causal trunk the model's `score` is linear with one output, or a `RewardHead`.

    Args:
        source: a path or hub id, or a loaded pair.
        lm: the base model.
        dtype: None keeps a loaded pair's, and takes the base model's otherwise.
        label: name or index of the label that is the reward, where there are several.
        trust_remote_code: whether code that comes with this model may run.
        device: None for the base model's.

    Raises:
        RGTGError: nothing there, several labels and none chosen, no trained head in the files, or a head that is not
            served.
    """
    source, place = _as_source(source, "reward model"), device or lm.device
    if isinstance(source, tuple):
        model, tokenizer = source
        name = type(model).__name__
        check_labels(model.config, label, name)
        _check_dtype(model, dtype)
        return _place(with_reward_head(model, label, name), place, dtype or model.dtype), tokenizer
    loader, kind = ClassifierLoader(AutoModelForSequenceClassification, source, label), dtype or lm.dtype
    model, tokenizer, _ = read_pretrained(
        loader,
        source,
        "reward model",
        kind,
        place,
        configure=loader.configure,
        trust_remote_code=trust_remote_code,
    )
    _check_dtype(model, dtype)
    return _place(loader.finished(model), place, kind), tokenizer


def load_vocabulary_model(
    source: Source,
    lm: PreTrainedModel | ModelRunner,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> ModelAndTokenizer:
    """Loads a reward model that is a causal language model; arguments as in `load_sequence_classifier`.

    Raises:
        RGTGError: nothing there, or no vocabulary head in the files.
    """
    source, place = _as_source(source, "reward model"), device or lm.device
    if isinstance(source, tuple):
        model, tokenizer = source
        _check_dtype(model, dtype)
        return _place(model, place, dtype or model.dtype), tokenizer
    model, tokenizer, _ = read_pretrained(
        AutoModelForCausalLM,
        source,
        "reward model",
        dtype or lm.dtype,
        place,
        configure=lambda config: _check_vocabulary_head(config, source),
        trust_remote_code=trust_remote_code,
    )
    _check_dtype(model, dtype)
    return _place(model, place, dtype or lm.dtype), tokenizer


def _as_source(source: Any, role: str) -> Source:
    """Checks that a source is a path or hub id, or a (model, tokenizer) pair.

    Raises:
        RGTGError: something else; the message says what to pass.
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


def _check_vocabulary_head(config: Any, name: object) -> None:
    made_as = (config.architectures or [""])[0]
    if "Classification" in made_as:
        raise RGTGError(
            f"{name} is a {made_as} and this reward needs a vocabulary head: "
            "use SequenceReward for a reward model with one label"
        )


def _place(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Moves a model to its device and dtype, in evaluation mode; quantized weights keep their dtype."""
    if quantization(model) is not None:
        return _place_quantized(model, device)
    with fits_in_memory(title(model), sum(p.numel() for p in model.parameters()), dtype):
        return model.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]


def _place_quantized(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    if model.device != device:
        with fits_in_memory(title(model), None, model.dtype):
            try:
                model.to(device=device)  # pyright: ignore[reportCallIssue, reportArgumentType]
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise RGTGError(
                    f"{title(model)} is quantized ({quantization(model)}) on {model.device} and cannot be moved to "
                    f"{device} ({one_line(error, 120)}): load it there"
                ) from error
    return model.eval()


def _check_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Refuses to cast a model with quantized weights.

    Raises:
        RGTGError: another dtype was asked for.
    """
    method = quantization(model)
    if method is not None and dtype not in (None, model.dtype):
        kind = str(dtype).removeprefix("torch.")
        raise RGTGError(
            f"{title(model)} is quantized ({method}) for {str(model.dtype).removeprefix('torch.')} and is not cast to "
            f"{kind}: leave out dtype, or quantize it for {kind}"
        )


# ---- adapters and their bases ----------------------------------------------------------------------------------------


def adapter_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, None where the folder has none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return read_tokenizer(folder, "adapter")


def adapter_model(
    adapter: Adapter,
    base: ModelAndTokenizer,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
) -> ModelAndTokenizer:
    """Merges an adapter into a copy of its base.

    Args:
        adapter: the adapter.
        base: copied where it is the adapter's base. Where it is a policy made from that base, the base is loaded by
            the name in the policy's adapter, else by the name in this adapter.
        dtype: dtype of a base that is loaded; None for the given one's.
        device: of the merged model; None for the given base's.

    Returns:
        The merged model and the base's tokenizer.

    Raises:
        RGTGError: the adapter does not fit its base.
    """
    model, tokenizer = base
    if adapter.base_mismatch(model) is None and quantization(model) is not None:
        # It was rounded once it was loaded, and its files have the weights that the adapter was trained on.
        model, tokenizer = load_causal_lm(model.config._name_or_path, model.device, dtype or model.dtype)
    elif adapter.base_mismatch(model) is not None:
        beneath = _base_of_policy(model, dtype or model.dtype)
        if beneath is not None and adapter.base_mismatch(beneath[0]) is None:
            model, tokenizer = beneath
        else:
            refuse_bundled(adapter, model)
            if adapter.base_name:
                model, tokenizer = load_causal_lm(adapter.base_name, model.device, dtype or model.dtype)
    shape_mismatch = adapter.shape_mismatch(model)
    if shape_mismatch is not None:
        raise RGTGError(f"{shape_mismatch}: name the model that the adapter was trained on")
    merged = adapter.merged(model)
    merged.config._name_or_path = adapter.name
    return merged if device is None else _place(merged, device, merged.dtype), tokenizer


def refuse_bundled(adapter: Adapter, model: PreTrainedModel) -> None:
    """Refuses a bundled reward model beside another model than its own.

    Raises:
        RGTGError: the adapter comes with the package.
    """
    name = bundled.name_of(adapter.name)
    if name is not None:
        raise RGTGError(
            f"{name} cannot guide {title(model)}: {bundled.BELONGS}; leave out lm, or use reward='contrastive', a "
            "reward model over this tokenizer, or 'text:PATH' with any reward model"
        )


def _load_policy(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> ModelAndTokenizer:
    """A trained policy: its base with the adapter merged, and the tokenizer saved with it."""
    if adapter.head is not None and adapter.head_name == "score":
        raise RGTGError(
            f"{adapter.name} is a reward model's adapter: pass it as reward, and a language model as lm"
        )
    base, tokenizer = _load_base(adapter, device, dtype)
    model = adapter.merged(base)
    model.generation_config = base.generation_config
    model.config._name_or_path = adapter.name
    return _place(model, device, dtype), adapter_tokenizer(adapter.name) or tokenizer


def _load_base(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> ModelAndTokenizer:
    if not adapter.base_name:
        raise RGTGError(f"{adapter.name} names no base model: add base_model_name_or_path to its {CONFIG}")
    base, tokenizer = load_causal_lm(adapter.base_name, device, dtype)
    wrong = adapter.shape_mismatch(base) if adapter.base_fingerprint is None else adapter.base_mismatch(base)
    if wrong is not None:
        raise RGTGError(
            f"{wrong}: restore the model that it was trained on, or use one that was saved merged"
        )
    return base, tokenizer


def _base_of_policy(model: PreTrainedModel, dtype: torch.dtype) -> ModelAndTokenizer | None:
    """The base of a policy that was loaded from its adapter; a reward model may have been trained on the same base."""
    name = model.config._name_or_path
    return _load_base(Adapter.load(name), model.device, dtype) if is_adapter(name) else None


# ---- runners ---------------------------------------------------------------------------------------------------------


def language_runner(model: PreTrainedModel, engine: str, max_length: int | None) -> ModelRunner:
    """Makes a ModelRunner of a causal language model.

    Args:
        model: the model, whose attention implementation is replaced.
        engine: `"auto"`, `"native"`, `"triton"` or `"transformers"`.
        max_length: tokens of a row at most, None for the model's context.

    Raises:
        RGTGError: a model that cannot be served, with its name and the reason.
    """
    head: object = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RGTGError(
            f"{title(model)} has no linear vocabulary head: use a causal language model ({TESTED_FAMILIES})"
        )
    return _runner(model, head, engine, max_length, "language model")


def reward_runner(model: PreTrainedModel, engine: str, max_length: int | None) -> ModelRunner:
    """Makes a ModelRunner of a causal reward model with one score; arguments and errors as in `language_runner`."""
    head = dict(model.named_children()).get(SCORE)
    if not isinstance(head, (nn.Linear, RewardHead)) or head.out_features != 1:
        raise RGTGError(
            f"{title(model)} has no one-label `score` head over a causal trunk: for an encoder or another tokenizer "
            "use reward=TextReward(...)"
        )
    return _runner(model, head, engine, max_length, "reward model")


def _runner(
    model: PreTrainedModel, head: Head, engine: str, max_length: int | None, role: str
) -> ModelRunner:
    """A verified ModelRunner; a model that is refused gets its own attention back."""
    with lock_of(model):
        return _locked_runner(model, head, engine, max_length, role)


def _locked_runner(
    model: PreTrainedModel, head: Head, engine: str, max_length: int | None, role: str
) -> ModelRunner:
    cannot = f"{title(model)} cannot serve as {role}"
    attention = attentions(model)
    try:
        return _verified_runner(model.eval(), head, engine, max_length, cannot)
    except Exception as error:
        restore_attentions(attention)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        if isinstance(error, RGTGError):
            named = type(model).__name__ in str(error)
            raise (error if named else RGTGError(f"{cannot}: {error}")) from error.__cause__
        # A family's own code may raise anything over a cache that it does not know.
        detail = f"{type(error).__name__}: {one_line(error)}"[:160]
        raise RGTGError(
            f"{cannot}: its forward fails ({detail}); tested families: {TESTED_FAMILIES}"
        ) from error


def _verified_runner(
    model: PreTrainedModel, head: Head, engine: str, max_length: int | None, cannot: str
) -> ModelRunner:
    """A ModelRunner whose cached forward equals the model's own, up to the requested length."""
    config = model.config.get_text_config()
    reason = refusal(model, max_length)
    nearest = exceeded_limit(config, max_length)
    refused = None if reason is None else RGTGError(f"{cannot}: {reason}; tested families: {TESTED_FAMILIES}")
    if refused is not None and (nearest is None or unsupported_architecture(model) is not None):
        raise refused
    limit = context_length(model) if max_length is None else min(context_length(model), max_length)
    # The message of `refused` offers a shorter length: verify that the model works with it.
    served = limit if nearest is None else min(limit, nearest.tokens)
    runner = ModelRunner(model, head, engine, served)
    try:
        verify(runner)
    except RGTGError:
        if engine != "auto" or runner.engine != "triton":
            raise
        # A version of transformers may compute what our ops do not; its own blocks do.
        runner = ModelRunner(model, head, "transformers", served)
        verify(runner)
    if refused is None and max_length is not None and max_length > limit and changes_beyond(config, limit):
        refused = RGTGError(
            f"{cannot}: beyond its context every further token changes all frequencies of its dynamic rope, the cache "
            f"is for {max_length} tokens (max_length={limit} works)"
        )
    if refused is not None:
        raise refused
    return runner
