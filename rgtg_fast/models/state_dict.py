"""Compares the keys of a model's weight files with those of the model; differences are refused with a likely reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.checkpoint import names

# What a refusal says: what the files likely are, and what to do.
Reason = tuple[str, str]

# Buffers that older versions of transformers saved and newer ones compute.
_COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|causal_mask)$")
# Prefixes that wrappers add to every key, and where the files come from.
_WRAPPERS = {
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "_fsdp_wrapped_module.": "FSDP: save its full state dict",
    "_forward_module.": "Lightning Fabric: save the model inside it",
    "module.": "DistributedDataParallel or DeepSpeed: save model.module",
    "pretrained_model.": "TRL's model with a value head: save model.pretrained_model",
    "state_dict.": "a training framework: save the model inside it",
}
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|absmax|weight_scale|weight_scale_inv|weight_packed|SCB)$"
)
# Keys under which training frameworks' checkpoints keep the state dict.
_NESTED = {"state_dict", "model_state_dict", "model", "module"}
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_REWARD_HEADS = (
    "score.",
    "classifier.",
    "v_head.",
    "value_head.",
    "reward_head.",
    "regression_head.",
    "regression_layer.",
)


@dataclass(frozen=True)
class StateDictMismatch:
    """How the state dict in a model's files differs from the model's own.

    Attributes:
        missing: keys of the model alone; transformers initializes these weights at random.
        unexpected: keys of the files alone.
        mismatched: (shape in the files, shape in the model) by key, where the shapes differ.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, model: PreTrainedModel, info: dict[str, Any]) -> StateDictMismatch:
        """The differences that matter, without what a family computes itself or is known to ignore.

        Args:
            model: the loaded model.
            info: what transformers returns with `output_loading_info=True`.
        """
        buffers = [name for name, _ in model.named_buffers()]

        def matters(key: str) -> bool:
            return _COMPUTED.search(key) is None and not any(
                f".{name}".endswith(f".{key}") for name in buffers
            )

        unexpected = frozenset(filter(matters, info["unexpected_keys"]))
        if unexpected and "score" in dict(model.named_children()):
            # Many reward models are saved with their language model's vocabulary head, which is no part of the score.
            unexpected -= _vocabulary_head(model)
        return cls(
            frozenset(key for key in info["missing_keys"] if _COMPUTED.search(key) is None),
            unexpected,
            {key: (tuple(held), tuple(wanted)) for key, held, wanted in info["mismatched_keys"]},
        )

    def without_new_head(self, model: PreTrainedModel) -> tuple[StateDictMismatch, bool]:
        """The differences apart from a head that will be trained anew, and whether the files have no such head.

        Where a classifier's head is new, the files may hold a base model's vocabulary head.
        """
        head = head_name(model) + "."
        new = any(key.startswith(head) for key in self.missing)
        missing = frozenset(key for key in self.missing if not key.startswith(head))
        unexpected = self.unexpected
        if new and unexpected:
            unexpected -= _vocabulary_head(model)
        return replace(self, missing=missing, unexpected=unexpected), new

    def refuse(self, model: PreTrainedModel, source: object, role: str) -> None:
        """Raises an error where there is a difference.

        Args:
            model: the loaded model.
            source: folder or hub id that it was loaded from.
            role: what it is used as, for the message: "language model".

        Raises:
            RGTGError: with the first keys and a likely reason.
        """
        if not (self.missing or self.unexpected or self.mismatched):
            return
        parts = []
        if self.missing:
            parts.append(f"{names(self.missing)} missing from its files")
        if self.unexpected:
            parts.append(f"{names(self.unexpected)} not in the model")
        for key, (held, wanted) in sorted(self.mismatched.items())[:1]:
            parts.append(f"{key!r} {list(held)} in its files and {list(wanted)} by its config.json")
        what, way_out = self._other_format() or self._other_head(model) or self._other_config(model)
        kind = type(model).__name__
        raise RGTGError(f"{role} {str(source)!r} {what} ({kind}: {'; '.join(parts)}): {way_out}")

    def _other_format(self) -> Reason | None:
        nested = sorted(self.unexpected & _NESTED)
        if nested:
            return (
                f"holds its weights inside another object ({nested[0]})",
                "save the model with save_pretrained",
            )
        if any(map(_QUANTIZED.search, self.unexpected)):
            return "holds quantized weights that nothing here can read", "name the unquantized model"
        if any(map(_LORA.search, self.unexpected)):
            return (
                "holds an adapter that is not merged",
                "save model.merge_and_unload(), or name the adapter's folder",
            )
        wrapped = wrapper_of(self.unexpected)
        if wrapped is not None:
            return f"has names that begin with {wrapped[0]!r}", f"it was saved from {wrapped[1]}"
        prefixes = _other_prefix(self.missing, self.unexpected)
        if prefixes is None:
            return None
        theirs, ours = prefixes
        instead = f"where the model has {ours!r}" if ours else "before those of the model"
        return (
            f"has names with {theirs!r} {instead}",
            "rename them in the file, or save the model with save_pretrained",
        )

    def _other_head(self, model: PreTrainedModel) -> Reason | None:
        head = head_name(model) + "."
        headless = bool(self.missing) and all(key.startswith(head) for key in self.missing)
        theirs = sorted(key for key in self.unexpected if key.startswith(_REWARD_HEADS))
        if _is_causal(model):
            if theirs:
                return (
                    f"is a reward model ({theirs[0]!r} is its head)",
                    "pass it as reward, and a causal language model in its place",
                )
            if headless:
                return (
                    "has no trained vocabulary head",
                    "name a model saved with its head (AutoModelForCausalLM)",
                )
            return None
        # A new head replaces what is missing.
        if theirs and (headless or not self.missing):
            return (
                f"has another reward head ({theirs[0]!r}) than {type(model).__name__}",
                "name a model whose head is `score`, linear with one label and without a bias, or its base model",
            )
        if headless:
            return (
                "has no trained reward head",
                "name a reward model saved with its head (AutoModelForSequenceClassification, num_labels=1)",
            )
        return None

    def _other_config(self, model: PreTrainedModel) -> Reason:
        for key, (held, _) in self.mismatched.items():
            if key.startswith("score.") and held[0] != 1:
                return (
                    f"has a head of {held[0]} labels",
                    "a reward model needs 1: use a model with num_labels=1",
                )
        if self.mismatched:
            return (
                "has other shapes than its config.json",
                "restore the config.json that belongs to the weights",
            )
        depth = model.config.get_text_config().num_hidden_layers
        layers = {int(found[1]) for found in map(_LAYER.search, self.unexpected) if found is not None}
        if layers and min(layers) >= depth:
            return (
                f"holds {max(layers) + 1} layers and its config.json says num_hidden_layers={depth}",
                "restore the config.json that belongs to the weights",
            )
        if self.missing:
            return "lacks weights, which would be random", "complete the download, or save it again"
        return (
            "holds weights that the model does not have",
            "restore the config.json that belongs to them, or save it again",
        )


