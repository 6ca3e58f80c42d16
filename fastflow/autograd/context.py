"""The affine autoregressive layer with its context layer inside, by the autograd node alone.

In small networks a linear layer of its own costs as much as a layer of the network: three products
with a call each, and nodes in the graph. The ops here compute it tile by tile with the rest. CPUs
only; whatever the node declines goes by way of `ContextTerm.computed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastflow import backends
from fastflow.autograd import node
from fastflow.inner import global_hooks, plain
from fastflow.reference import autoregressive
from fastflow.reference.network import BY_NUMBER


class Op(NamedTuple):
    """The names of an op's two passes, and the op without a context in plain PyTorch."""

    forward: str
    backward: str
    reference: Callable[..., tuple[Tensor, ...]]


OPS = {
    "autoregressive": Op(
        "autoregressive_context_forward",
        "autoregressive_context_backward",
        autoregressive.autoregressive_forward,
    ),
    "autoregressive_inverse": Op(
        "autoregressive_context_inverse",
        "autoregressive_context_inverse_backward",
        autoregressive.autoregressive_inverse,
    ),
}
"""By the name of the op without a context."""


class ContextTerm(NamedTuple):
    """What a context adds to the first layer of a network, not yet computed: V c + v, or its act.

    Arguments:
        context: c, (*batch, C).
        weight: V, (n_1, C).
        bias: v, (n_1,) or None.
        activated: whether the network's activation is applied to it.
    """

    context: Tensor
    weight: Tensor
    bias: Tensor | None
    activated: bool

    @classmethod
    def of(cls, layer: nn.Linear, context: Tensor, activated: bool = False) -> ContextTerm:
        """What a `plain_linear` layer makes of a context."""
        own = layer._parameters
        return cls(context, own["weight"], own["bias"], activated)  # pyright: ignore[reportArgumentType]

    def computed(
        self, activation: int, layers: int, dtype: torch.dtype | None = None
    ) -> list[Tensor | None]:
        """The terms of all layers; `activation` is the network's, by number.

        They are computed in a type where one is given, and otherwise in that of the tensors.
        """
        context, weight, bias = self[:3]
        if dtype is not None:
            context, weight = context.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        term = nnf.linear(context, weight, bias)
        first = BY_NUMBER[activation].value(term) if self.activated else term
        return [first, *[None] * (layers - 1)]


def plain_linear(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a call of the layer computes V c + v and nothing else, so that it need not be made.

    Not so with hooks, subclasses and parametrizations, nor where a graph shall show the layer, nor
    where weights are plain attributes, as `nn.DataParallel` leaves them.
    """
    return (
        type(layer) is nn.Linear
        and not torch.compiler.is_compiling()
        and plain(layer)
        and "weight" in layer._parameters
        and "bias" in layer._parameters
        and not global_hooks()
    )


def by_node(
    name: str,
    x: Tensor,
    term: ContextTerm,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stairs: Tensor,
    setting: tuple,
) -> tuple[Tensor, ...] | None:
    """The outputs of one of `OPS`; None if the node declines, or other backends shall.

    Autocast rounds the context's layer, in both directions alike, so it must be seen.
    """
    if name not in OPS or not node.enabled or backends.current() not in (None, "cpp"):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if not (isinstance(x, Tensor) and x.is_cpu) or torch.compiler.is_compiling():
        return None
    return _calls[name](x, *term, weights, biases, stairs, *setting, True)


def _gradients(
    arguments: tuple,
    outputs: tuple,
    cotangents: tuple[Tensor, ...],
    wanted: Sequence[bool],
    reference: Callable[..., tuple[Tensor, ...]],
) -> list[Tensor | None]:
    """By PyTorch's own derivatives of the reference, as a graph where that is asked for."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: a weight computed from x must not bring its own gradient to that of x
        aliases: list[Any] = [
            [tensor.view_as(tensor) for tensor in argument]
            if isinstance(argument, list)
            else argument.view_as(argument)
            if isinstance(argument, Tensor)
            else argument
            for argument in arguments
        ]
        x, *term, weights, biases, stairs, activation, residual, scale, c0, c1, _ = aliases
        first, *_ = ContextTerm(*term).computed(activation, len(weights))
        terms = [first, *[x.new_empty(0)] * (len(weights) - 1)]
        *found, _ = reference(
            *(x, terms, weights, biases, stairs, activation, residual, scale, c0, c1, False)
        )
        tensors = [
            tensor
            for argument in aliases
            for tensor in (argument if isinstance(argument, list) else [argument])
            if isinstance(tensor, Tensor)
        ]
        leaves = [tensor for tensor, want in zip(tensors, wanted) if want]
        grads = iter(torch.autograd.grad(found, leaves, cotangents, create_graph=differentiable))
    return [next(grads) if want else None for want in wanted]


_calls: dict[str, Any] = {
    name: node.define(
        *(op.forward, op.backward, "Bn BC HC * * [nn'] [n]? * * * * * * *"),
        partial(_gradients, reference=op.reference),
    )
    for name, op in OPS.items()
}
