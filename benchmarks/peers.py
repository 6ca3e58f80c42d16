"""The peers that fastflow is measured against, as a competent researcher would write or use them.

Every contender is a `Chain`: a zero-argument `run`, the leaves it is differentiated in, and the way
back from the gradients of its leaves to named ones, here those of (z, w, u, b). The weights are the
same in all of them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

NEWTON_STEPS = 6
"""From the starting point of `eager_planar_inverse`, and with the benchmark's moderate weights,
float32 has converged after 4; `NEWTON_STEPS_EXACT` are for float64."""
NEWTON_STEPS_EXACT = 40

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Chain:
    """A contender with its parameters in place.

    Arguments:
        run: computes (z_K, ladj), or (z, ladj) for an inverse.
        leaves: what gradients are taken in; the first one is z.
        collect: the gradients of the leaves as those that `names` names.
        context: what must be in force while it runs.
        names: of the gradients that `collect` returns.
        hooks: whether it can be asked what it keeps for backward: torch.func refuses that.
        step: makes a step of training; None for that of a layer (comparison.py).
    """

    run: Callable[[], tuple[Tensor, Tensor]]
    leaves: Sequence[Tensor]
    collect: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = tuple
    context: Callable[[], AbstractContextManager] = nullcontext
    names: tuple[str, ...] = ("dz", "dw", "du", "db")
    hooks: bool = True
    step: Callable[[], Callable[[object], object]] | None = None


def of_function(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Parameters,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Chain:
    """A contender that is a function of (z, w, u, b)."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return Chain(lambda: function(*leaves), leaves, context=context)


def missing(library: str) -> str | None:
    """None if the library can be imported, else why not."""
    return None if importlib.util.find_spec(library) else f"{library} is not installed"


# Plain PyTorch


def softplus(p: Tensor) -> Tensor:
    """torch.nn.functional.softplus is off by 2e-9 above 20: no oracle in float64."""
    return torch.logaddexp(p, torch.zeros((), dtype=p.dtype, device=p.device))


