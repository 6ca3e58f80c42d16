"""Checks that every op makes of its arguments before anything is computed."""

from __future__ import annotations

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
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, must be a torch.Tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}, must be a floating-point tensor")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} is on {device}")
