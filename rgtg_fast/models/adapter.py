"""LoRA adapters in PEFT's format: reads and checks their files, and merges them into copies of their base."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.checkpoint import error_prefix, names, read_json, read_tensors
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.models.int8 import INT8
from rgtg_fast.models.quantized import quantization, refuse_quantized
from rgtg_fast.models.state_dict import wrapper_of
from rgtg_fast.models.support import model_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# What this library's trainer writes beside PEFT's files.
RECIPE = "rgtg_fast.json"
HEADS = ("score", "lm_head")

_MAX_ALPHA = torch.finfo(torch.float32).max
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight$")
# What PEFT can change beside adding B·A to a linear layer: (its option, the change in words).
_UNSUPPORTED = (
    ("use_dora", "DoRA magnitudes"),
    ("lora_bias", "biases of the low-rank part"),
    ("trainable_token_indices", "retrained token embeddings"),
    ("layer_replication", "replicated layers"),
    ("target_parameters", "adapted parameters outside linear layers"),
    ("alora_invocation_tokens", "activation by tokens (aLoRA)"),
    ("use_qalora", "grouped inputs (QALoRA)"),
    ("use_bdlora", "block-diagonal factors (BD-LoRA)"),
    ("kasa_config", "singular values (KaSA)"),
    ("monteclora_config", "sampled factors (MonteCLoRA)"),
    ("arrow_config", "routed adapters (Arrow)"),
    ("lora_ga_config", "changed base weights (LoRA-GA)"),
)
# Initializations of LoRA that also change the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def is_adapter(source: object) -> bool:
    """Whether `source` is a folder with an adapter in PEFT's format."""
    try:
        return isinstance(source, (str, os.PathLike)) and (Path(source) / CONFIG).is_file()
    except OSError:  # too long to be a path
        return False


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a causal transformer.

    Raises:
        RGTGError: a family that keeps its blocks under another name than `layers` or `h`.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.base_model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and name.split(".")[-1] in ("layers", "h")
            and len(module) == count
        ):
            return module
    raise RGTGError(
        f"{type(model).__name__} keeps its {count} blocks under a name that adapters do not know "
        "(layers or h): use a merged reward model"
    )


