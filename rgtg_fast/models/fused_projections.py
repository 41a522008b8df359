"""Linear layers that read the same input, fused into one product: fewer and larger reads of the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rgtg_fast.models.quantized import is_plain

# Names of linear layers that read the same input where they have the same parent.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedLinear(nn.Linear):
    """A linear layer whose output is a part of one product over the weights of all its siblings.

    It computes on its own where gradients are enabled; a copy is a plain layer; so is the layer itself once it or a
    sibling is moved, converted or given other weights.

    Attributes:
        fused: the product.
        index: index of this layer among the siblings.
    """

    fused: _Product
    index: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Output [..., out] of input [..., in]: a view of the siblings' common one."""
        return super().forward(input) if torch.is_grad_enabled() else self.fused.part(self.index, input)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # New weights are not in the product's memory.
        self.fused.unfuse()
        return self._apply(fn, recurse)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            self.fused.unfuse()
        super(nn.Linear, self).__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        plain = memo[id(self)] = nn.Linear.__new__(nn.Linear)
        own = {name: x for name, x in self.__dict__.items() if name not in ("fused", "index")}
        plain.__dict__.update(copy.deepcopy(own, memo))
        return plain


class _Product:
    """The product of one input with the weights of several linear layers, computed when the first of them is called."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.weight = _stacked([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat([bias.data for bias in biases]) if biases else None
        self.layers = list(layers)
        self.sizes = [layer.out_features for layer in layers]
        # Of the current forward: the input, each layer's part of the output, and how many were not read yet.
        self._input: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()
        self._left = 0

    def refresh(self) -> None:
        """Takes over changes of the biases; the weights are views of the product's own."""
        if self.bias is not None:
            torch.cat([layer.bias.detach() for layer in self.layers if layer.bias is not None], out=self.bias)

    def unfuse(self) -> None:
        """Turns the layers back into plain `nn.Linear` layers."""
        for layer in self.layers:
            layer.__class__ = nn.Linear

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of one of the layers."""
        if self._input is not x:
            self._input, self._left = x, len(self.sizes)
            self._parts = functional.linear(x, self.weight, self.bias).split(self.sizes, -1)
        found = self._parts[index]
        self._left -= 1
        if not self._left:
            self._input, self._parts = None, ()
        return found


def fuse_projections(model: nn.Module) -> int:
    """Fuses linear layers that read the same input into one product; returns the number of products.

    Weights are neither changed nor stored twice: those of such layers become views of one tensor. A model that was
    fused before, or shares its parameters with one that was, uses the same memory. Layers of other classes (quantized
    ones, say), of different dtypes, or of which only some have a bias, stay as they are.

    Args:
        model: with modules named as in `SIBLINGS`.
    """
    made = 0
    for parent in list(model.modules()):
        for names in SIBLINGS:
            layers = [child for name in names if (child := getattr(parent, name, None)) is not None]
            if len(layers) < len(names) or not _alike(layers):
                continue
            product = _Product(layers)
            for index, layer in enumerate(layers):
                layer.__class__ = FusedLinear
                layer.fused, layer.index = product, index
            made += 1
    return made


def refresh_products(model: nn.Module) -> None:
    """Takes over changes of the biases in all products of a model."""
    products = {id(m.fused): m.fused for m in model.modules() if isinstance(m, FusedLinear)}
    for product in products.values():
        product.refresh()


def _alike(layers: Sequence[nn.Module]) -> bool:
    """Whether these are plain linear layers that one product can serve."""
    if any(type(layer) not in (nn.Linear, FusedLinear) for layer in layers):
        return False
    if not all(is_plain(weight) for layer in layers for weight in layer.parameters(recurse=False)):
        return False  # quantized in place
    kinds = {
        (layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None)
        for layer in layers
        if isinstance(layer, nn.Linear)
    }
    return len(kinds) == 1


def _stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights as one tensor [Σ out, in], of which each becomes a view."""
    rows = sum(len(weight) for weight in weights)
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous() or not _same_storage(weight, first):
            break
        end += weight.nbytes
    else:
        return first.data.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    stacked = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, stacked.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return stacked


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
