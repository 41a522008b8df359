"""Checks that several ops share. Every message is one line and names a valid value."""

from __future__ import annotations

import torch

from ..errors import RGTGError


def floating(op: str, name: str, x: torch.Tensor) -> None:
    """Raises unless the tensor is strided and of a real floating-point dtype."""
    if not x.dtype.is_floating_point:
        raise RGTGError(f"{op}: {name} has dtype {x.dtype}: use a floating-point dtype")
    if x.layout != torch.strided:
        raise RGTGError(f"{op}: {name} has layout {x.layout}: use {name}.to_dense()")


def written(op: str, **outputs: torch.Tensor) -> None:
    """Raises where a tensor that is written in place has two numbers at one address."""
    for name, x in outputs.items():
        if x.numel() and any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)):
            raise RGTGError(f"{op}: {name} is written in place and was expanded: pass {name}.clone()")


def shaped(op: str, name: str, x: torch.Tensor, legend: str, shape: tuple[int, ...]) -> None:
    """Raises unless the tensor has this shape."""
    if tuple(x.shape) != shape:
        raise RGTGError(f"{op}: {name} has shape {list(x.shape)}: use {legend} = {list(shape)}")


def of_dtype(op: str, name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises unless the tensor has this dtype."""
    if x.dtype != dtype:
        raise RGTGError(f"{op}: {name} has dtype {x.dtype}: use {dtype}")


def together(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises unless all tensors are strided and on the device of the first."""
    for name, x in others.items():
        if x is not None and x.layout != torch.strided:
            raise RGTGError(f"{op}: {name} has layout {x.layout}: use {name}.to_dense()")
        if x is not None and x.device != first.device:
            raise RGTGError(
                f"{op}: {name} is on {x.device}: move it to {first.device}, where the first argument is"
            )


def slots(op: str, slots: torch.Tensor, count: int, distinct: bool = False) -> None:
    """Raises unless every slot is one of `count` and, if `distinct`, no two rows name the same; reads the values."""
    row_of: dict[int, int] = {}
    for row, slot in enumerate(slots.tolist()):
        if not 0 <= slot < count:
            raise RGTGError(
                f"{op}: slots[{row}]={slot} is outside the cache (N={count}): use 0 to {count - 1}"
            )
        if distinct and slot in row_of:
            raise RGTGError(
                f"{op}: slots[{row_of[slot]}] and slots[{row}] are both {slot}: give every row a slot of its own"
            )
        row_of[slot] = row
