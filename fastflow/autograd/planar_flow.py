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
        out, ladj, a = backends.call(FORWARD[inverse], z, w, u, b, centred)
        ctx.save_for_backward(z, out, w, u, b, a)
        ctx.set_materialize_grads(False)
        # backward may run on another thread, where use_backend is not in force
        ctx.centred, ctx.inverse, ctx.backend = centred, inverse, backends.current()
        return out, ladj

    @staticmethod
    def backward(
        ctx: FunctionCtx, d_out: Tensor | None, dladj: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        z, out, w, u, _, a = ctx.saved_tensors
        if d_out is None and dladj is None:
            return (None,) * 6
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*differentiable_vjp(ctx, d_out, dladj), None, None)
        backend = ctx.backend
        if not torch.compiler.is_compiling() and (
            functorch_active() or batched(dladj if d_out is None else d_out)
        ):
            backend = "reference"  # plain PyTorch operations, which vmap knows
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        dladj = z.new_zeros(z.shape[0]) if dladj is None else dladj.contiguous()
        param_grads = any(ctx.needs_input_grad[1:4])
        arguments = (d_out, dladj, z, out, w, u, a, ctx.centred, param_grads)
        grads = backends.call(BACKWARD[ctx.inverse], *arguments, name=backend)
        if param_grads:
            return (*grads, None, None)
        return grads[0], None, None, None, None, None


def differentiable_vjp(
    ctx: FunctionCtx, d_out: Tensor | None, dladj: Tensor | None
) -> list[Tensor | None]:
    """The backward pass as a graph of its own, for derivatives of derivatives."""
    z, _, w, u, b, _ = ctx.saved_tensors
    wanted = [tensor for tensor, needed in zip((z, w, u, b), ctx.needs_input_grad) if needed]
    out, ladj, _ = reference.run_chain(z, w, u, b, ctx.centred, ctx.inverse)
    pairs = [(o, g) for o, g in ((out, d_out), (ladj, dladj)) if g is not None]
    outputs, cotangents = zip(*pairs)
    grads = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True))
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
        return backends.call(FORWARD[inverse], z, w, u, b, centred)[:2]
    return PlanarFlow.apply(z, w, u, b, centred, inverse)