def constrained(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """w.u_hat (...) and u_hat (..., D) of w, u (..., D)."""
    p = (w * u).sum(-1)
    s1 = softplus(p) - 1
    return s1, u + ((s1 - p) / (w * w).sum(-1)).unsqueeze(-1) * w


def eager_planar(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A planar chain in plain PyTorch, step by step as the paper writes it and libraries do."""
    ladj = torch.zeros_like(z[..., 0])
    for w_k, u_k, b_k in zip(w.unbind(-2), u.unbind(-2), b.unbind(-1), strict=True):
        s1, u_hat = constrained(w_k, u_k)
        dot = z @ w_k if w.dim() == 2 else (z * w_k).sum(-1)
        t = torch.tanh(dot + b_k)
        ladj = ladj + torch.log1p((1 - t * t) * s1)
        z = z + t.unsqueeze(-1) * u_hat
    return z, ladj


def hoisted_planar(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same chain, rearranged by somebody who has looked at a profile.

    What does not depend on z is computed once for all steps, and so are the log-determinants at
    the end; indexing by `unbind` keeps the backward pass from filling K arrays of zeros.
    """
    s1, u_hat = constrained(w, u)
    activations = []
    for w_k, u_k, b_k in zip(w.unbind(-2), u_hat.unbind(-2), b.unbind(-1), strict=True):
        dot = z @ w_k if w.dim() == 2 else (z * w_k).sum(-1)
        t = torch.tanh(dot + b_k)
        z = z + t.unsqueeze(-1) * u_k
        activations.append(t)
    t = torch.stack(activations, -1)
    return z, torch.log1p((1 - t * t) * s1).sum(-1)


def eager_planar_inverse(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, newton_steps: int = NEWTON_STEPS
) -> tuple[Tensor, Tensor]:
    """Its inverse: per step and row, Newton's method on a + s1 tanh(a) = r.

    It starts on the side from which it is monotone, so it needs no bracket, no test of convergence
    and no synchronisation.
    """
    s1, u_hat = constrained(w, u)
    activations = []
    steps = zip(w.unbind(-2), u_hat.unbind(-2), b.unbind(-1), s1.unbind(-1), strict=True)
    for w_k, u_k, b_k, s1_k in reversed(list(steps)):
        dot = z @ w_k if w.dim() == 2 else (z * w_k).sum(-1)
        r = dot + b_k
        size = r.abs()
        linear, shifted = size / (1 + s1_k), size - s1_k
        a = torch.where(s1_k >= 0, torch.maximum(linear, shifted), torch.minimum(linear, shifted))
        for _ in range(newton_steps):
            t = torch.tanh(a)
            a = a - (a + s1_k * t - size) / (1 + s1_k * (1 - t * t))
        t = torch.copysign(torch.tanh(a), r)
        z = z - t.unsqueeze(-1) * u_k
        activations.append(t)
    t = torch.stack(activations[::-1], -1)
    return z, -torch.log1p((1 - t * t) * s1).sum(-1)


def eager_planar_inverse_exact(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse for float64."""
    return eager_planar_inverse(z, w, u, b, NEWTON_STEPS_EXACT)


@functools.cache
def compile_missing(device: torch.device) -> str | None:
    """None if torch.compile can build code for the device, else why not, in one line."""
    try:
        torch.compile(lambda x: torch.tanh(x) + 1, fullgraph=True)(torch.ones(8, device=device))
    except RuntimeError as failure:  # no C++ compiler, no Python.h, no Triton: all derive from it
        return f"torch.compile cannot build here: {str(failure).strip().splitlines()[0]}"
    return None


def compiled(function: Callable[..., tuple[Tensor, Tensor]], inputs: Parameters) -> Chain:
    """A function under torch.compile, for these shapes; it compiles while it is being checked."""
    torch.compiler.reset()
    return of_function(torch.compile(function, fullgraph=True, dynamic=False), inputs)


# normflows


def normflows_planar(inputs: Parameters) -> Chain:
    """K normflows.flows.Planar layers: shared parameters only."""
    from normflows.flows import Planar

    z, w, u, b = (tensor.detach() for tensor in inputs)
    each = zip(w.split(1), u.split(1), b.split(1), strict=True)
    layers = [
        Planar(z.shape[1:], w=w_k.clone(), u=u_k.clone(), b=b_k.clone()) for w_k, u_k, b_k in each
    ]
    start = z.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        z, ladj = start, 0.0
        for layer in layers:
            z, log_det = layer(z)
            ladj = ladj + log_det
        return z, ladj

    leaves = [start, *(p for layer in layers for p in (layer.w, layer.u, layer.b))]
    return Chain(run, leaves, collect_shared)


def collect_shared(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(dz, dw_1, du_1, db_1, dw_2, ...) as (dz, dw, du, db)."""
    dz, *rest = grads
    dw, du = (torch.stack([g.reshape(-1) for g in rest[i::3]]) for i in (0, 1))
    return dz, dw, du, torch.cat(rest[2::3])


# Pyro


def pyro_planar(inputs: Parameters) -> Chain:
    """K Pyro Planar transforms; for amortised parameters what its ConditionalPlanar makes."""
    if inputs[1].dim() == 2:
        return _pyro_shared(inputs)
    return of_function(_pyro_amortised, inputs)


def _pyro_shared(inputs: Parameters) -> Chain:
    from pyro.distributions.transforms import Planar

    z, w, u, b = (tensor.detach() for tensor in inputs)
    layers = [Planar(z.shape[-1]).to(z) for _ in range(len(w))]
    with torch.no_grad():
        for layer, w_k, u_k, b_k in zip(layers, w, u, b, strict=True):
            layer.w.copy_(w_k)
            layer.u.copy_(u_k)
            layer.bias.copy_(b_k)
    start = z.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        return _pyro_chain(layers, start)

    leaves = [start, *(p for layer in layers for p in (layer.w, layer.u, layer.bias))]
    return Chain(run, leaves, collect_shared)


def _pyro_amortised(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    from pyro.distributions.transforms.planar import ConditionedPlanar

    parameters = zip(b.unsqueeze(-1).unbind(-2), u.unbind(-2), w.unbind(-2), strict=True)
    return _pyro_chain([ConditionedPlanar(three) for three in parameters], z)


def _pyro_chain(layers: Sequence, z: Tensor) -> tuple[Tensor, Tensor]:
    # A transform given the tensor of the call before answers from its cache: the view is a new
    # tensor, as a training step's is.
    z, ladj = z.view_as(z), 0.0
    for layer in layers:
        z_next = layer(z)
        ladj = ladj + layer.log_abs_det_jacobian(z, z_next)
        z = z_next
    return z, ladj
