"""The autograd node of the gradient map of a convex potential, in either direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow import backends
from fastflow.reference import pcp_inverse, pcp_potential
from fastflow.reference.pcp_potential import Network
from fastflow.transforms import (
    batched,
    forward_mode_active,
    functorch_active,
    without_autocast,
)

FORWARD = {False: "pcp_forward", True: "pcp_inverse"}
BACKWARD = {False: "pcp_backward", True: "pcp_inverse_backward"}
MAPS: dict[bool, Callable[..., tuple[Tensor, Tensor]]] = {
    False: pcp_potential.forward,
    True: pcp_inverse.inverse,
}


class GradientMap(torch.autograd.Function):
    """Either direction on the backend in force; the network's tensors are laid out flat.

    Saves what the backend asks for: the kernels nothing but arguments and result, the reference
    O(B D H) for hidden layers of H units.
    """

    @staticmethod
    def forward(
        ctx: Any, inverse: bool, layers: int, point: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        backend = backends.current_or_reference(FORWARD[inverse])
        image, ladj, saved = backends.call(
            FORWARD[inverse], point, list(tensors), layers, True, name=backend
        )
        ctx.save_for_backward(point, *tensors, image, *saved)
        # backward may run when another use_backend is in force, or none
        ctx.inverse, ctx.layers, ctx.tensors, ctx.backend = inverse, layers, len(tensors), backend
        return image, ladj

    @staticmethod
    def backward(ctx: Any, d_image: Tensor, dladj: Tensor) -> tuple[Tensor | None, ...]:
        point, *kept = ctx.saved_tensors
        tensors, (image, *saved) = kept[: ctx.tensors], kept[ctx.tensors :]
        # hooks on saved tensors may return other strides than they were given
        point, tensors = _as_kernels_take_them(point, tensors, ctx.layers)
        wanted = ctx.needs_input_grad[2:]
        with without_autocast(point.device.type):
            # kernels, and the backward pass by hand, written in place, are not for vmap
            several = functorch_active() or batched(d_image) or batched(dladj)
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or several):
                cotangents = (d_image, dladj)
                grads = differentiable_vjp(point, tensors, cotangents, wanted, ctx)
                return (None, None, *grads)
            d_point, grads = backends.call(
                BACKWARD[ctx.inverse],
                *(d_image.contiguous(), dladj.contiguous()),
                image.contiguous() if ctx.inverse else point,
                *(saved, tensors, ctx.layers, any(wanted[1:])),
                name=ctx.backend,
            )
        grads = (grad if want else None for grad, want in zip((d_point, *grads), wanted))
        return (None, None, *grads)


def differentiable_vjp(
    point: Tensor,
    tensors: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor],
    wanted: Sequence[bool],
    ctx: Any,
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

    Kernels know reverse-mode derivatives only: torch.func and forward-mode tangents get the
    reference, which PyTorch differentiates itself. So does torch.compile where the backend is no
    registered op.
    """
    tensors, layers = net.tensors, len(net.inputs)
    if (
        functorch_active()
        or forward_mode_active(point, *tensors)
        or (torch.compiler.is_compiling() and not backends.traceable(FORWARD[inverse], point))
    ):
        return MAPS[inverse](point, net)
    point, tensors = _as_kernels_take_them(point, tensors, layers)
    if torch.is_grad_enabled() and any(one.requires_grad for one in (point, *tensors)):
        return GradientMap.apply(inverse, layers, point, *tensors)
    backend = backends.current_or_reference(FORWARD[inverse])
    return backends.call(FORWARD[inverse], point, tensors, layers, False, name=backend)[:2]


def _as_kernels_take_them(
    point: Tensor, tensors: Sequence[Tensor], layers: int
) -> tuple[Tensor, list[Tensor]]:
    """The point and the matrices contiguous; of terms, the rows alone."""
    matrices = 2 * layers - 1
    return point.contiguous(), [
        one if one.stride(-1) == 1 and position >= matrices else one.contiguous()
        for position, one in enumerate(tensors)
    ]
