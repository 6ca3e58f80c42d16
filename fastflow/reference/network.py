r"""A masked network in plain PyTorch, the backward pass by hand: what MADE and its flows share.

Letters: B batch, D features, L hidden layers. Level 0 is x, level l = 1 .. L a hidden layer, level
L+1 the outputs; n_l units each. Layer l has weights (n_l, n_{l-1}), of which the mask leaves a
staircase (see `fastflow.masks`), an optional bias (n_l,) and an optional term (B, n_l), which is
what a context adds:

    P_l = W_l A_{l-1} + b_l + T_l,   A_0 = x,   A_l = act(P_l)

A residual network adds P_{l-2} to P_l for odd l >= 3, blocks h + W' act(W act(h) + b) + b', and
its last hidden level feeds the outputs as it is, A_L = P_L. L is odd then.

Masks that are no staircase are given as a list of bool tensors in its place.

A missing bias or term is a tensor of shape (0,). Masked-out weights may hold anything: they are
selected away, not multiplied by zero. All functions of the forward direction are differentiable
and free of data-dependent control flow, so they also answer function transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastflow.reference.layout import layout

LEAK = 0.01  # slope of leaky_relu


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own threshold, 20, costs float64 half of its digits."""
    return nnf.softplus(x, threshold=40.0)  # beyond it x is what a float64 rounds to


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * torch.sigmoid(-x)


class Activation(NamedTuple):
    """A function and its derivative, both of the pre-activation."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


ACTIVATIONS = {  # kernels know them by their position
    "relu": Activation(torch.relu, lambda x: (x > 0).to(x.dtype)),
    "tanh": Activation(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "elu": Activation(nnf.elu, lambda x: torch.where(x > 0, 1, torch.exp(x.clamp(max=0)))),
    "silu": Activation(nnf.silu, _silu_slope),
    "gelu": Activation(nnf.gelu, _gelu_slope),
    "softplus": Activation(softplus, torch.sigmoid),
    "leaky_relu": Activation(
        lambda x: nnf.leaky_relu(x, LEAK), lambda x: torch.where(x > 0, torch.ones_like(x), LEAK)
    ),
}
BY_NUMBER = list(ACTIVATIONS.values())


def widths(x: Tensor, weights: Sequence[Tensor]) -> list[int]:
    """The number of units of every level, n_0 = D .. n_{L+1}."""
    return [x.shape[-1], *(weight.shape[0] for weight in weights)]


def skips(level: int, hidden: int, residual: bool) -> bool:
    """Whether a level's pre-activations contain those of two levels below."""
    return residual and level % 2 == 1 and 3 <= level <= hidden


def activates(level: int, hidden: int, residual: bool) -> bool:
    """Whether a hidden level passes through the activation on its way up."""
    return not (residual and level == hidden)


def known_units(prefixes: Sequence[Tensor], features: int, residual: bool) -> list[Tensor]:
    """By hidden level, how many of its sorted units see none but the first r features, r = 0 .. D.

    What a residual block adds counts: its last level knows no more than its first one does, though
    the level between them may have no unit that sees the next feature.

    Arguments:
        prefixes: of all layers, as `fastflow.masks.parts` gives them.
        features: D.

    Returns:
        int64 (D + 1,) for the inputs and every hidden level.
    """
    hidden = len(prefixes) - 1
    found = [torch.arange(features + 1, device=prefixes[0].device)]
    for level, prefix in enumerate(prefixes[:-1], 1):
        below = found[-1].to(prefix.dtype)
        count = torch.searchsorted(prefix.contiguous(), below, right=True)
        if skips(level, hidden, residual):
            count = torch.minimum(count, found[level - 2])
        found.append(count)
    return found


def sees_ahead(prefixes: Sequence[Tensor], features: int, residual: bool) -> list[int]:
    """The positions in the order, 0 .. D-1, whose outputs see their own feature or a later one.

    Arguments:
        prefixes: of all layers, as `fastflow.masks.parts` gives them.
        features: D.
    """
    known = known_units(prefixes, features, residual)[-1]
    behind = prefixes[-1].view(features, -1).amax(-1) > known[:-1]
    return behind.nonzero().flatten().tolist()


