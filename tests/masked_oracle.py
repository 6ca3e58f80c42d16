"""Masked networks as the papers write them: dense layers times masks, inverse by D passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastflow import masks
from fastflow.scales import Clamp, Gate, Scale, Sigmoid, SoftClip, Softplus

# bounds within reach, so that both sides of the clamp occur
SCALES = [SoftClip(), Softplus(), Softplus(0.0), Sigmoid(), Clamp(-0.5, 0.3), Gate()]
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": nnf.elu,
    "silu": nnf.silu,
    "gelu": nnf.gelu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "leaky_relu": nnf.leaky_relu,
}


@dataclass
class Problem:
    """A network with everything that an op takes of it, and points to apply it to."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    terms: list[Tensor | None] | None
    degrees: list[Tensor]
    activation: str = "relu"
    residual: bool = False
    strict: bool = True

    @property
    def stairs(self) -> Tensor:
        return masks.staircase(self.degrees, self.strict).to(self.x.device)

    @property
    def network(self) -> dict:
        """The keyword arguments of the ops."""
        names = ("weights", "biases", "stairs", "terms", "activation", "residual")
        return {name: getattr(self, name) for name in names}

    @property
    def leaves(self) -> list[Tensor]:
        tensors = [self.x, *self.weights, *self.biases, *(self.terms or [])]
        return [tensor for tensor in tensors if tensor is not None]

    def to(self, *args: object) -> Problem:
        """A copy whose tensors are new leaves."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(*args).requires_grad_()

        lists = {
            name: [leaf(tensor) for tensor in getattr(self, name)]
            for name in ("weights", "biases", "terms")
            if getattr(self, name) is not None
        }
        return replace(self, x=leaf(self.x), **lists)

    def masks(self) -> list[Tensor]:
        """Straight from the degrees."""
        found = []
        for number, (below, above) in enumerate(pairwise(self.degrees), 1):
            last = self.strict and number == len(self.weights)
            seen = above[:, None] > below if last else above[:, None] >= below
            found.append(seen.to(self.x.device))
        return found

    def outputs(self, x: Tensor | None = None) -> Tensor:
        """What the network makes of x; masks multiply, so weights must be finite."""
        act = ACTIVATIONS[self.activation]
        terms = self.terms or [None] * len(self.weights)

        def layer(number: int, h: Tensor) -> Tensor:
            h = nnf.linear(h, self.weights[number] * self.masks()[number], self.biases[number])
            return h if terms[number] is None else h + terms[number]

        h = self.x if x is None else x
        last = len(self.weights) - 1
        if self.residual:
            h = layer(0, h)
            for number in range(1, last, 2):
                h = h + layer(number + 1, act(layer(number, act(h))))
        else:
            for number in range(last):
                h = act(layer(number, h))
        return layer(last, h)


def problem(
    rows: int,
    features: int,
    hidden: tuple[int, ...],
    *,
    per_feature: int = 2,
    order: object = "random",
    context: bool = False,
    sorted_units: bool = True,
    biases: bool = True,
    activation: str = "relu",
    residual: bool = False,
) -> Problem:
    """A random network in float64 with activations of order one."""
    own = masks.ranks(order, features) + 1
    inner = [masks.hidden_degrees(width, features, 0 if context else 1) for width in hidden]
    if not sorted_units:  # residual blocks need the same degrees throughout
        inner = [degrees[torch.randperm(len(degrees))] for degrees in inner]
        inner = [inner[0]] * len(inner) if residual else inner
    degrees = [own, *inner, own.repeat_interleave(per_feature)]
    widths = [len(level) for level in degrees]
    kind = {"dtype": torch.float64}
    return Problem(
        torch.randn(rows, features, **kind),
        [torch.randn(n, m, **kind) * (2 / m) ** 0.5 for m, n in pairwise(widths)],
        [torch.randn(n, **kind) * 0.5 if biases else None for n in widths[1:]],
        [torch.randn(rows, widths[1], **kind)] + [None] * len(inner) if context else None,
        degrees,
        activation,
        residual,
    ).to(kind["dtype"])


def log_scale(a: Tensor, scale: Scale) -> Tensor:
    """The paper's formulas; the straight-through derivative of Clamp included."""
    c0, c1 = scale.constants
    if isinstance(scale, SoftClip):
        return a / (1 + (a / c0).abs())
    if isinstance(scale, Softplus):
        return torch.log(torch.logaddexp(a + c0, torch.zeros_like(a)) + c1)
    if isinstance(scale, Sigmoid):
        return torch.log(torch.sigmoid(a + c0) + c1)
    if isinstance(scale, Clamp):
        return a + (a.clamp(c0, c1) - a).detach()
    return nnf.logsigmoid(a + c0)


def affine(given: Problem, scale: Scale, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The parallel direction: y and ladj at x."""
    x = given.x if x is None else x
    m, a = given.outputs(x).unflatten(-1, (x.shape[-1], 2)).unbind(-1)
    l = log_scale(a, scale)  # noqa: E741
    s = torch.exp(l)
    return s * x + ((1 - s) * m if isinstance(scale, Gate) else m), l.sum(-1)


def affine_inverse(given: Problem, scale: Scale, y: Tensor) -> tuple[Tensor, Tensor]:
    """D passes through the whole network, one feature right after each, as libraries do it."""
    x = torch.zeros_like(y)
    ladj = torch.zeros_like(y[..., 0])
    for feature in given.degrees[0].argsort().tolist():
        m, a = given.outputs(x).unflatten(-1, (y.shape[-1], 2))[..., feature, :].unbind(-1)
        l = log_scale(a, scale)  # noqa: E741
        value = (y[..., feature] - m) * torch.exp(-l)
        if isinstance(scale, Gate):
            value = value + m
        x = torch.where(torch.arange(y.shape[-1], device=y.device) == feature, value[:, None], x)
        ladj = ladj - l
    return x, ladj
