"""Rows that an inverse carried out of the range of their type: their density is 0 to rounding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastflow.transforms import readable


def overflowed(image: Tensor, *given: Tensor | None) -> Tensor:
    r"""Whether a row of an image holds an infinity or NaN though all that it was made of is finite.

    Arguments:
        image: (\*batch, n).
        given: (\*batch, n) each, or None. The batches broadcast.

    Returns:
        bool (\*batch,).
    """
    lost = ~image.isfinite().all(-1)
    for one in given:
        if one is not None:
            lost = lost & one.isfinite().all(-1)
    return lost


def may_look(tensor: Tensor) -> bool:
    """Whether Python may look at a result at no cost: on CPUs, where nothing records the ops."""
    return (
        readable(tensor)
        and tensor.is_cpu
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._get_tracing_state()
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an infinity or NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
