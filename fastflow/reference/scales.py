"""The affine step of an autoregressive layer and its derivatives, for every scale map.

With shift m and raw scale a from the network, l = log s:

    number  0 softclip   l = a / (1 + |a / c0|)
            1 softplus   s = softplus(a + c0) + c1
            2 sigmoid    s = sigmoid(a + c0) + c1
            3 clamp      l = clamp(a, c0, c1), with derivative 1
            4 gate       s = sigmoid(a + c0)

    y = s x + m,   for the gate y = s x + (1 - s) m
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastflow.reference.network import softplus

GATE = 4


def log_scale(a: Tensor, scale: int, c0: float, c1: float) -> Tensor:
    """l of the raw scale a; differentiable."""
    if scale == 0:
        return a / (1 + (a / c0).abs())
    if scale == 1:
        return torch.log(softplus(a + c0) + c1)
    if scale == 2:
        return torch.log(torch.sigmoid(a + c0) + c1)
    if scale == 3:
        return a + (a.clamp(c0, c1) - a).detach()
    return logsigmoid(a + c0)


def log_scale_slope(a: Tensor, scale: int, c0: float, c1: float) -> Tensor:
    """dl/da."""
    if scale == 0:
        return (1 + (a / c0).abs()) ** -2
    if scale == 1:
        return torch.sigmoid(a + c0) / (softplus(a + c0) + c1)
    if scale == 2:
        s = torch.sigmoid(a + c0)
        return s * torch.sigmoid(-a - c0) / (s + c1)
    if scale == 3:
        return torch.ones_like(a)
    return torch.sigmoid(-a - c0)


def step(x: Tensor, m: Tensor, a: Tensor, scale: int, c0: float, c1: float) -> tuple[Tensor, ...]:
    """(y, l) of features x with shift m and raw scale a."""
    l = log_scale(a, scale, c0, c1)  # noqa: E741
    s = torch.exp(l)
    if scale == GATE:
        return s * x + torch.sigmoid(-a - c0) * m, l
    return torch.addcmul(m, s, x), l


def step_back(
    y: Tensor, m: Tensor, a: Tensor, scale: int, c0: float, c1: float
) -> tuple[Tensor, ...]:
    """(x, l) of features y: the inverse of `step`."""
    l = log_scale(a, scale, c0, c1)  # noqa: E741
    x = (y - m) * torch.exp(-l)
    return (x + m if scale == GATE else x), l


def step_vjp(
    dy: Tensor,
    dladj: Tensor,
    x: Tensor,
    m: Tensor,
    a: Tensor,
    scale: int,
    c0: float,
    c1: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dm, da) of `step`, given the cotangents of y and of the sum of l."""
    s = torch.exp(log_scale(a, scale, c0, c1))
    slope = log_scale_slope(a, scale, c0, c1)
    if scale == GATE:
        closed = torch.sigmoid(-a - c0)
        return s * dy, closed * dy, (dy * s * (x - m) + dladj) * slope
    return s * dy, dy, (dy * s * x + dladj) * slope


def step_back_vjp(
    dx: Tensor,
    dladj: Tensor,
    x: Tensor,
    m: Tensor,
    a: Tensor,
    scale: int,
    c0: float,
    c1: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dm, da) of `step_back` at its result x, given the cotangents of x and of -sum l."""
    dy = dx * torch.exp(-log_scale(a, scale, c0, c1))
    slope = log_scale_slope(a, scale, c0, c1)
    if scale == GATE:
        return dy, dx - dy, (-dx * (x - m) - dladj) * slope
    return dy, -dy, (-dx * x - dladj) * slope
