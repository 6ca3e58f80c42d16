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


def check_dependence(
    op: str,
    features: int,
    weights: Sequence[Tensor],
    stairs: Tensor | Sequence[Tensor],
    residual: bool,
    affine: bool,
) -> None:
    """Stairs are those of a network of these sizes, whose units see what the op relies on: outputs
    the features before, blocks what they began with.

    Masks are looked at when they come for the first time with weights of these sizes, which on a
    GPU waits for it once, and then taken as they are until PyTorch counts a change. (The compiled
    ops for CPUs look at a staircase at every call.) Where the values are out of reach (in a graph
    that is being compiled or captured, under transforms, on the meta device) they are not looked
    at.

    Arguments:
        weights: (n_l, n_{l-1}) for every layer.
        affine: whether each of the D features has two outputs, in some order of the features.

    Raises:
        ValueError: stairs has no orders and prefixes of these levels; an output of an affine op
            sees its own feature, or one after it; a residual block adds levels of different
            degrees.
    """
    out_of_reach = not all(map(readable, _tensors(stairs)))
    if out_of_reach or known_dependence(weights, stairs, residual, affine):
        return
    if isinstance(stairs, Tensor):
        orders, prefixes = masks.parts(stairs.cpu(), [features, *map(len, weights)])
        if not _well_formed(orders, prefixes):
            widths = (features, *map(len, weights))
            raise ValueError(f"{op}: stairs is not that of a network with levels of {widths} units")
        swept = features if affine else None
        level = network.odd_level(orders, prefixes, swept) if residual else None
        if level is not None:
            raise ValueError(
                f"{op}: stairs does not fit residual: units of hidden level {level} depend on "
                f"other features than those of level {level - 2} that are added to them"
            )
        ahead = network.sees_ahead(prefixes, features, residual) if affine else []
        if ahead:
            raise ValueError(
                f"{op}: stairs is not autoregressive: an output of the feature at position "
                f"{ahead[0]} of the order sees its own feature or a later one"
            )
    elif affine:
        seen = network.reach([mask.cpu() for mask in stairs], residual)
        try:
            masks.depth(seen.unflatten(0, (-1, 2)).any(1))
        except ValueError as problem:
            raise ValueError(f"{op}: stairs is not autoregressive: {problem}") from None
    _remember(weights, stairs, residual, affine)


def known_dependence(
    weights: Sequence[Tensor], stairs: Tensor | Sequence[Tensor], residual: bool, affine: bool
) -> bool:
    """Whether `check_dependence` has nothing to look at, or has seen these masks. Quick."""
    tensors = _tensors(stairs)
    try:
        snapshot = _checked.get(_key(weights, tensors, residual, affine))
    except AttributeError:  # weights that are none
        return False
    return snapshot is not None and snapshot.holds(tensors)


def _well_formed(orders: Sequence[Tensor], prefixes: Sequence[Tensor]) -> bool:
    """Whether orders hold each unit once, and prefixes do not fall, nor leave the level below."""
    for order in orders:
        units = torch.arange(len(order), dtype=order.dtype, device="cpu")
        if not torch.equal(order.sort().values, units):
            return False
    return all(
        bool((prefix.diff() >= 0).all()) and 0 <= prefix[0] and prefix[-1] <= len(below)
        for prefix, below in zip(prefixes, orders)
    )


def _remember(
    weights: Sequence[Tensor], stairs: Tensor | Sequence[Tensor], residual: bool, affine: bool
) -> None:
    tensors = _tensors(stairs)
    if any(tensor.is_inference() for tensor in tensors):
        return  # they do not tell when they change
    key = _key(weights, tensors, residual, affine)
    if key not in _checked:
        for tensor in tensors:
            weakref.finalize(tensor, _checked.pop, key, None).atexit = False
    _checked[key] = Snapshot(tensors)


def _key(
    weights: Sequence[Tensor], stairs: Sequence[Tensor], residual: bool, affine: bool
) -> tuple[int | torch.Size, ...]:
    """What a verdict is about: a staircase alone does not tell where one level of it ends."""
    return residual, affine, *map(id, stairs), *[weight.shape for weight in weights]


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
