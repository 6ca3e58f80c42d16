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
from itertools import pairwise

import torch
from torch import Tensor


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


def adjacency(given: Tensor, features: int) -> Tensor:
    """The matrix, in memory of its own on the CPU, if features may depend on each other as it says.

    Arguments:
        given: bool (D, D), see `depth`.
        features: D.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another type or shape, a feature depends on itself, or some depend on
            each other in a circle.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"adjacency is a {type(given).__name__}, must be a torch.Tensor")
    if given.dtype != torch.bool or given.shape != (features, features):
        raise ValueError(
            f"adjacency has shape {tuple(given.shape)} and type {given.dtype}, must be "
            f"({features}, {features}) and torch.bool"
        )
    given = given.detach().to("cpu", copy=True)
    own = given.diagonal().nonzero().flatten().tolist()
    if own:
        raise ValueError(f"adjacency says of the features {own} that they depend on themselves")
    depth(given)
    return given


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
        What `staircase` returns, on the CPU; None if the masks are no staircase, or if an output
        depends on its own feature or a later one, or if the levels that a residual network adds
        differ in what they depend on: kernels cannot take them then.

    Example:
        >>> x, h, y = torch.tensor([2, 1]), torch.tensor([1, 2, 1]), torch.tensor([2, 1])
        >>> found = staircase_of([h[:, None] >= x, y[:, None] > h])
        >>> torch.equal(found, staircase([x, h, y]))
        True
    """
    given = [mask.cpu() for mask in given]
    features = given[0].shape[1]
    if outputs is None:
        outputs = torch.arange(len(given[-1]), device="cpu").view(features, -1)
    sees = [mask.sum(1) for mask in given]  # by the units of levels 1 ..
    unseen = [-mask.sum(0) for mask in given]  # by those of levels 0 .., minus how many see a unit
    by_feature = sees[-1][outputs].T
    first = _lexsort([unseen[0], *by_feature])
    hidden = range(1, len(given))
    orders = [first]
    for level in hidden:
        # levels that a residual network adds have one order
        same = [other for other in hidden if residual and other % 2 and level % 2] or [level]
        orders.append(_lexsort([sees[other - 1] for other in same] + [unseen[i] for i in same]))
    orders.append(outputs[first].flatten())
    prefixes = [seen[order] for seen, order in zip(sees, orders[1:])]
    if any((prefix.diff() < 0).any() for prefix in prefixes):
        return None
    pieces = [first] + [piece for pair in zip(orders[1:], prefixes) for piece in pair]
    stairs = torch.cat(pieces).to(torch.int32)
    widths = [features, *map(len, given)]
    if not all(map(torch.equal, masks(stairs, widths), given)):
        return None
    return stairs if _autoregressive(prefixes, features, residual) else None


def _autoregressive(prefixes: Sequence[Tensor], features: int, residual: bool) -> bool:
    """Whether outputs of the r-th feature depend on the r features before it at most.

    Sorted units of a level depend on a number of features that does not descend, so that a unit
    needs what the last one of its prefix needs.
    """
    needed = [torch.arange(1, features + 1, device="cpu")]
    for prefix in prefixes:
        none_or = torch.cat([prefix.new_zeros(1), needed[-1]])
        needed.append(none_or[prefix])
    added = needed[1:-1:2] if residual else []
    if not all(torch.equal(one, other) for one, other in pairwise(added)):
        return False
    own = torch.arange(len(needed[-1]), device="cpu") // (len(needed[-1]) // features)
    return bool((needed[-1] <= own).all())


def _lexsort(keys: Sequence[Tensor]) -> Tensor:
    """The stable order of the columns of keys, of which the first counts most."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def depth(adjacency: Tensor) -> int:
    """How many passes make every feature known, when those whose features are known become so.

    Arguments:
        adjacency: bool (D, D), [i, j] says whether feature i depends on feature j.

    Raises:
        ValueError: it is no such matrix, or some features depend on each other in a circle.

    Example:
        >>> depth(torch.tensor([[False, False, False], [True, False, False], [True, False, False]]))
        2
    """
    if adjacency.dtype != torch.bool or adjacency.dim() != 2 or len(set(adjacency.shape)) > 1:
        raise ValueError(
            f"adjacency has shape {tuple(adjacency.shape)} and type {adjacency.dtype}, must be a "
            "square matrix of bool"
        )
    left = adjacency.cpu()
    passes, unknown = 0, torch.ones(len(left), dtype=torch.bool, device="cpu")
    while unknown.any():
        ready = unknown & ~(left & unknown).any(1)
        if not ready.any():
            circle = unknown.nonzero().flatten().tolist()
            raise ValueError(f"adjacency has a circle among the features {circle}")
        unknown &= ~ready
        passes += 1
    return passes


def adjacency_masks(
    adjacency: Tensor, hidden: Sequence[int], params_per_feature: int, context: bool = False
) -> list[Tensor]:
    """Masks of a network in which features see those that a matrix names, and no other.

    Every hidden unit stands for a set of features, one of the rows of the matrix in turn (or none,
    where a context is to reach features that see nothing else). A unit or output sees the units
    whose sets lie within its own.

    Arguments:
        adjacency: bool (D, D), see `depth`.
        hidden: widths of the hidden layers.
        params_per_feature: outputs for every feature.
        context: whether some units must see the context alone.

    Returns:
        bool (n_l, n_{l-1}) for every layer.
    """
    own = adjacency.cpu()
    rows = own.unique(dim=0)
    rows = rows[rows.any(1)] if rows.any() else rows[:1]
    if context:
        rows = torch.cat([torch.zeros_like(rows[:1]), rows])
    sets = [rows[torch.arange(width, device="cpu") % len(rows)] for width in hidden]
    outputs = own.repeat_interleave(params_per_feature, 0)
    if not sets:
        return [outputs]

    def within(below: Tensor, above: Tensor) -> Tensor:
        return ~(below[None] & ~above[:, None]).any(-1)

    inner = [within(below, above) for below, above in pairwise(sets)]
    return [sets[0], *inner, within(sets[-1], outputs)]


def _unsort(values: Tensor, order: Tensor) -> Tensor:
    """Values of units in sorted order, put back to where the units are."""
    return torch.zeros_like(values).scatter(0, order.long(), values)