@dataclass(frozen=True)
class LowRank:
    """The low-rank update y += (x aᵀ) bᵀ of one linear layer.

    Attributes:
        a: [r, inner], float32.
        b: [outer, r], float32, multiplied by the scale α/r.

    Raises:
        RGTGError: shapes that do not fit together.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __post_init__(self) -> None:
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            raise RGTGError(
                f"a low-rank update has factors A {list(a)} and B {list(b)}: use [r, inner] and [outer, r], r >= 1"
            )

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same update on another device and in another dtype."""
        return LowRank(self.a.to(device, dtype), self.b.to(device, dtype))


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and the head saved with it.

    Attributes:
        name: the folder.
        base_name: name or path of the base model in PEFT's configuration.
        base_fingerprint: `fingerprint` of the base model, None where another library trained the adapter.
        low_rank: the updates by block and linear layer, for example (3, "self_attn.q_proj").
        head: the saved head in float32: [1, E] of a reward, or [V, E]; None where none was saved.
        head_name: `"score"` or `"lm_head"`, the module that it replaces.
        targets: last parts of the names of the linear layers that are adapted in every block from the fork on; empty
            where the configuration does not list them.
    """

    name: str
    base_name: str
    base_fingerprint: str | None
    low_rank: dict[tuple[int, str], LowRank]
    head: nn.Linear | None
    head_name: str
    targets: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Reads an adapter's files; PEFT need not be installed.

        Args:
            folder: the folder that the adapter was saved to.

        Raises:
            RGTGError: no adapter there, or one that changes more than linear layers by B·A and a head.
        """
        path = Path(folder)
        if not is_adapter(path):
            raise RGTGError(
                f"{str(folder)!r} contains no {CONFIG}: name the folder that an adapter was saved to"
            )
        broken = f"the adapter {str(path)!r} cannot be read"
        with error_prefix(broken):
            config = read_json(path / CONFIG)
        _check_config(config, path)
        if not (path / WEIGHTS).is_file():
            raise RGTGError(f"{str(folder)!r} contains no {WEIGHTS}: save the adapter with safetensors")
        with error_prefix(broken):
            recipe = read_json(path / RECIPE) if (path / RECIPE).is_file() else {}
            tensors = read_tensors(path / WEIGHTS)
        factors, heads = _split_tensors(tensors, path)
        # A missing classifier's head is refused in `reward_head`, since it may have one of several names.
        if "lm_head" in (config.get("modules_to_save") or []) and "lm_head.weight" not in heads:
            raise RGTGError(
                f"{path} trained lm_head (modules_to_save) and its file contains none: save it again"
            )
        low_rank = {}
        for module, pair in factors.items():
            update = _low_rank(pair, config, module, path)
            layer, name = _LAYER.search(module).groups()  # pyright: ignore[reportOptionalMemberAccess]
            if (int(layer), name) in low_rank:
                raise RGTGError(f"{path} holds two pairs of factors for layer {layer} {name}: save it again")
            low_rank[int(layer), name] = update
        return cls(
            name=str(folder),
            base_name=str(config.get("base_model_name_or_path") or ""),
            base_fingerprint=recipe.get("base_fingerprint"),
            low_rank=low_rank,
            head=_head(heads, path),
            head_name=min(heads, default="lm_head").split(".")[0],
            targets=_targets(config),
        )

    @property
    def fork(self) -> int | None:
        """The first block that the adapter changes, None where it changes none (a head on the frozen trunk)."""
        return min((layer for layer, _ in self.low_rank), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors in float32."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.low_rank.values())

    def base_mismatch(self, model: PreTrainedModel) -> str | None:
        """Why this model is not the adapter's base; None where it is.

        The base's fingerprint decides where the adapter has it, else the base's name.
        """
        # Weights in 8 bits are beside the factors, which stay as they are.
        if (method := quantization(model)) not in (None, INT8):
            return self._on_quantized(model, method)
        if self.base_fingerprint is not None:
            if fingerprint(model) == self.base_fingerprint:
                return self.shape_mismatch(model)
            return f"{self.name} was trained on other weights than those of {model_name(model)}"
        if not self.base_name or not _same_name(self.base_name, model.config._name_or_path):
            return f"{self.name} was trained on {self.base_name or 'an unnamed model'}, not on {model_name(model)}"
        return self.shape_mismatch(model)

    def shape_mismatch(self, model: PreTrainedModel) -> str | None:
        """The first of the adapter's shapes that does not fit a model, in words; None where all do.

        Raises:
            RGTGError: the adapter's file lacks factors that its configuration lists.
        """
        if (method := quantization(model)) not in (None, INT8):
            return self._on_quantized(model, method)
        layers = decoder_layers(model)
        for (layer, name), pair in self.low_rank.items():
            where = f"layer {layer} {name}"
            parts = dict(layers[layer].named_modules()) if 0 <= layer < len(layers) else {}
            module = parts.get(name)
            if module is None:
                return f"{self.name} changes {where}, which {model_name(model)} does not have"
            shape = (len(pair.b), pair.a.shape[1])
            if linear_shape(module) != shape:
                return (
                    f"{self.name} is {shape} at {where}, where {model_name(model)} has {linear_shape(module)}"
                )
        missing = self._missing_factors(layers)
        if missing:
            raise RGTGError(
                f"{self.name} adapts {', '.join(self.targets)} and its file lacks the factors of {names(missing)}: "
                "save it again"
            )
        width = model.config.get_text_config().hidden_size
        if self.head is not None and self.head.in_features != width:
            return f"{self.name} has a head on {self.head.in_features} numbers and {model_name(model)} gives {width}"
        return None

    def _on_quantized(self, model: PreTrainedModel, method: str | None) -> str:
        return f"{self.name} changes plain weights and those of {model_name(model)} are quantized ({method})"

    def _missing_factors(self, layers: nn.ModuleList) -> list[str]:
        """Linear layers from the fork on that the adapter's configuration lists and its file does not hold."""
        fork = self.fork
        if fork is None:
            return []  # a head alone
        return [
            f"layer {number} {name}"
            for number, layer in enumerate(layers)
            if number >= fork
            for name, module in layer.named_modules()
            if name.split(".")[-1] in self.targets
            and linear_shape(module) is not None
            and (number, name) not in self.low_rank
        ]

    def reward_head(self) -> nn.Linear:
        """The one-label head.

        Raises:
            RGTGError: the adapter has none.
        """
        if self.head is None or self.head.out_features != 1:
            labels = "no head" if self.head is None else f"a head of {self.head.out_features} labels"
            raise RGTGError(
                f"{self.name} was saved with {labels} and a reward model needs one label: "
                "train it with num_labels=1 and modules_to_save=['score']"
            )
        return self.head

    def merged(self, base: PreTrainedModel) -> PreTrainedModel:
        """Merges the adapter into a copy of its base; sums are computed in float32 and rounded to the base's dtype.

        Args:
            base: the adapter's base model, which does not change.

        Returns:
            A sequence classifier where the adapter has a `score` head, else a causal language model.

        Raises:
            RGTGError: the base's weights are quantized.
        """
        refuse_quantized(base, "have an adapter merged into them")
        config = copy.deepcopy(base.config)
        with base.device:
            if self.head is not None and self.head_name == "score":
                config.num_labels = self.head.out_features
                own = AutoModelForSequenceClassification.from_config(
                    config, dtype=base.dtype, trust_remote_code=False
                )
                own.base_model.load_state_dict(base.base_model.state_dict())
            else:
                own = AutoModelForCausalLM.from_config(config, dtype=base.dtype, trust_remote_code=False)
                own.load_state_dict(base.state_dict())
        layers = decoder_layers(own)
        exact = torch.promote_types(base.dtype, torch.float32)
        with torch.no_grad():
            for (layer, name), pair in self.low_rank.items():
                module: Any = layers[layer].get_submodule(name)
                pair = pair.to(base.device, exact)
                change = pair.b @ pair.a
                module.weight += change if isinstance(module, nn.Linear) else change.T
        if self.head is not None:
            setattr(own, self.head_name, copy.deepcopy(self.head).to(base.device, base.dtype))
        return own.eval()


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(outer, inner) of a linear layer or of GPT-2's transposed one; None for other modules."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    outer, inner = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    return int(outer), int(inner)


def _same_name(one: str, other: str) -> bool:
    if one == other:
        return True
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()


# ---- PEFT's files ----------------------------------------------------------------------------------------------------


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Refuses an adapter that is more than a LoRA of linear layers."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RGTGError(f"{path} is a {kind} adapter: only LORA can be served, or a merged model")
    for option, what in _UNSUPPORTED:
        if config.get(option):
            raise RGTGError(
                f"{path} has {what} ({option}), which cannot be served: merge it into a full model"
            )
    if config.get("bias", "none") != "none":
        raise RGTGError(
            f"{path} trained biases (bias={config['bias']!r}): train with bias='none' or merge it"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise RGTGError(
            f"{path} began with init_lora_weights={start!r}, which changes the base weights: save it converted, "
            "or merge it"
        )


def _targets(config: dict[str, Any]) -> tuple[str, ...]:
    """Last parts of the names of linear layers that PEFT adapts in every block; empty for other selections."""
    targets = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if narrowed or not isinstance(targets, list):
        return ()
    return tuple(sorted(name for name in targets if isinstance(name, str) and "." not in name))


def _split_tensors(
    tensors: dict[str, torch.Tensor], path: Path
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The file's tensors: factors by their linear layer, and a head's by name."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise RGTGError(
                f"{path / WEIGHTS}: {key} holds NaN or an infinity: the file or its training is broken"
            )
    factors: dict[str, dict[str, torch.Tensor]] = {}
    heads: dict[str, torch.Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix("base_model.model.")
        found = _FACTOR.fullmatch(name)
        if found is not None and _LAYER.search(found[1]):
            factors.setdefault(found[1], {})[found[2]] = tensor
            continue
        parts = name.replace("modules_to_save.", "").split(".")
        if len(parts) != 2 or parts[0] not in HEADS or parts[1] not in ("weight", "bias"):
            wrapped = wrapper_of([key])
            if wrapped is not None:
                raise RGTGError(f"{path} holds {key[:120]!r}: it was saved from {wrapped[1]}")
            raise RGTGError(
                f"{path} holds {key!r}: beside linear layers' factors only a head ({' or '.join(HEADS)}) can be "
                "served; merge it into a full model"
            )
        heads[".".join(parts)] = tensor
    return factors, heads


def _low_rank(pair: dict[str, torch.Tensor], config: dict[str, Any], module: str, path: Path) -> LowRank:
    """The update of one linear layer, from its factors A [r, inner] and B [outer, r]."""
    if set(pair) != {"A", "B"}:
        raise RGTGError(f"{path}: {module} has only one of its two factors (lora_{min(pair)}): save it again")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise RGTGError(
            f"{path}: {module} has the factors A {list(a.shape)} and B {list(b.shape)}, which are not [r, inner] and "
            "[outer, r] of one rank r: save it again"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise RGTGError(f"{path}: {module} has factors of dtype {a.dtype} and {b.dtype}: save it unquantized")
    rank = _pattern(config, "rank_pattern", module, config.get("r", 8))
    if rank != len(a):
        raise RGTGError(
            f"{path}: {module} has rank {len(a)} in its file and r={rank!r} in its {CONFIG}: restore the one that "
            "belongs to it"
        )
    scaled = b.float() * _scale(config, module, len(a), path)
    return LowRank(a.float().contiguous(), scaled.contiguous())


def _pattern(config: dict[str, Any], name: str, module: str, usual: Any) -> Any:
    """One module's value of a setting: that of the first pattern that matches its name, else the usual one."""
    patterns = config.get(name) or {}
    try:
        matching = (own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(matching, usual)
    except (AttributeError, re.error) as error:
        raise RGTGError(
            f"{name}={patterns!r} of an adapter's {CONFIG} is not a mapping of patterns: put it back"
        ) from error


def _scale(config: dict[str, Any], module: str, rank: int, path: Path) -> float:
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= _MAX_ALPHA:
        raise RGTGError(f"{path / CONFIG}: lora_alpha={alpha!r} is not a finite number: put it back")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _head(tensors: dict[str, torch.Tensor], path: Path) -> nn.Linear | None:
    held = sorted({key.split(".")[0] for key in tensors})
    if not held:
        return None
    if len(held) > 1 or f"{held[0]}.weight" not in tensors:
        raise RGTGError(f"{path} holds {', '.join(sorted(tensors))}: save one head with its weight")
    weight, bias = tensors[f"{held[0]}.weight"], tensors.get(f"{held[0]}.bias")
    shapes = [list(x.shape) for x in (weight, bias) if x is not None]
    if (
        weight.ndim != 2
        or 0 in weight.shape
        or (bias is not None and bias.shape != weight.shape[:1])
        or not weight.is_floating_point()
    ):
        raise RGTGError(
            f"{path} holds a head of {weight.dtype} and the shapes {shapes}: save a linear layer as its head"
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.float().contiguous(), requires_grad=False)
    return head
