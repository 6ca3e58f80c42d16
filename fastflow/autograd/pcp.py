"""The autograd node of the gradient map of a convex potential, in either direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastflow.reference import pcp, pcp_backward, pcp_inverse
from fastflow.reference.pcp import Bends, Network, Slopes, Tensors
from fastflow.transforms import batched, forward_mode_active, transforms_active

MAPS: dict[bool, Callable[..., tuple[Tensor, Tensor]]] = {
    False: pcp.forward,
    True: pcp_inverse.inverse,
}


BLOCK_ROWS = 256
"""Rows that go through together where nothing is kept, so that what lies between stays cached."""


class GradientMap(torch.autograd.Function):
    """Either direction, for plain reverse mode; the network's tensors are laid out flat.

    Saves what the Hessian was made of: O(B D H) for hidden layers of H units.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, inverse: bool, layers: int, point: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        net = Network.of(tensors, layers)
        x = pcp_inverse.solve(point, net) if inverse else point
        y, slopes = pcp.gradient(x, net)
        matrix, bends = pcp.hessian(slopes, net)
        ladj, factor = pcp.log_determinant(matrix)
        ctx.inverse, ctx.layers, ctx.tensors = inverse, layers, len(tensors)
        ctx.counts = [_counts(slopes), _counts(bends)]
        ctx.save_for_backward(point, *tensors, x, factor, *_flat(slopes), *_flat(bends))
        return (x, -ladj) if inverse else (y, ladj)

    @staticmethod
    def backward(ctx: FunctionCtx, d_image: Tensor, dladj: Tensor) -> tuple[Tensor | None, ...]:
        point, *saved = ctx.saved_tensors
        tensors, left = saved[: ctx.tensors], iter(saved[ctx.tensors :])
        wanted = ctx.needs_input_grad[2:]
        with torch.autocast(point.device.type, enabled=False):
            # the backward pass by hand is written in place, which legacy vmap does not know
            if torch.is_grad_enabled() or batched(d_image) or batched(dladj):
                cotangents = (d_image, dladj)
                grads = differentiable_vjp(point, tensors, cotangents, wanted, ctx)
                return (None, None, *grads)
            net, x, factor = Network.of(tensors, ctx.layers), next(left), next(left)
            slopes, bends = (
                Slopes(*_lists(left, ctx.counts[0])),
                Bends(*_lists(left, ctx.counts[1])),
            )
            vjp = pcp_backward.inverse_backward if ctx.inverse else pcp_backward.backward
            d_point, grads = vjp(d_image, dladj, x, net, factor, slopes, bends)
        grads = (grad if want else None for grad, want in zip((d_point, *grads), wanted))
        return (None, None, *grads)


def differentiable_vjp(
    point: Tensor,
    tensors: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor],
    wanted: Sequence[bool],
    ctx: FunctionCtx,
) -> list[Tensor | None]:
    """The backward pass by PyTorch, as a graph of its own where derivatives are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: a weight computed from x must not bring its own gradient to that of x
        point, *tensors = (tensor.view_as(tensor) for tensor in (point, *tensors))
        leaves = [tensor for tensor, want in zip((point, *tensors), wanted) if want]
        outputs = MAPS[ctx.inverse](point, Network.of(tensors, ctx.layers))
        grads = iter(torch.autograd.grad(outputs, leaves, cotangents, create_graph=recorded))
    return [next(grads) if want else None for want in wanted]


def gradient_map(point: Tensor, net: Network, inverse: bool) -> tuple[Tensor, Tensor]:
    """Either direction on (B, D) rows: (image (B, D), ladj (B,)).

    torch.func, torch.compile and forward-mode tangents get the reference, which PyTorch
    differentiates itself.
    """
    tensors = net.tensors
    if transforms_active() or forward_mode_active(point, *tensors):
        return MAPS[inverse](point, net)
    recorded = torch.is_grad_enabled() and any(one.requires_grad for one in (point, *tensors))
    if recorded or inverse:
        return GradientMap.apply(inverse, len(net.inputs), point, *tensors)
    return _in_blocks(point, net)


def _in_blocks(x: Tensor, net: Network) -> tuple[Tensor, Tensor]:
    """`forward` of some rows after the other."""
    found = []
    for start in range(0, max(len(x), 1), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        found.append(pcp.forward(x[rows], net.map_rows(lambda one, rows=rows: one[rows])))
    y, ladj = zip(*found)
    return torch.cat(y), torch.cat(ladj)


def _flat(state: Slopes | Bends) -> Tensors:
    """The tensors of a state, one after the other."""
    return [one for part in state for one in (part if isinstance(part, list) else [part])]


def _counts(state: Slopes | Bends) -> list[int | None]:
    """The lengths of its lists; None for what is no list."""
    return [len(part) if isinstance(part, list) else None for part in state]


def _lists(tensors: Iterator[Tensor], counts: list[int | None]) -> list[Any]:
    """What `_flat` laid out, in the lists that it came from."""
    return [
        next(tensors) if count is None else [next(tensors) for _ in range(count)]
        for count in counts
    ]
