"""The autograd node of a masked network: MADE, and the affine autoregressive layer both ways.

An op here takes (x, terms, weights, biases, stairs, *setting, save), where setting are numbers and
flags, and returns (*outputs, saved). Its backward takes (*cotangents, point, saved, weights,
stairs, *setting, term_layers, bias_layers, x_grad, param_grads); the point is the network's input:
x, or what the inverse found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastflow import backends
from fastflow.reference import autoregressive, made
from fastflow.transforms import batched, forward_mode_active, functorch_active


class Op(NamedTuple):
    """The names of an op's two passes, and what answers where no kernel can."""

    forward: str
    backward: str
    reference: Callable[..., tuple[Tensor, ...]]
    parallel: str | None  # the pass that computes `saved` from the network's input
    inverse: bool = False


OPS = {
    "made": Op("made_forward", "made_backward", made.made_forward, "made_forward"),
    "autoregressive": Op(
        "autoregressive_forward",
        "autoregressive_backward",
        autoregressive.autoregressive_forward,
        "autoregressive_forward",
    ),
    "autoregressive_inverse": Op(
        "autoregressive_inverse",
        "autoregressive_inverse_backward",
        autoregressive.autoregressive_inverse,
        "autoregressive_forward",
        inverse=True,
    ),
}


class MaskedNetwork(torch.autograd.Function):
    """One of `OPS` on the backend in force, with the lists of tensors laid out flat.

    Saves the network's input, the weights and one tensor of B (H_1 + .. + H_L + outputs) numbers;
    with `recompute` not that tensor, which backward then makes by a parallel pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        name: str,
        setting: tuple,
        layers: int,
        recompute: bool,
        x: Tensor,
        stairs: Tensor,
        *lists: Tensor,
    ) -> tuple[Tensor, ...]:
        op, backend = OPS[name], backends.current()
        weights, biases, terms = _split(lists, layers)
        *outputs, saved = backends.call(
            op.forward, x, terms, weights, biases, stairs, *setting, not recompute, name=backend
        )
        kept = outputs[0] if op.inverse else x
        # terms and biases are for recomputing and for derivatives of derivatives; they exist anyway
        ctx.save_for_backward(x, kept, saved, stairs, *lists)
        ctx.name, ctx.setting, ctx.layers, ctx.recompute = name, setting, layers, recompute
        ctx.backend = backend  # backward may run when use_backend is no longer in force
        return tuple(outputs)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x, point, saved, stairs, *lists = ctx.saved_tensors
        op, backend = OPS[ctx.name], ctx.backend
        x_grad, list_grads = ctx.needs_input_grad[4], ctx.needs_input_grad[6:]
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                found = differentiable_vjp(ctx, [x, *lists], stairs, cotangents)
                return (None, None, None, None, found[0], None, *found[1:])
            if functorch_active() or batched(cotangents[0]):
                backend = "reference"  # plain PyTorch operations, which vmap knows
        weights, biases, terms = _split(lists, ctx.layers)
        if ctx.recompute or backend != ctx.backend:  # every backend has its own layout of `saved`
            saved = backends.call(
                op.parallel, point, terms, weights, biases, stairs, *ctx.setting, True, name=backend
            )[-1]
        dx, d_terms, d_weights, d_biases = backends.call(
            op.backward,
            *(cotangent.contiguous() for cotangent in cotangents),
            *(point, saved, weights, stairs, *ctx.setting),
            *(_bits(terms), _bits(biases), x_grad, any(list_grads[: 2 * ctx.layers])),
            name=backend,
        )
        grads = [*d_weights, *d_biases, *(d_terms if terms else ())]
        return (
            *(None, None, None, None, dx if x_grad else None, None),
            *(grad if needed else None for grad, needed in zip(grads, list_grads)),
        )


def differentiable_vjp(
    ctx: FunctionCtx, inputs: list[Tensor], stairs: Tensor, cotangents: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The backward pass as a graph of its own, for derivatives of derivatives."""
    needed = [ctx.needs_input_grad[4], *ctx.needs_input_grad[6:]]
    # aliases: a weight computed from x must not bring its own gradient to that of x
    x, *lists = inputs = [tensor.view_as(tensor) for tensor in inputs]
    weights, biases, terms = _split(lists, ctx.layers)
    *outputs, _ = OPS[ctx.name].reference(x, terms, weights, biases, stairs, *ctx.setting, False)
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True))
    return [next(grads) if need else None for need in needed]


def masked_network(
    name: str,
    x: Tensor,
    terms: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    stairs: Tensor,
    setting: tuple,
    recompute: bool,
) -> tuple[Tensor, ...]:
    """One of `OPS` on (B, D) rows, through a kernel where one can answer, else the reference.

    Kernels know reverse-mode derivatives only: torch.func and forward-mode tangents get the
    reference, which PyTorch differentiates itself. So do empty tensors, and torch.compile where the
    backend is no registered op.
    """
    op, lists = OPS[name], [*weights, *biases, *terms]
    if (
        functorch_active()
        or forward_mode_active(x, *lists)
        or not x.numel()
        or (torch.compiler.is_compiling() and not backends.traceable(op.forward, x))
    ):
        return op.reference(x, terms, weights, biases, stairs, *setting, False)[:-1]
    if not (
        torch.is_grad_enabled()
        and (x.requires_grad or any(tensor.requires_grad for tensor in lists))
    ):
        backend = backends.current()
        arguments = (x, terms, weights, biases, stairs, *setting, False)
        return tuple(backends.call(op.forward, *arguments, name=backend)[:-1])
    return MaskedNetwork.apply(name, setting, len(weights), recompute, x, stairs, *lists)


def _split(lists: list[Tensor] | tuple[Tensor, ...], layers: int) -> tuple[list[Tensor], ...]:
    """weights, biases and terms; there may be no terms."""
    return list(lists[:layers]), list(lists[layers : 2 * layers]), list(lists[2 * layers :])


def _bits(tensors: list[Tensor]) -> int:
    """Bit i is set where the i-th tensor is not missing."""
    return sum(1 << i for i, tensor in enumerate(tensors) if tensor.shape != (0,))
