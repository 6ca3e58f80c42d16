"""The autograd node of a masked network: MADE, and the affine autoregressive layer both ways.

An op here takes (x, terms, weights, biases, stairs, *setting, save), where setting are numbers and
flags, and returns (*outputs, saved). Its backward takes (*cotangents, point, saved, weights,
stairs, *setting, terms_grad, biases_given, x_grad, param_grads); the point is the network's input:
x, or what the inverse found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import backends
from fastflow.autograd import node
from fastflow.reference import autoregressive, made
from fastflow.transforms import batched, forward_mode_active, functorch_active

Tensors = Sequence[Tensor]

CHEAP_PASS = 3 * 2**19
"""Multiply-adds of a pass below which calling functions takes most of its time, on a CPU core."""


class Op(NamedTuple):
    """The names of an op's two passes, and what answers where no kernel can."""

    forward: str
    backward: str
    reference: Callable[..., tuple[Tensor, ...]]
    parallel: str  # the pass that computes `saved` from the network's input
    setting: str  # a star for every number and flag, as the node counts arguments
    inverse: bool = False


OPS = {
    "made": Op("made_forward", "made_backward", made.made_forward, "made_forward", "* *"),
    "autoregressive": Op(
        "autoregressive_forward",
        "autoregressive_backward",
        autoregressive.autoregressive_forward,
        "autoregressive_forward",
        "* * * * *",
    ),
    "autoregressive_inverse": Op(
        "autoregressive_inverse",
        "autoregressive_inverse_backward",
        autoregressive.autoregressive_inverse,
        "autoregressive_forward",
        "* * * * *",
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
        ctx: Any, name: str, setting: tuple, layers: int, recompute: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        op, backend = OPS[name], backends.current()
        *outputs, saved = backends.call(
            op.forward, *_nested(tensors, layers), *setting, not recompute, name=backend
        )
        kept = (outputs[0],) if op.inverse else ()
        # terms and biases are for recomputing and for derivatives of derivatives; they exist anyway
        ctx.save_for_backward(*tensors, saved, *kept)
        ctx.name, ctx.setting, ctx.layers, ctx.recompute = name, setting, layers, recompute
        ctx.backend = backend  # backward may run when use_backend is no longer in force
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        # hooks on saved tensors may return other strides than they were given
        tensors = [tensor.contiguous() for tensor in ctx.saved_tensors]
        saved, *kept = tensors[len(wanted) :]
        arguments = (*_nested(tensors[: len(wanted)], ctx.layers), *ctx.setting, False)
        outputs = (*kept, None if ctx.recompute else saved)
        grads = gradients(arguments, outputs, cotangents, wanted, ctx.name, ctx.backend)
        return (None, None, None, None, *grads)


def gradients(
    arguments: tuple[Any, ...],
    outputs: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor, ...],
    wanted: Sequence[bool],
    name: str,
    backend: str | None,
) -> list[Tensor | None]:
    """The gradients of x, terms, weights, biases and stairs laid out flat, None if not wanted.

    Arguments:
        arguments: those of the op.
        outputs: its outputs. Only the first, if the op is the inverse, and the last are read: what
            it saved, None if that is to be computed anew.
        cotangents: of all outputs but the last.
        wanted: for every tensor.
        name: of the op.
        backend: which one computes.
    """
    op, saved = OPS[name], outputs[-1]
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return differentiable_vjp(op, arguments, cotangents, wanted)
        if functorch_active() or any(map(batched, cotangents)):
            # plain PyTorch operations, which vmap knows; they have their own layout of `saved`
            backend, saved = "reference", None
    x, terms, weights, biases, stairs, *setting, _ = arguments
    point = outputs[0] if op.inverse else x
    if saved is None:
        saved = backends.call(
            op.parallel, point, terms, weights, biases, stairs, *setting, True, name=backend
        )[-1]
    of_terms, of_parameters = wanted[1 : 1 + len(terms)], wanted[1 + len(terms) : -1]
    dx, d_terms, d_weights, d_biases = backends.call(
        op.backward,
        *(cotangent.contiguous() for cotangent in cotangents),
        *(point, saved, weights, stairs, *setting),
        *(_bits(terms, of_terms), _bits(biases), wanted[0], any(of_parameters)),
        name=backend,
    )
    grads = [dx, *d_terms[: len(terms)], *d_weights, *d_biases]
    return [*(grad if want else None for grad, want in zip(grads, wanted)), None]


def differentiable_vjp(
    op: Op,
    arguments: tuple[Any, ...],
    cotangents: tuple[Tensor, ...],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The backward pass as a graph of its own, for derivatives of derivatives."""
    x, terms, weights, biases, stairs, *setting, _ = arguments
    # aliases: a weight computed from x must not bring its own gradient to that of x
    tensors = [tensor.view_as(tensor) for tensor in (x, *terms, *weights, *biases, stairs)]
    *outputs, _ = op.reference(*_nested(tensors, len(weights)), *setting, False)
    leaves = [tensor for tensor, want in zip(tensors, wanted) if want]
    grads = iter(torch.autograd.grad(outputs, leaves, cotangents, create_graph=True))
    return [next(grads) if want else None for want in wanted]


def _for_the_node(
    arguments: tuple,
    outputs: tuple,
    cotangents: tuple[Tensor, ...],
    wanted: Sequence[bool],
    name: str,
) -> list[Tensor | None]:
    """`gradients` where the node, which calls kernels itself, leaves them to Python."""
    return gradients(arguments, (*outputs[:-1], None), cotangents, wanted, name, "reference")


for name, op in OPS.items():
    node.define(
        *(op.forward, op.backward, f"Bn [Bn]? [nn'] [n]? * {op.setting} *"),
        partial(_for_the_node, name=name),
    )


def by_node(
    name: str,
    x: Tensor,
    terms: Sequence[Tensor | None],
    weights: Tensors,
    biases: Sequence[Tensor | None],
    stairs: Tensor,
    setting: tuple,
) -> tuple[Tensor, ...] | None:
    """One of `OPS` by the autograd node; None if it declines, see `fastflow.autograd.node.run`."""
    return node.run(OPS[name].forward, x, terms, weights, biases, stairs, *setting, True)


def passes_are_cheap(x: Tensor, weights: Tensors) -> bool:
    """Whether, in plain PyTorch, D passes take less time than a sweep over D features."""
    features, rows = x.shape[-1], x.shape[:-1].numel()
    work = (features - 1) * rows * sum(weight.numel() for weight in weights)
    return work < features * CHEAP_PASS  # a sweep does the work of one pass


def by_autograd(
    name: str,
    x: Tensor,
    terms: Tensors,
    weights: Tensors,
    biases: Tensors,
    stairs: Tensor,
    setting: tuple,
) -> tuple[Tensor, ...] | None:
    """One of `OPS` in plain PyTorch, which differentiates it; None where a backend shall compute.

    Where no compiled backend serves, the passes that PyTorch derives take less time than those of
    the reference by hand. The inverse is such passes only where each is cheap, as a sweep over
    features calls many more functions; else the reference sweeps.
    """
    op = OPS[name]
    if not backends.uncompiled(op.forward, x.device.type):
        return None
    if op.inverse:
        if not passes_are_cheap(x, weights):
            return None
        compute = autoregressive.inverse_of_network
    else:
        compute = op.reference
        setting = (*setting, False)
    outputs = compute(x, terms, weights, biases, stairs, *setting)
    return outputs if op.inverse else outputs[:-1]


def masked_network(
    name: str,
    x: Tensor,
    terms: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    stairs: Tensor | Tensors,
    setting: tuple,
    recompute: bool,
) -> tuple[Tensor, ...]:
    """One of `OPS` on (B, D) rows, through a kernel where one can answer, else the reference.

    Kernels know reverse-mode derivatives only: torch.func and forward-mode tangents get the
    reference, which PyTorch differentiates itself. So do tensors without values, masks that are no
    staircase, and torch.compile where the backend is no registered op.
    """
    op, network = OPS[name], (x, terms, weights, biases, stairs)
    if not isinstance(stairs, Tensor):
        if backends.current() not in (None, "reference"):
            raise RuntimeError(
                f"{name}: backend {backends.current()} needs masks that are a staircase"
            )
        return op.reference(*network, *setting, False)[:-1]
    if not recompute:
        given = [[one if one.shape != (0,) else None for one in some] for some in (terms, biases)]
        outputs = by_node(name, x, given[0], weights, given[1], stairs, setting)
        if outputs is not None:
            return outputs
    tensors = (x, *terms, *weights, *biases)
    if (
        functorch_active()
        or forward_mode_active(*tensors)
        or not x.numel()
        or x.is_meta
        or (torch.compiler.is_compiling() and not backends.traceable(op.forward, x))
    ):
        return op.reference(*network, *setting, False)[:-1]
    if not recompute:
        outputs = by_autograd(name, x, terms, weights, biases, stairs, setting)
        if outputs is not None:
            return outputs
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return tuple(
            backends.call(op.forward, *network, *setting, False, name=backends.current())[:-1]
        )
    return MaskedNetwork.apply(name, setting, len(weights), recompute, *tensors, stairs)


def _nested(tensors: Tensors, layers: int) -> tuple[Tensor | list[Tensor], ...]:
    """x, terms, weights, biases and stairs laid out flat, as an op takes them."""
    x, *lists, stairs = tensors
    terms = len(lists) - 2 * layers  # there may be none
    return x, lists[:terms], lists[terms : terms + layers], lists[terms + layers :], stairs


def _bits(tensors: Tensors, wanted: Sequence[bool] | None = None) -> int:
    """Bit i is set where the i-th tensor is not missing and, if asked, is wanted."""
    return sum(
        1 << i
        for i, tensor in enumerate(tensors)
        if tensor.shape != (0,) and (wanted is None or wanted[i])
    )
