"""Checks that ops and layers make of their arguments before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensors(op: str, **tensors: Tensor) -> None:
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
