"""Recognises the staircase in masks that a library has made, its units in whatever order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import masks
from fastflow.reference import network


def staircase_of(
    given: Sequence[Tensor], outputs: Tensor | None = None, residual: bool = False
) -> Tensor | None:
    r"""The staircase that given masks are, with their units in whatever order.

    A level is sorted by how many units its units see; where they see the same, those that are seen
    by more come first. Whether that makes staircases of all masks is then checked exactly.

    Arguments:
        given: bool (n_l, n_{l-1}) for every layer, True is seen; n_0 = D.
        outputs: int64 (D, P), the units of the last layer that hold the P numbers of each feature,
            in the order in which an op reads them; by default they lie feature after feature.
        residual: whether the hidden levels form residual blocks, as in `fastflow.functional.made`.

    Returns:
        What `fastflow.masks.staircase` returns, on the CPU; None if the masks are no staircase, or
        if an output depends on its own feature or a later one, or if the levels that a residual
        network adds differ in what they depend on: kernels cannot take them then.

    Example:
        >>> x, h, y = torch.tensor([2, 1]), torch.tensor([1, 2, 1]), torch.tensor([2, 1])
        >>> found = staircase_of([h[:, None] >= x, y[:, None] > h])
        >>> torch.equal(found, masks.staircase([x, h, y]))
        True
    """
    given = [mask.cpu() for mask in given]
    features = given[0].shape[1]
    if outputs is None:
        outputs = torch.arange(len(given[-1]), device="cpu").view(features, -1)
    orders = _orders(given, outputs, residual)
    prefixes = [mask.sum(1)[order] for mask, order in zip(given, orders[1:])]
    if any((prefix.diff() < 0).any() for prefix in prefixes):
        return None
    pieces = [orders[0]] + [piece for pair in zip(orders[1:], prefixes) for piece in pair]
    stairs = torch.cat(pieces).to(torch.int32)
    if not all(map(torch.equal, masks.masks(stairs, [features, *map(len, given)]), given)):
        return None
    if residual and network.odd_level(orders, prefixes, features):
        return None
    return None if network.sees_ahead(prefixes, features, residual) else stairs


def _orders(given: Sequence[Tensor], outputs: Tensor, residual: bool) -> list[Tensor]:
    """The order of every level, (n_l,) for l = 0 .. L+1, if the masks are a staircase at all."""
    sees = [mask.sum(1) for mask in given]  # by the units of levels 1 ..
    unseen = [-mask.sum(0) for mask in given]  # by those of levels 0 .., minus how many see a unit
    first = _lexsort([unseen[0], *sees[-1][outputs].T])
    hidden = range(1, len(given))
    orders = [first]
    for level in hidden:
        # levels that a residual network adds have one order
        same = [other for other in hidden if residual and other % 2 and level % 2] or [level]
        orders.append(_lexsort([sees[other - 1] for other in same] + [unseen[i] for i in same]))
    return [*orders, outputs[first].flatten()]


def _lexsort(keys: Sequence[Tensor]) -> Tensor:
    """The stable order of the columns of keys, of which the first counts most."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order
