"""The gradient map of a convex potential as ops, in plain PyTorch, both directions.

The mathematics is in `fastflow.reference.pcp_potential`, `pcp_backward` and `pcp_inverse`. `net` is
`Network.tensors` of a network of so many layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.reference import pcp_backward as by_hand
from fastflow.reference import pcp_inverse as newton
from fastflow.reference import pcp_potential as potential
from fastflow.reference.pcp_potential import Bends, Network, Slopes, Tensors

BLOCK_ROWS = 256
"""Rows that go through together where nothing is kept, so that what lies between stays cached."""


def pcp_forward(
    x: Tensor, net: Sequence[Tensor], layers: int, save: bool
) -> tuple[Tensor, Tensor, Tensors]:
    """(y (B, D), ladj (B,), saved), given x (B, D): the gradient and the log-det of the Hessian.

    What is saved is all that the Hessian was made of: O(B D H) for layers of H units.
    """
    network = Network.of(net, layers)
    if save:
        return _with_state(x, network)
    found = []
    for start in range(0, max(len(x), 1), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        found.append(potential.forward(x[rows], network.map_rows(lambda one, rows=rows: one[rows])))
    y, ladj = zip(*found)
    return torch.cat(y), torch.cat(ladj), []


def pcp_inverse(
    y: Tensor, net: Sequence[Tensor], layers: int, save: bool
) -> tuple[Tensor, Tensor, Tensors]:
    """(x (B, D), ladj (B,), saved) with y = grad P(x); `saved` as in `pcp_forward`."""
    network = Network.of(net, layers)
    x = newton.solve(y, network)
    _, ladj, saved = pcp_forward(x, net, layers, save)
    return x, -ladj, saved


def pcp_backward(
    dy: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    net: Sequence[Tensor],
    layers: int,
    param_grads: bool,
) -> tuple[Tensor, Tensors]:
    """(dx (B, D), the gradients of the net's tensors), these (0,) if they are not wanted."""
    return _gradients(by_hand.backward, (dy, dladj, x), saved, net, layers, param_grads)


def pcp_inverse_backward(
    dx: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    net: Sequence[Tensor],
    layers: int,
    param_grads: bool,
) -> tuple[Tensor, Tensors]:
    """(dy (B, D), the gradients of the net's tensors) by the implicit function theorem."""
    return _gradients(by_hand.inverse_backward, (dx, dladj, x), saved, net, layers, param_grads)


def _gradients(
    vjp: Any,
    arguments: tuple[Tensor, Tensor, Tensor],
    saved: Sequence[Tensor],
    net: Sequence[Tensor],
    layers: int,
    param_grads: bool,
) -> tuple[Tensor, Tensors]:
    factor, *left = saved
    left = iter(left)
    slopes = Slopes(*_lists(left, [layers - 1, *[layers] * 3, layers - 1, layers]))
    more = layers - 1
    lists = _lists(left, [layers, more, min(more, 1), more])
    bends = Bends(*lists, next(left))  # pyright: ignore[reportCallIssue]
    d_point, dnet = vjp(*arguments, Network.of(net, layers), factor, slopes, bends)
    return d_point, dnet if param_grads else [d_point.new_empty(0) for _ in net]


def _with_state(x: Tensor, network: Network) -> tuple[Tensor, Tensor, Tensors]:
    y, slopes = potential.gradient(x, network)
    matrix, bends = potential.hessian(slopes, network)
    ladj, factor = potential.log_determinant(matrix)
    lists = (*slopes, *bends[:-1], [bends.first])
    return y, ladj, [factor, *(one for some in lists for one in some)]


def _lists(tensors: Iterator[Tensor], counts: Sequence[int]) -> list[Tensors]:
    """The next tensors, in lists of these lengths."""
    return [[next(tensors) for _ in range(count)] for count in counts]
