"""PCP-Map as one writes it without closed forms: autograd differentiates the potential twice.

All contenders have the same weights and the same way from context to terms, that of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from peers import Chain
from torch import Tensor
from torch.nn import functional as nnf

import fastflow

NEWTON_STEPS = 5
"""Undamped, from y: with the benchmark's moderate weights float32 has converged after 4.
`NEWTON_STEPS_EXACT` are for float64."""
NEWTON_STEPS_EXACT = 12


class Problem(NamedTuple):
    """A layer and what it is given."""

    layer: fastflow.PCPMap
    point: Tensor  # x, or y for the inverse
    context: Tensor

    def double(self) -> Problem:
        return Problem(
            copy.deepcopy(self.layer).double(), self.point.double(), self.context.double()
        )


def potential(x: Tensor, *tensors: Tensor) -> Tensor:
    """P (..) of x (.., D) and a network of two layers, laid out as `Network.tensors` is."""
    u_1, u_2, weight, t_1, t_2, slope, shift, curvature, gate, b_1, b_2 = tensors
    w = nnf.softplus((b_1 * x) @ u_1.mT + t_1)
    w = nnf.softplus((gate * w) @ weight.mT + (b_2 * x) @ u_2.mT + t_2)
    return (slope * w).sum(-1) + (shift * x).sum(-1) + (curvature * x * x).sum(-1) / 2


def by_vjps(x: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient (B, D) and the Hessian (B, D, D), one vector-Jacobian product a feature."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        if not recorded:
            x = x.detach().requires_grad_()
        (y,) = torch.autograd.grad(potential(x, *tensors).sum(), x, create_graph=True)
        rows = [
            torch.autograd.grad(column.sum(), x, create_graph=recorded, retain_graph=True)[0]
            for column in y.unbind(-1)
        ]
    return (y if recorded else y.detach()), torch.stack(rows, 1)


def by_func(x: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same by torch.func: what hessian is, jacfwd of grad, with the gradient kept, vmapped."""
    shared, terms = tensors[:3], tensors[3:]

    def gradient(x: Tensor, *terms: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.func.grad(potential)(x, *shared, *terms)
        return y, y

    matrix, y = torch.func.vmap(torch.func.jacfwd(gradient, has_aux=True))(x, *terms)
    return y, matrix


HESSIANS = {"vjps": by_vjps, "hessian": by_func}


def log_det(matrix: Tensor) -> Tensor:
    return 2 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def fastflow_layer(problem: Problem, inverse: bool, backend: str) -> Chain:
    """PCPMap itself, on a backend."""
    layer, point, context = own(problem)
    run = layer.inverse if inverse else layer
    made = chain(lambda: run(point, context), layer, point, context)
    return replace(made, context=partial(fastflow.use_backend, backend))


def differentiated(problem: Problem, find: Callable, inverse: bool, steps: int) -> Chain:
    """The map by one of `HESSIANS`; its inverse by Newton's method, a fixed number of steps."""
    layer, point, context = own(problem)

    def run() -> tuple[Tensor, Tensor]:
        tensors = layer.network(context, point.dtype).tensors
        x = point
        for _ in range(steps if inverse else 0):
            y, matrix = find(x, tensors)
            x = x - torch.linalg.solve(matrix, y - point)
        y, matrix = find(x, tensors)
        return (x, -log_det(matrix)) if inverse else (y, log_det(matrix))

    return chain(run, layer, point, context, hooks=find is not by_func)


def own(problem: Problem) -> tuple[fastflow.PCPMap, Tensor, Tensor]:
    """A copy of the problem, to differentiate in."""
    tensors = (tensor.detach().clone().requires_grad_() for tensor in problem[1:])
    return (copy.deepcopy(problem.layer), *tensors)


def chain(
    run: Callable[[], tuple[Tensor, Tensor]],
    layer: fastflow.PCPMap,
    point: Tensor,
    context: Tensor,
    hooks: bool = True,
) -> Chain:
    """A contender, with gradients in the points, the context and all parameters."""
    names, parameters = zip(*layer.named_parameters())
    names = ("dx", "dcontext", *(f"d{name}" for name in names))
    return Chain(run, [point, context, *parameters], names=names, hooks=hooks)
