r"""Degrees, orders and masks of autoregressive networks: pure functions.

A masked network is described by the degrees of its units. A unit sees a unit of the level below
where its degree is at least as high (the last layer: where it is higher), so that an output of
degree r depends on inputs of degree r - 1 and less. With every level sorted by degree each mask is
a staircase: a unit sees a prefix of the level below. `staircase` writes that down in the one form
that all kernels read.

Source:
    Germain, Gregor, Murray and Larochelle, MADE: Masked Autoencoder for Distribution Estimation,
    2015, arXiv 1502.03509.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.adjacency import adjacency, adjacency_masks, depth

__all__ = [
    "adjacency",
    "adjacency_masks",
    "depth",
    "hidden_degrees",
    "masks",
    "parts",
    "permutation",
    "ranks",
    "staircase",
    "unseen",
]


def ranks(order: str | Sequence[int] | Tensor | None, features: int) -> Tensor:
    """The position of every feature in the autoregressive order.

    Arguments:
        order: None (natural), "reverse", "random" (drawn from torch's global generator), or the
            positions themselves, each of 0 .. D-1 once.
        features: D.

    Returns:
        int64 (D,).

    Raises:
        TypeError: the order does not hold integers.
        ValueError: it has an unknown name, or is not a permutation.

    Example:
        >>> ranks("reverse", 3)
        tensor([2, 1, 0])
    """
    natural = torch.arange(features, device="cpu")  # whatever the default device is
    if order is None:
        return natural
    if isinstance(order, str):
        if order == "reverse":
            return natural.flip(0)
        if order == "random":
            return torch.randperm(features, device="cpu")
        raise ValueError(
            f"order is {order!r}, must be None, 'reverse', 'random' or the position of each feature"
        )
    return permutation(order, features)


def permutation(order: Sequence[int] | Tensor, features: int | None = None) -> Tensor:
    """The order, in memory of its own on the CPU, if it is a permutation.

    Arguments:
        order: each of 0 .. D-1 once.
        features: D, by default as many as the order has entries.

    Returns:
        int64 (D,).

    Raises:
        TypeError: the order does not hold integers.
        ValueError: it is not a permutation.
    """
    given = order if isinstance(order, Tensor) else torch.tensor(order, device="cpu")
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"order is {given.dtype}, must hold integers")
    given = given.detach().to("cpu", torch.int64, copy=True)
    natural = torch.arange(features or given.numel() or 1, device="cpu")
    if given.shape != natural.shape or not torch.equal(given.sort().values, natural):
        raise ValueError(
            f"order is {given.tolist()}, must hold each of 0 .. {len(natural) - 1} once"
        )
    return given


def hidden_degrees(width: int, features: int, lowest: int = 1) -> Tensor:
    """Degrees of a hidden layer: lowest .. D-1 in ascending order, spread evenly over its units.

    Arguments:
        width: H. Where it is smaller than the number of degrees, some have no unit.
        features: D.
        lowest: 0 where a context is to reach the first feature, which sees units of degree 0.

    Returns:
        int64 (H,), ascending. For D = 1 all are 0: nothing may depend on the only feature.

    Example:
        >>> hidden_degrees(5, features=4)
        tensor([1, 2, 2, 3, 3])
    """
    lowest = min(lowest, features - 1)
    count = features - lowest
    if 1 < width < count:  # the lowest and the highest always have a unit
        return lowest + torch.arange(width, device="cpu") * (count - 1) // (width - 1)
    return lowest + (torch.arange(1, width + 1, device="cpu") * count - 1) // width


def unseen(degrees: Tensor, features: int, lowest: int = 1) -> list[int]:
    """The degrees that no unit of a hidden layer has, although lowest .. D-1 should occur."""
    wanted = torch.arange(min(lowest, features - 1), features, device="cpu")
    return wanted[~torch.isin(wanted, degrees.cpu())].tolist()


def staircase(degrees: Sequence[Tensor], strict: bool = True) -> Tensor:
    r"""What the kernels need to know of the masks between levels of given degrees.

    Unit o of a level sees unit i of the level below where degree[o] >= degree[i]; in the last layer
    where degree[o] > degree[i], if it is strict.

    Arguments:
        degrees: integers, (n_l,) for every level l: the inputs, hidden levels, the outputs.
        strict: whether the last layer needs a higher degree.

    Returns:
        One int32 tensor: order_0, then order_l and prefix_l for every level above. order_l[k] is
        the unit at position k when level l is sorted by degree (stable), prefix_l[k] how many units
        of the level below that unit sees, in their sorted order.

    Example:
        >>> x, h, y = torch.tensor([1, 2]), torch.tensor([1, 1, 1]), torch.tensor([1, 2])
        >>> staircase([x, h, y])
        tensor([0, 1, 0, 1, 2, 1, 1, 1, 0, 1, 0, 3], dtype=torch.int32)
    """
    below, order = degrees[0].sort(stable=True)
    parts = [order]
    for level, degree in enumerate(degrees[1:], 1):
        degree, order = degree.sort(stable=True)
        right = not (strict and level == len(degrees) - 1)
        parts += [order, torch.searchsorted(below, degree.contiguous(), right=right)]
        below = degree
    return torch.cat(parts).to(torch.int32)


def parts(stairs: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The orders of all levels and the prefixes of all but the first, taken from `staircase`."""
    sizes = [widths[0]] + [width for width in widths[1:] for _ in range(2)]
    pieces = stairs.split(sizes)
    return [pieces[0], *pieces[1::2]], list(pieces[2::2])


def masks(stairs: Tensor | Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """The masks of all layers, bool (n_l, n_{l-1}), True is seen: those a staircase describes.

    Masks that are no staircase are given as they are, as a list, and come back so.
    """
    if not isinstance(stairs, Tensor):
        return list(stairs)
    orders, prefixes = parts(stairs, widths)
    found = []
    for below, order, prefix in zip(orders, orders[1:], prefixes):
        seen = _unsort(prefix, order)
        found.append(_unsort(torch.arange(len(below), device=below.device), below) < seen[:, None])
    return found


def _unsort(values: Tensor, order: Tensor) -> Tensor:
    """Values of units in sorted order, put back to where the units are."""
    return torch.zeros_like(values).scatter(0, order.long(), values)
