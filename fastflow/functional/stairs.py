"""Checks of the masks that a call brings, as a staircase or one by one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import masks
from fastflow.memo import Snapshot
from fastflow.reference import network
from fastflow.transforms import readable

_checked: dict[tuple, Snapshot] = {}


def check_stairs(
    op: str, x_name: str, x: Tensor, weights: Sequence[Tensor], stairs: Tensor | Sequence[Tensor]
) -> None:
    """Types, shapes and devices of the masks fit points (*batch, D) and weights (n_l, n_{l-1}).

    Raises:
        TypeError, ValueError: they do not; the message says which.
    """
    if isinstance(stairs, (list, tuple)):
        _check_masks(op, stairs, weights)
        return
    if not isinstance(stairs, Tensor) or stairs.dtype != torch.int32:
        raise TypeError(f"{op}: stairs must be the int32 tensor of fastflow.masks.staircase")
    entries = x.shape[-1] + 2 * sum(len(weight) for weight in weights)
    if stairs.shape != (entries,):
        raise ValueError(
            f"{op}: stairs has shape {tuple(stairs.shape)}, must be ({entries},) for these weights"
        )
    if stairs.device != x.device:
        raise ValueError(f"{op}: stairs is on {stairs.device}, {x_name} is on {x.device}")


def check_autoregressive(
    op: str,
    features: int,
    weights: Sequence[Tensor],
    stairs: Tensor | Sequence[Tensor],
    residual: bool,
) -> None:
    """The two outputs of every feature see the features before it only, in some order.

    Masks are looked at when they come for the first time, which on a GPU waits for it once, and
    then taken as they are until they change. Where their values are out of reach (in a graph that
    is being compiled or captured, under transforms, on the meta device) they are not looked at.

    Raises:
        ValueError: an output sees its own feature, or one after it.
    """
    if not all(map(readable, _tensors(stairs))) or known_autoregressive(stairs, residual):
        return
    if isinstance(stairs, Tensor):
        _, prefixes = masks.parts(stairs.cpu(), [features, *map(len, weights)])
        known = network.known_units(prefixes, features, residual)[-1]
        behind = prefixes[-1].view(features, 2).amax(-1) > known[:-1]
        if behind.any():
            raise ValueError(
                f"{op}: stairs is not autoregressive: an output of the feature at position "
                f"{int(behind.nonzero()[0])} of the order sees its own feature or a later one"
            )
    else:
        seen = network.reach([mask.cpu() for mask in stairs], residual)
        try:
            masks.depth(seen.unflatten(0, (-1, 2)).any(1))
        except ValueError as problem:
            raise ValueError(f"{op}: stairs is not autoregressive: {problem}") from None
    _remember(stairs, residual)


def known_autoregressive(stairs: Tensor | Sequence[Tensor], residual: bool) -> bool:
    """Whether `check_autoregressive` has seen these masks as they are now. Quick."""
    tensors = _tensors(stairs)
    snapshot = _checked.get((residual, *map(id, tensors)))
    return snapshot is not None and snapshot.holds(tensors)


def _remember(stairs: Tensor | Sequence[Tensor], residual: bool) -> None:
    tensors = _tensors(stairs)
    key = (residual, *map(id, tensors))
    _checked[key] = Snapshot(tensors)
    for tensor in tensors:
        weakref.finalize(tensor, _checked.pop, key, None).atexit = False


def _tensors(stairs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (stairs,) if isinstance(stairs, Tensor) else stairs


def _check_masks(op: str, masks: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if len(masks) != len(weights):
        raise ValueError(f"{op}: stairs has {len(masks)} masks, weights has {len(weights)} entries")
    for i, (mask, weight) in enumerate(zip(masks, weights)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{op}: stairs[{i}] must be a tensor of bool where stairs is a list")
        if mask.shape != weight.shape or mask.device != weight.device:
            raise ValueError(
                f"{op}: stairs[{i}] has shape {tuple(mask.shape)} on {mask.device}, must be "
                f"{tuple(weight.shape)} on {weight.device} as weights[{i}]"
            )
