"""The autograd node of a planar chain, in either direction."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflow import backends
from fastflow.autograd import node
from fastflow.reference import planar_flow as reference
from fastflow.transforms import batched, forward_mode_active, functorch_active

FORWARD = {False: "planar_flow_forward", True: "planar_flow_inverse"}
BACKWARD = {False: "planar_flow_backward", True: "planar_flow_inverse_backward"}


class PlanarFlow(torch.autograd.Function):
    """Either direction of a chain on the backend in force.

    Saves the input, the output and the K pre-activations of a row: O(B (D + K)), not O(B D K).
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        backend = backends.current()
        out, ladj, a = backends.call(FORWARD[inverse], z, w, u, b, centred, name=backend)
        ctx.save_for_backward(z, out, w, u, b, a)
        # backward may run when another use_backend is in force, or none
        ctx.centred, ctx.inverse, ctx.backend = centred, inverse, backend
        return out, ladj

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, dladj: Tensor) -> tuple[Tensor | None, ...]:
        # hooks on saved tensors may return other strides than they were given
        z, out, w, u, b, a = (tensor.contiguous() for tensor in ctx.saved_tensors)
        grads = gradients(
            *((z, w, u, b, ctx.centred), (out, None, a), (d_out, dladj), ctx.needs_input_grad[:4]),
            *(ctx.inverse, ctx.backend),
        )
        return (*grads, None, None)


def gradients(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, bool],
    outputs: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor, Tensor],
    wanted: tuple[bool, ...],
    inverse: bool,
    backend: str | None,
) -> list[Tensor | None] | tuple[Tensor | None, ...]:
    """The gradients of z, w, u and b, None where none is wanted."""
    inputs, centred = arguments[:4], arguments[4]
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return differentiable_vjp(inputs, cotangents, wanted, centred, inverse)
        if functorch_active() or any(map(batched, cotangents)):
            backend = "reference"  # plain PyTorch operations, which vmap knows
    z, w, u, _ = inputs
    out, _, a = outputs
    d_out, dladj = cotangents
    param_grads = any(wanted[1:])
    grads = backends.call(
        BACKWARD[inverse],
        *(d_out.contiguous(), dladj.contiguous(), z, out, w, u, a, centred, param_grads),
        name=backend,
    )
    return grads if param_grads else (grads[0], None, None, None)


def differentiable_vjp(
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, Tensor],
    wanted: tuple[bool, ...],
    centred: bool,
    inverse: bool,
) -> list[Tensor | None]:
    """The backward pass as a graph of its own, for derivatives of derivatives."""
    # aliases: a parameter computed from z must not bring its own gradient to that of z
    z, w, u, b = (tensor.view_as(tensor) for tensor in inputs)
    leaves = [tensor for tensor, needed in zip((z, w, u, b), wanted) if needed]
    out, ladj, _ = reference.run_chain(z, w, u, b, centred, inverse)
    grads = iter(torch.autograd.grad((out, ladj), leaves, cotangents, create_graph=True))
    return [next(grads) if needed else None for needed in wanted]


for inverse in (False, True):
    node.define(
        *(FORWARD[inverse], BACKWARD[inverse], "BD KD KD K * | BD BKD BKD BK *"),
        # the node calls kernels itself; what it leaves to Python is not for them
        partial(gradients, inverse=inverse, backend="reference"),
    )


def planar_flow(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """A chain on (B, D) rows, through a kernel where one can answer and the reference elsewhere.

    Kernels know reverse-mode derivatives only: torch.func and forward-mode tangents get the
    reference, which PyTorch differentiates itself. So do empty tensors, and torch.compile where the
    backend is no registered op.
    """
    if (
        functorch_active()
        or forward_mode_active(z, w, u, b)
        or not (w.numel() and z.numel())
        or (torch.compiler.is_compiling() and not backends.traceable(FORWARD[inverse], z))
    ):
        return reference.run_chain(z, w, u, b, centred, inverse)[:2]
    if not (
        torch.is_grad_enabled()
        and (z.requires_grad or w.requires_grad or u.requires_grad or b.requires_grad)
    ):
        name = backends.current()
        out, ladj, _ = backends.call(FORWARD[inverse], z, w, u, b, centred, name=name)
        return out, ladj
    return PlanarFlow.apply(z, w, u, b, centred, inverse)
