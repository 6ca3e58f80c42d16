"""Checks that ops and layers make of their arguments before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Every argument is a floating-point tensor, and all are on the device of the first.

    Raises:
        TypeError: an argument is not a tensor, or not of a real floating-point type.
        ValueError: it is on another device than the first.
    """
    first = next(iter(tensors))
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            got = "None" if tensor is None else f"a {type(tensor).__name__}"
            raise TypeError(f"{op}: {name} is {got}, must be a torch.Tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}, must be a floating-point tensor")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} is on {device}")


def broadcast_batches(op: str, **batches: torch.Size) -> torch.Size:
    """The batch shape to which the batches of all arguments broadcast.

    Raises:
        ValueError: they do not.
    """
    try:
        return torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        shown = ", ".join(f"{name} {tuple(batch)}" for name, batch in batches.items())
        raise ValueError(f"{op}: these batches do not broadcast: {shown}") from None


def as_int(value: Any) -> int | None:
    """An integer of any kind, NumPy's say, as Python's own; None of everything else, and of a bool.

    Sizes that torch.export or torch.compile leave open stay as they are.
    """
    if isinstance(value, (bool, torch.SymBool)):
        return None
    if isinstance(value, (int, torch.SymInt)):
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_shape(
    owner: str, name: str, shape: SupportsIndex | Iterable[SupportsIndex]
) -> tuple[int, ...]:
    """A shape as a tuple of sizes; one integer n is (n,).

    Raises:
        TypeError: it is no integer and holds other things than integers, or is a tensor.
        ValueError: a size is negative.
    """
    sizes: tuple[Any, ...]
    if isinstance(shape, Tensor):  # a context, most likely
        sizes = (None,)
    elif isinstance(shape, (tuple, list)):
        sizes = tuple(map(as_int, shape))
    else:
        one = as_int(shape)
        sizes = (one,)
        if one is None and isinstance(shape, Iterable):
            sizes = tuple(map(as_int, shape))
    if any(size is None for size in sizes):
        tensor = isinstance(shape, Tensor)
        shown = f"a tensor of shape {tuple(shape.shape)}" if tensor else repr(shape)
        raise TypeError(
            f"{owner}: {name} is {shown}, must be an integer or a sequence of integers, e.g. (10,)"
        )
    if any(size < 0 for size in sizes):
        raise ValueError(f"{owner}: {name} is {sizes}, must have no negative size")
    return sizes
