"""The inverse of the gradient map of `fastflow.reference.pcp_potential` by damped Newton.

x solves y = grad P(x), which is the only minimum of F(x) = P(x) - y.x: strictly convex with a
Hessian of at least the curvature. With g the gradient of F and p = -H^-1 g the Newton step, every
row goes its own way:

1. While F can tell points apart, |g.p| above the rounding error of F, the longest step t = 1, 1/2,
   1/4 .. is taken that lowers F by ARMIJO t |g.p| (Armijo). There always is one, unless t |g.p|
   falls below the rounding error first. So every such step lowers F by more than its last digit,
   and F is bounded below: this ends, from any start.
2. Where t |g.p| is below the rounding error, F is too coarse. What counts then is the energy
   g.H^-1.g: the first of this t and SMALLER halves is taken that lowers it to (1 - t/2)^2.
3. A row stays put when the energy left is below that of rounding x itself, sum_i H_ii (eps x_i)^2,
   or when no step lowers it any more, which is where g is rounding error. So the residual
   |grad P(x) - y| ends within a small factor of the rounding error of grad P itself.

How many steps there are is for the values to say, so the search is an op of its own,
`fastflow::pcp_solve`: torch.compile and torch.export put it into a graph as one node, vmap gives it
all rows at once, and on the meta device it is a shape. Its derivative is that of `inverse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.reference.pcp_potential import (
    Network,
    Slopes,
    forward,
    gradient,
    hessian,
    potential,
    pre_activations,
    scaled,
)

ARMIJO = 0.2  # times ROUNDINGS it is more than 1: no step is taken on a rounding error
SMALLER = 6
MOST_STEPS = 500  # stage 2 measures by an H that changes: there, only this rules out a circle
ROUNDINGS = 8  # of F, in units of eps times its `magnitude`: sums of some hundred terms


def magnitude(x: Tensor, y: Tensor, net: Network) -> Tensor:
    """The sum of the absolute values of all that F(x) is made of, (B,).

    The softplus has slopes of at most 1, so that a rounding error anywhere arrives at F no larger
    than in proportion to its share of this.
    """
    size = scaled(x, net.scales, 0).abs() @ net.inputs[0].abs().mT + net.offsets[0].abs()
    for k, weight in enumerate(net.weights):
        size = scaled(size + 1, net.gates, k) @ weight.mT + net.offsets[k + 1].abs()
        size = size + scaled(x, net.scales, k + 1).abs() @ net.inputs[k + 1].abs().mT
    linear = (net.shift * x).abs() + (x * y).abs() + 0.5 * net.curvature * x * x
    return (net.slope * (size + 1)).sum(-1) + linear.sum(-1)


def objective(x: Tensor, y: Tensor, net: Network) -> tuple[Tensor, Tensor, Slopes]:
    """F(x) (B,), its gradient (B, D), and what that leaves for the Hessian."""
    layers = pre_activations(x, net)
    image, slopes = gradient(x, net, layers)
    return potential(x, net, layers) - (x * y).sum(-1), image - y, slopes


def positive_factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of (B, D, D), of a diagonal bound on it where rounding made it fail."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    bound = torch.diag_embed(matrix.abs().sum(-1).sqrt())
    return torch.where((info == 0)[:, None, None], factor, bound)


def half_solved(factor: Tensor, g: Tensor) -> Tensor:
    """L^-1 g (B, D), whose square is the energy."""
    return torch.linalg.solve_triangular(factor, g[..., None], upper=False)[..., 0]


def newton_step(x: Tensor, y: Tensor, net: Network) -> tuple[Tensor, Tensor]:
    """Rows x (B, D) after one damped step, and which of them have arrived (B,)."""
    eps = torch.finfo(x.dtype).eps
    value, g, slopes = objective(x, y, net)
    matrix, _ = hessian(slopes, net)
    factor = positive_factor(matrix)
    half = half_solved(factor, g)
    step = torch.linalg.solve_triangular(factor.mT, -half[..., None], upper=True)[..., 0]
    energy = half.square().sum(-1)
    error = ROUNDINGS * eps * magnitude(x, y, net)
    shortest = 2.0**-SMALLER * (error / energy).clamp(max=1)
    length, left = torch.zeros_like(energy), energy.clone()
    lost = ~energy.isfinite()  # no step is to be measured
    rows, t = (~lost).nonzero()[:, 0], 1.0
    # a shortest step may have been rounded to 0
    while len(rows) and t >= torch.finfo(x.dtype).tiny:
        some = net.map_rows(lambda term, rows=rows: term[rows])
        value_t, g_t, _ = objective(x[rows] + t * step[rows], y[rows], some)
        energy_t = half_solved(factor[rows], g_t).square().sum(-1)
        lower = value_t <= value[rows] - ARMIJO * t * energy[rows]
        nearer = energy_t <= (1 - t / 2) ** 2 * energy[rows]
        taken = torch.where(t * energy[rows] > error[rows], lower, nearer)
        length[rows[taken]], left[rows[taken]] = t, energy_t[taken]
        t /= 2
        rows = rows[~taken & (t >= shortest[rows])]
    x = torch.where(length[:, None] > 0, x + length[:, None] * step, x)
    x = torch.where(lost[:, None], torch.nan, x)
    negligible = (matrix.diagonal(dim1=-2, dim2=-1) * (eps * x).square()).sum(-1)
    return x, (length == 0) | (left <= negligible)


@torch.library.custom_op(
    "fastflow::pcp_solve", mutates_args=(), schema="(Tensor y, Tensor[] net, int layers) -> Tensor"
)
def pcp_solve(y: Tensor, net: Sequence[Tensor], layers: int) -> Tensor:
    """`solve` as an op; `net` is `Network.tensors` of a network of so many layers."""
    network = Network.of(net, layers)
    x = torch.zeros_like(y)
    finite = gradient(x, network)[0].sub(y).isfinite().all(-1)
    x = torch.where(finite[:, None], x, torch.nan)
    rows = finite.nonzero()[:, 0]
    for _ in range(MOST_STEPS):
        if not len(rows):
            break
        some = network.map_rows(lambda term, rows=rows: term[rows])
        x[rows], arrived = newton_step(x[rows], y[rows], some)
        rows = rows[~arrived]
    return x


@pcp_solve.register_fake
def _(y: Tensor, net: Sequence[Tensor], layers: int) -> Tensor:
    return torch.empty_like(y)


@pcp_solve.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, list[int | None], None],
    y: Tensor,
    net: Sequence[Tensor],
    layers: int,
) -> tuple[Tensor, int]:
    """All rows of the batch go through together, of an ensemble those of every network."""
    size, (dim, dims, _) = info.batch_size, in_dims
    y = _in_front(y, dim, size)
    net = [one if d is None else one.movedim(d, 0) for one, d in zip(net, dims)]
    given = [d is not None for d in dims]
    shared = 2 * layers - 1  # the matrices
    if any(given[:shared]):
        members = [
            pcp_solve(y[i], [one[i] if own else one for one, own in zip(net, given)], layers)
            for i in range(size)
        ]
        return torch.stack(members), 0
    for position in range(shared, len(net)):
        own = given[position]
        if own or net[position].dim() > 1:
            term = net[position] if own else _in_front(net[position], None, size)
            term = term if term.dim() > 2 else term[:, None].expand(-1, y.shape[1], -1)
            net[position] = term.flatten(0, 1)
    return pcp_solve(y.flatten(0, 1), net, layers).unflatten(0, y.shape[:2]), 0


def _in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor of vmap with its batch as the first dimension."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def solve(y: Tensor, net: Network) -> Tensor:
    """x (B, D) with grad P(x) = y, without a graph; NaN in rows where an input is not finite."""
    return pcp_solve(y.detach(), [one.detach() for one in net.tensors], len(net.inputs))


def inverse(y: Tensor, net: Network) -> tuple[Tensor, Tensor]:
    """(x (B, D), ladj (B,)) with y = grad P(x); differentiable.

    A Newton step at the root leaves its value alone and doubles the order of the derivatives that
    are right: two of them serve up to the third.
    """
    x = solve(y, net)
    for _ in range(2):
        image, slopes = gradient(x, net)
        matrix, _ = hessian(slopes, net)
        x = x - torch.linalg.solve(matrix, image - y)
    return x, -forward(x, net)[1]
