"""Where the library's own code is faster than fastflow, and answers for a converted layer.

Without a compiled backend that is the parallel direction, and D passes where each is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow import backends


class Slower(NamedTuple):
    """Calls that take kernels longer than the library, where hidden units are not in order.

    Kernels copy such weights into order at every call, which few rows do not pay for.
    """

    gradients: bool  # whether they are recorded
    weights: int  # of all layers together, at least
    rows: range


SLOWER = (
    Slower(gradients=False, weights=2**21, rows=range(1, 33)),
    Slower(gradients=True, weights=2**22, rows=range(32, 129)),
    Slower(gradients=True, weights=2**23, rows=range(1, 129)),
)
"""Measured on two quiet CPU cores, float32, on nflows' layer with three hidden layers."""


def no_kernel(op: str, x: Tensor) -> bool:
    """Whether an op on such points would be computed in plain PyTorch, nothing else being there.

    What `use_backend` asks for is always done.
    """
    return backends.uncompiled(op, x.device.type)


def few_rows(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a call is in the table of what takes kernels longer than the library.

    Arguments:
        x: points, (*batch, D).
        weights: of all layers, (n_l, n_{l-1}).
    """
    size = sum(weight.numel() for weight in weights)
    if not SLOWER or size < min(case.weights for case in SLOWER):
        return False
    if backends.current() is not None or torch.compiler.is_compiling() or not x.is_cpu:
        return False
    gradients = torch.is_grad_enabled() and any(one.requires_grad for one in (x, *weights))
    rows = x.shape[:-1].numel()
    return any(
        case.gradients == gradients and size >= case.weights and rows in case.rows
        for case in SLOWER
    )


def left_alone(op: str, layer: nn.Module) -> str | None:
    """Why a layer, as it is now, is better left to its library; None if it is not."""
    tensor = next(layer.parameters(), None)
    if tensor is None or tensor.is_meta or not backends.uncompiled(op, tensor.device.type):
        return None
    return (
        f"no compiled backend serves {tensor.device.type} tensors here (`python -m fastflow` says "
        "why), so that only its slow direction would gain: convert(model, without_kernels=True)"
    )