def wrapper_of(keys: Iterable[str]) -> tuple[str, str] | None:
    """The prefix that a wrapper has added to some keys, and the wrapper with what to do; None for none."""
    held = list(keys)
    for prefix, origin in _WRAPPERS.items():
        if any(key.startswith(prefix) or f".{prefix}" in key for key in held):
            return prefix, origin
    return None


def head_name(model: PreTrainedModel) -> str:
    """The name of a model's head: its vocabulary head, or a classifier's."""
    head: object = model.get_output_embeddings()
    children = dict(model.named_children())
    found = next((name for name, child in children.items() if child is head), None)
    return found or ("score" if "score" in children else "classifier")


def _is_causal(model: PreTrainedModel) -> bool:
    return isinstance(model.get_output_embeddings(), torch.nn.Module)


def _vocabulary_head(model: PreTrainedModel) -> frozenset[str]:
    """Keys that the causal language model over a classifier's trunk has and the classifier has not."""
    try:
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError):
        return frozenset()  # a family without one: its name for a head is unknown
    return frozenset(causal.state_dict()) - frozenset(model.state_dict())


def _other_prefix(missing: Iterable[str], unexpected: Iterable[str]) -> tuple[str, str] | None:
    """The prefixes (in the files, in the model) by which most missing keys differ from unexpected ones."""
    wanted, held = set(missing), set(unexpected)
    first = min((key for key in wanted if _LAYER.search(key)), default=None)
    if first is None:
        return None
    parts = first.split(".")
    for cut in range(len(parts) - 2):
        ours, rest = ".".join([*parts[:cut], ""]), ".".join(parts[cut:])
        for key in held:
            if key == rest or key.endswith(f".{rest}"):
                theirs = key.removesuffix(rest)
                moved = sum(
                    theirs + name.removeprefix(ours) in held for name in wanted if name.startswith(ours)
                )
                if theirs != ours and 2 * moved >= len(wanted):
                    return theirs, ours
    return None
