r"""The gradient of a partially input convex potential and its Hessian, both directions by hand.

Letters: B batch, D features, K hidden layers of H_k units. x (B, D). With s = softplus, the
potential is convex in x:

    P_1 = U_1 (b_1 x) + t_1,   P_k = W_k (a_k s(P_{k-1})) + U_k (b_k x) + t_k,   W_k, a_k >= 0
    P(x) = r.s(P_K) + shift.x + 1/2 curvature.x^2,   r >= 0, curvature > 0

What depends on a context, a_k (the gates), b_k (the scales), t_k (the offsets), r (the slope),
shift and curvature, is (n,), the same for all rows, or (B, n). With sg = s' (the logistic function)
and l_K = r, going backwards through the layers,

    d_k = l_k sg(P_k),   l_{k-1} = a_k (W_k^T d_k)
    y = shift + curvature x + sum_k b_k (U_k^T d_k)

is the gradient. T_k = dP_k/dx, going forwards, (B, D, H_k), gives its Jacobian, the Hessian:

    T_1 = b_1 U_1^T,   T_k = (T_{k-1} c_k) W_k^T + b_k U_k^T,   c_k = a_k sg(P_{k-1})
    H = diag(curvature) + sum_k T_k diag(h_k) T_k^T,   h_k = d_k sg(-P_k) >= 0

Every term is symmetric and positive. T_1 is never written out: U_1^T diag(h) U_1 is linear in h,
and (U_1^T c) W_2^T in c, so that both are products with a matrix that all rows share.

`forward` is differentiable and free of data-dependent control flow, so it also answers double
backward, forward-mode AD, vmap and torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.reference.network import softplus

Tensors = list[Tensor]


class Network(NamedTuple):
    """The potential at a context. No gates and scales: all are 1."""

    inputs: Tensors  # U_1 .. U_K, (H_k, D)
    weights: Tensors  # W_2 .. W_K, (H_k, H_{k-1})
    offsets: Tensors  # t_1 .. t_K, (H_k,) or (B, H_k)
    slope: Tensor  # r, (H_K,) or (B, H_K)
    shift: Tensor  # (D,) or (B, D)
    curvature: Tensor  # (D,) or (B, D)
    gates: Tensors  # a_2 .. a_K, (H_{k-1},) or (B, H_{k-1})
    scales: Tensors  # b_1 .. b_K, (D,) or (B, D)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> Network:
        """The network whose `tensors` these are."""
        K, left = layers, iter(tensors)
        lists = [[next(left) for _ in range(n)] for n in (K, K - 1, K)]
        rest = [next(left) for _ in range(3)]
        conditional = list(left)
        gates, scales = conditional[: K - 1], conditional[K - 1 :]
        return cls(*lists, *rest, gates, scales)  # pyright: ignore[reportCallIssue]

    @property
    def tensors(self) -> Tensors:
        """All of them, laid out flat."""
        lists = (self.inputs, self.weights, self.offsets)
        few = (self.slope, self.shift, self.curvature)
        return [*(one for some in lists for one in some), *few, *self.gates, *self.scales]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Network:
        """The network with a change made to what has a row for every row of x."""
        shared = len(self.inputs) + len(self.weights)
        tensors = self.tensors
        terms = (one if one.dim() == 1 else change(one) for one in tensors[shared:])
        return Network.of([*tensors[:shared], *terms], len(self.inputs))


class Slopes(NamedTuple):
    """What the gradient at x leaves for the Hessian and for backward, (B, n) each."""

    below: Tensors  # s(P_1) .. s(P_{K-1})
    steepness: Tensors  # sg(P_1) .. sg(P_K)
    arriving: Tensors  # l_1 .. l_K
    leaving: Tensors  # d_1 .. d_K
    pulled: Tensors  # W_2^T d_2 .. W_K^T d_K
    pushed: Tensors  # U_1^T d_1 .. U_K^T d_K


class Bends(NamedTuple):
    """What the Hessian at x leaves for backward."""

    bends: Tensors  # h_1 .. h_K, (B, H_k)
    rates: Tensors  # c_2 .. c_K, (B, H_{k-1})
    ways: Tensors  # (U_1^T c_2) W_2^T, (B, D, H_2), if K > 1
    spreads: Tensors  # T_2 .. T_K, (B, D, H_k)
    first: Tensor  # U_1^T diag(h_1) U_1, (B, D, D)


def scaled(tensor: Tensor, factors: Tensors, number: int) -> Tensor:
    """The tensor times one of the gates or scales, if there are any."""
    return tensor * factors[number] if factors else tensor


def pre_activations(x: Tensor, net: Network) -> tuple[Tensors, Tensors]:
    """P_1 .. P_K and s(P_1) .. s(P_{K-1})."""
    found, below = [scaled(x, net.scales, 0) @ net.inputs[0].mT + net.offsets[0]], []
    for k, weight in enumerate(net.weights):
        below.append(softplus(found[-1]))
        p = scaled(below[-1], net.gates, k) @ weight.mT + net.offsets[k + 1]
        found.append(p + scaled(x, net.scales, k + 1) @ net.inputs[k + 1].mT)
    return found, below


def potential(x: Tensor, net: Network, layers: tuple[Tensors, Tensors] | None = None) -> Tensor:
    """P(x), (B,); `layers`: the `pre_activations`, if they are known."""
    found, _ = layers or pre_activations(x, net)
    top = softplus(found[-1])
    return (net.slope * top).sum(-1) + (x * (net.shift + 0.5 * net.curvature * x)).sum(-1)


def gradient(
    x: Tensor, net: Network, layers: tuple[Tensors, Tensors] | None = None
) -> tuple[Tensor, Slopes]:
    """y (B, D), the gradient of the potential, and how it came about; `layers`: see `potential`."""
    found, below = layers or pre_activations(x, net)
    steepness = [torch.sigmoid(p) for p in found]
    y, down = net.shift + net.curvature * x, net.slope
    arriving, leaving, pulled, pushed = [], [], [], []
    for k in range(len(found) - 1, -1, -1):
        arriving.append(down)
        leaving.append(down * steepness[k])
        pushed.append(leaving[-1] @ net.inputs[k])
        y = y + scaled(pushed[-1], net.scales, k)
        if k:
            pulled.append(leaving[-1] @ net.weights[k - 1])
            down = scaled(pulled[-1], net.gates, k - 1)
    lists = (some[::-1] for some in (arriving, leaving, pulled, pushed))
    return y, Slopes(below, steepness, *lists)


def pairs(matrix: Tensor) -> Tensor:
    """(H, D D) of (H, D): the products of every two entries of a row."""
    return (matrix[:, :, None] * matrix[:, None, :]).flatten(1)


def fan(first: Tensor, second: Tensor) -> Tensor:
    """(H_1, D H_2) of U_1 (H_1, D) and W_2 (H_2, H_1): the ways from x through a unit to P_2."""
    return (first[:, :, None] * second.mT[:, None, :]).flatten(1)


def framed(matrix: Tensor, net: Network) -> Tensor:
    """diag(b_1) M diag(b_1) of M (B, D, D)."""
    if not net.scales:
        return matrix
    return matrix * (net.scales[0][..., :, None] * net.scales[0][..., None, :])


def hessian(slopes: Slopes, net: Network) -> tuple[Tensor, Bends]:
    """H (B, D, D), given what `gradient` found at x, and how it came about."""
    features, scales = net.inputs[0].shape[1], [scale[..., None] for scale in net.scales]
    bends = [down * (1 - steep) for down, steep in zip(slopes.leaving, slopes.steepness)]
    rates = [scaled(slopes.steepness[k], net.gates, k) for k in range(len(net.weights))]
    first = (bends[0] @ pairs(net.inputs[0])).unflatten(-1, (features, features))
    matrix = framed(first, net) + torch.diag_embed(net.curvature)
    ways: Tensors = []
    spreads: Tensors = []
    for k, weight in enumerate(net.weights):
        straight = scaled(net.inputs[k + 1].mT, scales, k + 1)
        if k:
            spread = straight + (spreads[-1] * rates[k][:, None, :]) @ weight.mT
        else:
            ways.append((rates[0] @ fan(net.inputs[0], weight)).unflatten(-1, (features, -1)))
            spread = torch.addcmul(straight, ways[0], scales[0]) if scales else straight + ways[0]
        matrix = torch.baddbmm(matrix, spread * bends[k + 1][:, None, :], spread.mT)
        spreads.append(spread)
    return matrix, Bends(bends, rates, ways, spreads, first)


def log_determinant(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """log det (B,) of positive definite matrices (B, D, D), and their Cholesky factors.

    NaN for a matrix that is not positive definite to the precision of its type, or not finite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    ladj = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(info == 0, ladj, torch.nan), factor


def forward(x: Tensor, net: Network) -> tuple[Tensor, Tensor]:
    """(y (B, D), ladj (B,))."""
    y, slopes = gradient(x, net)
    return y, log_determinant(hessian(slopes, net)[0])[0]
