"""Matrices that say which features depend on which, where no order of them does.

An adjacency matrix is bool (D, D): [i, j] says that feature i depends on feature j. No feature may
depend on itself, through others either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


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
