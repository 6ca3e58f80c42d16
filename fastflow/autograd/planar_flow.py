"""The autograd node of a planar chain, in either direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastflow import backends
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
        ctx: FunctionCtx, z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        backend = backends.current()
        out, ladj, a = backends.call(FORWARD[inverse], z, w, u, b, centred, name=backend)
        ctx.save_for_backward(z, out, w, u, b, a)
        # backward may run when another use_backend is in force, or none
        ctx.centred, ctx.inverse, ctx.backend = centred, inverse, backend
        return out, ladj

    @staticmethod
    def backward(ctx: FunctionCtx, d_out: Tensor, dladj: Tensor) -> tuple[Tensor | None, ...]:
        z, out, w, u, b, a = ctx.saved_tensors
        backend = ctx.backend
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                inputs = (z, w, u, b)
                return (*differentiable_vjp(ctx, inputs, (d_out, dladj)), None, None)
            if functorch_active() or batched(d_out):
                backend = "reference"  # plain PyTorch operations, which vmap knows
        param_grads = any(ctx.needs_input_grad[1:4])
        grads = backends.call(
            BACKWARD[ctx.inverse],
            *(d_out.contiguous(), dladj.contiguous(), z, out, w, u, a, ctx.centred, param_grads),
            name=backend,
        )
        if param_grads:
            return (*grads, None, None)
        return grads[0], None, None, None, None, None


def differentiable_vjp(
    ctx: FunctionCtx, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The backward pass as a graph of its own, for derivatives of derivatives."""
    # aliases: a parameter computed from z must not bring its own gradient to that of z
    inputs = [tensor.view_as(tensor) for tensor in inputs]
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad) if needed]
    out, ladj, _ = reference.run_chain(*inputs, ctx.centred, ctx.inverse)
    grads = iter(torch.autograd.grad((out, ladj), wanted, cotangents, create_graph=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:4]]


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
        return backends.call(FORWARD[inverse], z, w, u, b, centred, name=backends.current())[:2]
    return PlanarFlow.apply(z, w, u, b, centred, inverse)