def odd_level(
    orders: Sequence[Tensor], prefixes: Sequence[Tensor], features: int | None = None
) -> int | None:
    """The first level whose units are not those of the block before it, to which they are added.

    Kernels add sorted units to sorted units, so that both levels must have one order; sweeps also
    compute them in the same stages.

    Arguments:
        orders, prefixes: of a residual network, as `fastflow.masks.parts` gives them.
        features: D, where the network is swept over; else None.

    Returns:
        The level, or None if all agree.
    """
    known = [] if features is None else known_units(prefixes, features, residual=True)
    for level in range(3, len(prefixes), 2):
        for of_levels in filter(None, (orders, known)):
            if not torch.equal(of_levels[level], of_levels[level - 2]):
                return level
    return None


def reach(seen: Sequence[Tensor], residual: bool) -> Tensor:
    """Which features the outputs see through masks (n_l, n_{l-1}): bool (n_{L+1}, D)."""
    found = [torch.eye(seen[0].shape[1], device=seen[0].device)]
    for level, mask in enumerate(seen, 1):
        paths = mask.to(found[0].dtype) @ found[-1]
        if skips(level, len(seen) - 1, residual):
            paths = paths + found[level - 2]
        found.append(paths.clamp(max=1))
    return found[-1].bool()


def exactly(device: str) -> AbstractContextManager:
    """Products as kernels make them, not rounded under autocast."""
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def forward(
    x: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor | Sequence[Tensor],
    activation: int,
    residual: bool,
) -> list[Tensor]:
    """The pre-activations P_1 .. P_L and the outputs, (B, n_l) each."""
    hidden, act = len(weights) - 1, BY_NUMBER[activation].value
    found: list[Tensor] = []
    below = x
    for level, mask in enumerate(layout(stairs, widths(x, weights)).masks, 1):
        weight, bias = weights[level - 1], biases[level - 1]
        bias = None if bias.shape == (0,) else bias
        with exactly(x.device.type):
            p = nnf.linear(below, torch.where(mask, weight, 0), bias)
        if terms and terms[level - 1].shape != (0,):
            p = p + terms[level - 1]
        if skips(level, hidden, residual):
            p = p + found[level - 3]
        found.append(p)
        below = act(p) if activates(level, hidden, residual) else p
    return found


def backward(
    d_outputs: Tensor,
    x: Tensor,
    pre_activations: Sequence[Tensor],
    weights: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The cotangents of x and of every pre-activation, given that of the outputs.

    Arguments:
        d_outputs: (B, n_{L+1}).
        pre_activations: P_1 .. P_L, (B, n_l).

    Returns:
        dx (B, D), and [dP_1 .. dP_L, d_outputs].
    """
    hidden, act = len(weights) - 1, BY_NUMBER[activation]
    found = [*pre_activations, d_outputs]
    d_above = d_outputs
    layers = list(zip(weights, layout(stairs, widths(x, weights)).masks))
    for level in range(hidden, 0, -1):
        weight, mask = layers[level]
        dp = d_above @ torch.where(mask, weight, 0)
        p = pre_activations[level - 1]
        if activates(level, hidden, residual):
            dp = dp * act.slope(p)
        if skips(level + 2, hidden, residual):
            dp = dp + found[level + 1]
        found[level - 1] = d_above = dp
    weight, mask = layers[0]
    return d_above @ torch.where(mask, weight, 0), found


def parameter_grads(
    cotangents: Sequence[Tensor],
    x: Tensor,
    pre_activations: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    biases_given: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of weights and biases from the cotangents of all pre-activations.

    Arguments:
        cotangents: dP_1 .. dP_{L+1}, (B, n_l).
        biases_given: bit l-1 is set where layer l has a bias.

    Returns:
        [dW_1 ..] (n_l, n_{l-1}), exactly zero where masked, and [db_1 ..] (n_l,) or (0,).
    """
    hidden, act = len(cotangents) - 1, BY_NUMBER[activation].value
    levels = [x.shape[-1], *(cotangent.shape[-1] for cotangent in cotangents)]
    d_weights, d_biases = [], []
    below = x
    for level, (dp, mask) in enumerate(zip(cotangents, layout(stairs, levels).masks), 1):
        d_weights.append(torch.where(mask, dp.mT @ below, 0))
        d_biases.append(dp.sum(0) if biases_given >> (level - 1) & 1 else dp.new_empty(0))
        if level <= hidden:
            p = pre_activations[level - 1]
            below = act(p) if activates(level, hidden, residual) else p
    return d_weights, d_biases


def chosen(cotangents: Sequence[Tensor], layers: int) -> list[Tensor]:
    """The cotangents whose bit is set in `layers`, and (0,) in place of the others."""
    return [
        dp if layers >> position & 1 else dp.new_empty(0) for position, dp in enumerate(cotangents)
    ]
