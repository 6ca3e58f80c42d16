"""Affine autoregressive layers in plain PyTorch: as they are usually written, and at their best.

Every contender is a `Chain` whose gradients come back as those of `Network.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from masked_network import ACTIVATIONS, Network
from peers import Chain, softplus
from torch import Tensor
from torch.nn import functional as F

from fastflow import scales


def outputs(
    network: Network, t: dict[str, Tensor], x: Tensor, dense: bool = False
) -> tuple[Tensor, Tensor]:
    """Shift and log-scale (B, D) of a masked network as it is usually written.

    With `dense` the masks are left out: right only where the weights are zero already.
    """
    activation, L = ACTIVATIONS[network.activation][0], network.hidden
    below, levels = x, []
    for number in range(1, L + 2):
        weight = t[f"W{number}"]
        if not dense:
            weight = weight * network.masks[number - 1]
        p = F.linear(below, weight, t[f"b{number}"])
        if number == 1 and "V" in t:
            term = F.linear(t["context"], t["V"], t.get("v"))
            p = p + (activation(term) if network.form.active_context else term)
        if network.form.residual and number % 2 and 3 <= number <= L:
            p = p + levels[-2]
        levels.append(p)
        below = p if network.form.residual and number == L else activation(p)
    m, a = levels[-1].unflatten(-1, (-1, 2)).unbind(-1)
    return m, log_scale(a, network.form.scale)


def log_scale(a: Tensor, scale: scales.Scale) -> Tensor:
    """log s(a), by the formulas of `fastflow.scales`."""
    c0, c1 = scale.constants
    if isinstance(scale, scales.SoftClip):
        return a / (1 + (a / c0).abs())
    if isinstance(scale, scales.Softplus):
        return torch.log(softplus(a + c0) + c1)
    if isinstance(scale, scales.Sigmoid):
        return torch.log(torch.sigmoid(a + c0) + c1)
    assert isinstance(scale, scales.Clamp)
    return a + (a.clamp(c0, c1) - a).detach()


def eager(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The parallel direction: y (B, D) and ladj (B,)."""
    m, l = outputs(network, t, t["x"])  # noqa: E741
    return t["x"] * l.exp() + m, l.sum(-1)


def dense(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same without masks: what any dense network of these widths costs."""
    m, l = outputs(network, t, t["x"], dense=True)  # noqa: E741
    return t["x"] * l.exp() + m, l.sum(-1)


def eager_inverse(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse as libraries compute it: D passes, each gets one more feature right."""
    x = torch.zeros_like(t["x"])
    for _ in range(x.shape[-1]):
        m, l = outputs(network, t, x)  # noqa: E741
        x = (t["x"] - m) * (-l).exp()
    return x, -l.sum(-1)


def jacobi_inverse(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same iteration, ended as soon as nothing changes any more."""
    x = torch.zeros_like(t["x"])
    for _ in range(x.shape[-1]):
        m, l = outputs(network, t, x)  # noqa: E741
        before, x = x, (t["x"] - m) * (-l).exp()
        if torch.equal(before, x):
            break
    return x, -l.sum(-1)


def of_function(network: Network, function: Callable[..., tuple[Tensor, Tensor]]) -> Chain:
    """A contender that is a function of the network and its tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in network.tensors.values()]

    def run() -> tuple[Tensor, Tensor]:
        return function(network, dict(zip(network.tensors, leaves)))

    return Chain(run, leaves, names=network.gradients)


def compiled(network: Network) -> Chain:
    """`eager` under torch.compile, for these shapes; it compiles while it is being checked."""
    torch.compiler.reset()
    return of_function(network, torch.compile(eager, fullgraph=True, dynamic=False))


def dense_chain(network: Network) -> Chain:
    """`dense` on weights that were masked beforehand; the masks return for its gradients."""
    seen = {f"W{number}": mask for number, mask in enumerate(network.masks, 1)}
    tensors = {name: t * seen[name] if name in seen else t for name, t in network.tensors.items()}

    def collect(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        each = zip(network.tensors, grads, strict=True)
        return tuple(grad * seen[name] if name in seen else grad for name, grad in each)

    return replace(of_function(replace(network, tensors=tensors), dense), collect=collect)


def inverse_and_gradients(
    network: Network, cotangents: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """What the inverse must return, without D passes: fixed points both ways.

    With x = f^-1(y) and gx the cotangent of x, dy solves J' dy = gx, where J = df/dx = diag(s) + N.
    N is strictly triangular, so dy <- (gx - N' dy) / s no longer changes after D rounds at most.

    Arguments:
        network: at y.
        cotangents: of x and of the inverse's ladj; None for the outputs alone.
    """
    with torch.no_grad():
        x, ladj = jacobi_inverse(network, network.tensors)
    found = {"x": x, "ladj": ladj}
    if cotangents is None:
        return found
    leaves = {name: t.detach().requires_grad_() for name, t in network.at(x).tensors.items()}
    start, (dx, dladj) = leaves["x"], cotangents
    m, l = outputs(network, leaves, start)  # noqa: E741
    y, ladj, s = x * l.exp() + m, l.sum(-1), l.detach().exp()  # x is constant: dy/dx is N
    (through,) = torch.autograd.grad(ladj, start, -dladj, retain_graph=True)
    gx = dx + through
    dy = gx / s
    for _ in range(x.shape[-1]):
        (product,) = torch.autograd.grad(y, start, dy, retain_graph=True)
        before, dy = dy, (gx - product) / s
        if torch.equal(before, dy):
            break
    others = [leaf for name, leaf in leaves.items() if name != "x"]
    rest = torch.autograd.grad((y, ladj), others, (-dy, -dladj))
    return found | dict(zip(network.gradients, (dy, *rest)))
