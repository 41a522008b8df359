"""Reward heads: what turns a state of a causal trunk into one reward.

Most reward models have a linear layer with one output, which stays as it is. Every other head becomes a `RewardHead`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.cpp_layers import linear
from rgtg_fast.ops import _extension

# The module of a sequence classifier over a causal trunk that gives its scores.
SCORE = "score"
# Modules that change every number on its own, or nothing at all where no model is trained.
_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Dropout, nn.Identity)
# Names under which cross-encoders' configurations have the function of their scores (sentence-transformers).
_ACTIVATIONS: dict[str, nn.Module | None] = {
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid(),
    "torch.nn.modules.activation.Tanh": nn.Tanh(),
}


class RewardHead(nn.Module):
    """A head that is more than a linear layer with one output: an MLP, one label of several, a scaled or bounded score.

    Its weights keep their dtype where the trunk's changes, and rewards are computed in at least float32.

    Args:
        layers: linear layers and elementwise functions, in the order of their execution.
        label: the output of the last linear layer that is the reward; None where it has one.
        normal: (mean, std) by which that output x becomes (x − mean) / std; None for x itself.

    Raises:
        RGTGError: a layer of another kind, or widths that do not follow each other.
    """

    out_features = 1

    def __init__(
        self,
        layers: Sequence[nn.Module],
        label: int | None = None,
        normal: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.layers, self.label, self.normal = nn.ModuleList(layers), label, normal
        linears = self.linears()
        other = [x for x in layers if not _readable(x)]
        if other or not linears:
            kind = "no linear layer" if not other else type(other[0]).__name__
            kind += " with hooks" if other and _hooked(other[0]) else ""
            raise RGTGError(
                f"its reward head holds {kind}: unquantized linear layers and elementwise functions are served, use "
                "TextReward(f) with a function f that calls the model's own code"
            )
        widths = [(x.in_features, x.out_features) for x in linears]
        outputs = 1 if label is None else linears[-1].out_features
        fit = all(one[1] == other[0] for one, other in pairwise(widths))
        if not fit or widths[-1][1] != outputs or not 0 <= (label or 0) < outputs:
            raise RGTGError(
                f"its reward head has layers of (inputs, outputs) {widths}, whose output {label or 0} is no score: "
                "use a reward model with one score"
            )

    def linears(self) -> list[nn.Linear]:
        """The linear layers."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def in_features(self) -> int:
        """The width of a state."""
        return self.linears()[0].in_features

    def parts(self, layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a linear layer; of the last one those of the label, normalized.

        They are made from the layer at every call, since its owner may change it.
        """
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if layer is not self.linears()[-1]:
            return weight, bias
        if self.label is not None:
            row = slice(self.label, self.label + 1)
            weight, bias = weight[row], None if bias is None else bias[row]
        if self.normal is not None:
            (mean, std), dtype = self.normal, torch.promote_types(weight.dtype, torch.float32)
            bias = weight.new_zeros(1) if bias is None else bias
            weight, bias = (weight.double() / std).to(dtype), ((bias.double() - mean) / std).to(dtype)
        return weight, bias

    def scores(self, states: torch.Tensor, product: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Rewards [...] for states [..., E].

        Args:
            states: any floating dtype.
            product: computes x weightᵀ + bias of x [N, inner].
        """
        x = states.to(torch.promote_types(states.dtype, torch.float32)).reshape(-1, states.shape[-1])
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                weight, bias = (part if part is None else part.to(x.dtype) for part in self.parts(layer))
                x = product(x, weight.contiguous(), bias)  # pyright: ignore[reportOptionalMemberAccess]
            elif isinstance(layer, nn.ReLU):
                x = x.relu()
            elif not isinstance(layer, (nn.Dropout, nn.Identity)):
                # torch computes the end of a tensor by other instructions, whose float32 results may differ.
                x = layer(x.double()).to(x.dtype)
        return x.view(states.shape[:-1])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Rewards [..., 1] for states [..., E]."""
        return self.scores(states, functional.linear).unsqueeze(-1)

    def __repr__(self) -> str:
        return f"RewardHead({describe(self)})"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RewardHead:
        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(keeping_dtype, recurse)


def _readable(layer: nn.Module) -> bool:
    """Whether a module computes what its class and its weight say; a quantized weight has other shapes or integers.

    A subclass or a hook may compute something else, and so may a method of the module's own.
    """
    if _hooked(layer) or type(layer) in _ELEMENTWISE:
        return not _hooked(layer)
    if type(layer) is not nn.Linear:
        return False
    shape = (layer.out_features, layer.in_features)
    return layer.weight.is_floating_point() and tuple(layer.weight.shape) == shape


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


Head: TypeAlias = nn.Linear | RewardHead


def scores_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """A one-label head's output [...] in at least float32 for states [..., E], on a CPU by the native engine's product.

    A library's product may add a row up in another order when there are more rows.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    native = hidden.device.type == "cpu" and dtype == torch.float32 and not _extension.missing_reason()
    if isinstance(head, RewardHead):
        return head.scores(hidden, linear if native else functional.linear)
    weight = head.weight.detach().to(dtype)
    if native:
        return linear(hidden.flatten(0, -2), weight.contiguous(), head.bias).view(hidden.shape[:-1])
    bias = None if head.bias is None else head.bias.to(dtype)
    return functional.linear(hidden.to(dtype), weight, bias).squeeze(-1)


def linear_part(head: Head) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight [E] and bias [1] of a head that is one linear function of the state; None for another head."""
    if isinstance(head, RewardHead):
        if len(head.layers) > 1:
            return None
        weight, bias = head.parts(head.linears()[0])
        return weight[0], bias
    return head.weight[0].detach(), None if head.bias is None else head.bias.detach()


def describe(head: Head) -> str:
    """A head in a few words.

    Example:
        >>> describe(RewardHead([nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid()], label=1))
        'MLP 8-4-1, label 1 of 2, Sigmoid'
        >>> describe(nn.Linear(8, 1))
        'linear, 8 to 1, with bias'
    """
    linears = head.linears() if isinstance(head, RewardHead) else [head]
    if len(linears) > 1:
        said = ["MLP " + "-".join(map(str, [*(x.in_features for x in linears), head.out_features]))]
    else:
        said = [f"linear, {head.in_features} to {head.out_features}"]
        said += [] if linears[0].bias is None else ["with bias"]
    if isinstance(head, nn.Linear):
        return ", ".join(said)
    if head.label is not None:
        said.append(f"label {head.label} of {linears[-1].out_features}")
    if head.normal is not None:
        said.append(f"normalized by mean {head.normal[0]:g} and std {head.normal[1]:g}")
    last = head.layers[-1]
    return ", ".join([*said, *([] if isinstance(last, nn.Linear) else [type(last).__name__])])


# ---- what a configuration says of a head -----------------------------------------------------------------------------


def label_index(config: Any, label: str | int | None, name: object) -> int | None:
    """The index of a label among a classifier's; None where it has one label.

    Args:
        config: the model's configuration.
        label: a label's name (`id2label`) or index, None for the only one. A number is an index, a text is a name
            before it is an index.
        name: the model, for messages.

    Raises:
        RGTGError: no such label, several of this name, or several and none chosen.
    """
    names = {int(index): str(text) for index, text in (config.id2label or {}).items()}
    count = int(config.num_labels)
    listed = ", ".join(repr(names.get(index, str(index))[:40]) for index in range(min(count, 12)))
    listed += ", …" if count > 12 else ""
    if label is None:
        if count == 1:
            return None
        raise RGTGError(
            f"{name} has {count} labels ({listed}) and a reward model needs 1: choose one with label=NAME "
            "(--reward-label NAME) where there is such an option, or use a model with num_labels=1"
        )
    named = [index for index, text in names.items() if isinstance(label, str) and text == label]
    if len(named) > 1:
        raise RGTGError(
            f"{name} has {len(named)} labels named {shown(label)} (of {listed}): choose one by its index"
        )
    found = named[0] if named else None
    if found is None and not isinstance(label, bool) and str(label).isdecimal() and len(str(label)) < 10:
        found = int(label)
    if found is None or not 0 <= found < count:
        raise RGTGError(f"{name} has no label {shown(label)}: choose one of {listed}, or an index")
    return None if count == 1 else found


def normalization(config: Any, name: object) -> tuple[float, float] | None:
    """(mean, std) by which OpenRLHF's models normalize their rewards; None where they do not.

    Raises:
        RGTGError: numbers that cannot be.
    """
    wanted = getattr(config, "normalize_reward", False)
    if wanted not in (True, False, None):
        raise RGTGError(
            f"{name} has normalize_reward={shown(wanted)} in its config.json: put true or false there"
        )
    if not wanted or not hasattr(config, "mean"):
        return None
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)
    # The models keep both numbers in float32.
    limits = torch.finfo(torch.float32)
    for key, value in (("mean", mean), ("std", std)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= limits.max
        if not number or (key == "std" and value < limits.tiny):  # pyright: ignore[reportOptionalOperand]
            raise RGTGError(
                f"{name} normalizes its rewards (normalize_reward) and its config.json has {key}={shown(value)}: put "
                f"{'a finite' if key == 'mean' else 'a positive'} number (float32) there, or normalize_reward=false"
            )
    return float(mean), float(std)  # pyright: ignore[reportArgumentType]


def activation_of(config: Any, name: object) -> nn.Module | None:
    """The function of a classifier's score that its configuration names, as cross-encoders' do; None for none.

    Raises:
        RGTGError: a function that is not served.
    """
    saved = getattr(config, "sentence_transformers", None)
    named = saved.get("activation_fn") if isinstance(saved, dict) else None
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    if named is None:
        return None
    if not isinstance(named, str) or named not in _ACTIVATIONS:
        known = ", ".join(key.rpartition(".")[2] for key in _ACTIVATIONS)
        raise RGTGError(
            f"{name} names {shown(named)} as the function of its scores and {known} are served: use TextReward(f) with "
            "a function f that calls the model's own code"
        )
    return copy.deepcopy(_ACTIVATIONS[named])


def with_reward_head(model: PreTrainedModel, label: str | int | None, name: object) -> PreTrainedModel:
    """A sequence classifier whose `score` gives one reward.

    Args:
        model: a loaded classifier, which does not change.
        label: as in `label_index`.
        name: the model, for messages.

    Returns:
        The model itself where its head is linear with one label, or where it has no `score`. Else a model that shares
        its modules and weights and has another head.

    Raises:
        RGTGError: as in `label_index`, `activation_of` and `normalization`, or a head that is not served.
    """
    config: Any = model.config
    score = dict(model.named_children()).get(SCORE)
    if isinstance(score, RewardHead):
        if label is not None:
            label_index(config, label, name)
        return model
    index, activation = label_index(config, label, name), activation_of(config, name)
    normal = normalization(config, name)
    if not isinstance(score, (nn.Linear, nn.Sequential)) or config.is_encoder_decoder:
        if normal is not None:
            raise RGTGError(
                f"{name} normalizes its rewards (normalize_reward) and has no `score` head over a causal trunk: use "
                "TextReward(f) with a function f that calls the model's own code"
            )
        return model
    if isinstance(score, nn.Linear) and index is None and activation is None and normal is None:
        return model
    layers = [
        *(score if type(score) is nn.Sequential and not _hooked(score) else [score]),
        *([activation] if activation else []),
    ]
    try:
        head = RewardHead(layers, index, normal)
    except RGTGError as error:
        raise RGTGError(f"{name} cannot serve as reward model: {error}") from error
    made = copy.copy(model)
    made._modules = {**model._modules, SCORE: head}
    return made
