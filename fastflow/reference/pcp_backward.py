"""The derivatives of `fastflow.reference.pcp_potential.forward` by hand, in its letters.

The cotangent of H is that of ladj times the inverse of H, symmetric as H is. Cotangents are called
d_ and the name of what they belong to; those of a network are a `Network` too, in which a term has
one for every row. What is written in place was made here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.reference.pcp_potential import (
    Bends,
    Network,
    Slopes,
    Tensors,
    fan,
    framed,
    pairs,
    scaled,
)


def blank(net: Network) -> Network:
    """Cotangents of a network to fill in; None where nothing comes."""
    blanks: Any = [None] * len(net.tensors)
    return Network.of(blanks, len(net.inputs))


def totals(net: Network, *parts: Network) -> Tensors:
    """The gradients of a network's tensors: what all rows and parts give to each."""
    sums = []
    for tensor, *few in zip(net.tensors, *(part.tensors for part in parts)):
        there = (one for one in few if one is not None)
        sums.append(sum(one if one.dim() == tensor.dim() else one.sum(0) for one in there))
    return sums


def through_gradient(
    dy: Tensor,
    x: Tensor,
    net: Network,
    slopes: Slopes,
    d_bends: Tensors,
    d_rates: Tensors,
) -> tuple[Tensor, Network]:
    """The cotangents of x (B, D) and of the network, those of the terms (B, n) for every row.

    Arguments:
        dy: the cotangent of y, (B, D).
        x, net, slopes: of `gradient`.
        d_bends, d_rates: the cotangents of h_1 .. h_K and c_2 .. c_K; empty for none.
    """
    K = len(net.inputs)
    grads = blank(net)._replace(shift=dy, curvature=dy * x)
    d_steepness, d_arriving = [], dy
    for k in range(K):  # l_k = a_{k+1} (W_{k+1}^T d_{k+1}) goes down, so its cotangent goes up
        steep, leaving = slopes.steepness[k], slopes.leaving[k]
        d_pushed = scaled(dy, net.scales, k)
        grads.inputs[k] = leaving.mT @ d_pushed
        d_leaving = d_pushed @ net.inputs[k].mT
        if net.scales:
            grads.scales[k] = dy * slopes.pushed[k]
        if k:
            d_pulled = scaled(d_arriving, net.gates, k - 1)
            grads.weights[k - 1] = leaving.mT @ d_pulled
            d_leaving = torch.addmm(d_leaving, d_pulled, net.weights[k - 1].mT)
            if net.gates:
                grads.gates[k - 1] = d_arriving * slopes.pulled[k - 1]
        if d_bends:
            d_leaving = d_leaving + d_bends[k] * (1 - steep)
        d_steep = d_leaving * slopes.arriving[k]
        if d_bends:
            d_steep = d_steep - d_bends[k] * leaving
        if d_rates and k < K - 1:
            d_steep = d_steep + scaled(d_rates[k], net.gates, k)
        d_steepness.append(d_steep)
        d_arriving = d_leaving * steep
    grads = grads._replace(slope=d_arriving)

    dx, d_below = net.curvature * dy, None
    for k in range(K - 1, -1, -1):
        steep = slopes.steepness[k]
        dp = d_steepness[k] * (1 - steep)
        dp = (dp if d_below is None else dp + d_below) * steep
        grads.offsets[k] = dp
        grads.inputs[k] = torch.addmm(grads.inputs[k], dp.mT, scaled(x, net.scales, k))
        through = dp @ net.inputs[k]
        dx = dx + scaled(through, net.scales, k)
        if net.scales:
            grads.scales[k] = grads.scales[k] + through * x
        if k:
            below = slopes.below[k - 1]
            gated = scaled(below, net.gates, k - 1)
            grads.weights[k - 1] = torch.addmm(grads.weights[k - 1], dp.mT, gated)
            through = dp @ net.weights[k - 1]
            d_below = scaled(through, net.gates, k - 1)
            if net.gates:
                grads.gates[k - 1] = grads.gates[k - 1] + through * below
                if d_rates:
                    grads.gates[k - 1] += d_rates[k - 1] * slopes.steepness[k - 1]
    return dx, grads


def through_hessian(
    d_matrix: Tensor, net: Network, found: Bends
) -> tuple[Tensors, Tensors, Network]:
    """The cotangents of h_1 .. h_K, of c_2 .. c_K and of the network.

    Arguments:
        d_matrix: the cotangent of H, (B, D, D), symmetric.
        net, found: of `hessian`.
    """
    K, first = len(net.inputs), net.inputs[0]
    grads = blank(net)._replace(curvature=d_matrix.diagonal(dim1=-2, dim2=-1))
    d_bends: Tensors = [d_matrix] * K
    d_rates: Tensors = [d_matrix] * (K - 1)

    d_first = framed(d_matrix, net).flatten(1)
    d_bends[0] = d_first @ pairs(first).mT
    d_pairs = (found.bends[0].mT @ d_first).unflatten(-1, d_matrix.shape[1:])  # (H_1, D, D)
    grads.inputs[0] = 2 * (d_pairs @ first[..., None])[..., 0]
    if net.scales:
        grads.scales[0] = 2 * (d_matrix * found.first * net.scales[0][..., None, :]).sum(-1)

    d_spread = None
    for k in range(K - 1, 0, -1):
        spread, weight, rates = found.spreads[k - 1], net.weights[k - 1], found.rates[k - 1]
        turned = d_matrix @ spread
        d_bends[k] = (spread * turned).sum(1)
        turned.mul_(2 * found.bends[k][:, None, :])
        d_spread = turned if d_spread is None else turned.add_(d_spread)
        if net.scales:
            by_feature = d_spread.transpose(0, 1)  # (D, B, H_k)
            rows = net.scales[k].expand(len(d_spread), -1).mT[:, None, :]  # (D, 1, B)
            grads.inputs[k] = (rows @ by_feature)[:, 0].mT
            grads.scales[k] = (by_feature @ net.inputs[k].mT[..., None])[..., 0].mT
        else:
            grads.inputs[k] = d_spread.sum(0).mT
        if k > 1:
            before = found.spreads[k - 2]
            arriving = (before * rates[:, None, :]).flatten(0, 1)
            grads.weights[k - 1] = d_spread.flatten(0, 1).mT @ arriving
            d_spread = d_spread @ weight
            d_rates[k - 1] = (d_spread * before).sum(1)
            d_spread.mul_(rates[:, None, :])
            continue
        if net.scales:
            grads.scales[0] += (d_spread * found.ways[0]).sum(-1)
            d_spread.mul_(net.scales[0][..., None])
        d_ways = d_spread.flatten(1)
        d_rates[0] = d_ways @ fan(first, weight).mT
        d_fan = (rates.mT @ d_ways).unflatten(-1, (-1, len(weight)))  # (H_1, D, H_2)
        grads.weights[0] = (d_fan * first[..., None]).sum(1).mT
        grads.inputs[0] += (d_fan * weight.mT[:, None, :]).sum(-1)
    return d_bends, d_rates, grads


def backward(
    dy: Tensor,
    dladj: Tensor,
    x: Tensor,
    net: Network,
    factor: Tensor,
    slopes: Slopes,
    bends: Bends,
) -> tuple[Tensor, Tensors]:
    """The cotangents of x and of the network's tensors, given those of `forward`'s outputs.

    Arguments:
        factor: the Cholesky factor of H, (B, D, D).
        slopes, bends: of `gradient` and `hessian`.
    """
    d_matrix = torch.cholesky_inverse(factor) * dladj[:, None, None]
    d_bends, d_rates, of_hessian = through_hessian(d_matrix, net, bends)
    dx, of_gradient = through_gradient(dy, x, net, slopes, d_bends, d_rates)
    return dx, totals(net, of_hessian, of_gradient)


def inverse_backward(
    dx: Tensor,
    dladj: Tensor,
    x: Tensor,
    net: Network,
    factor: Tensor,
    slopes: Slopes,
    bends: Bends,
) -> tuple[Tensor, Tensors]:
    """The cotangents of y and of the network's tensors, by the implicit function theorem.

    At the solution x of y = grad P(x), a change dP of the potential moves x by H^-1 (dy - grad dP).
    The inverse's ladj is minus the forward's at x.

    Arguments:
        dx, dladj: the cotangents of x and of the inverse's ladj.
        factor, slopes, bends: as in `backward`, at x.
    """
    d_matrix = torch.cholesky_inverse(factor) * -dladj[:, None, None]
    d_bends, d_rates, of_hessian = through_hessian(d_matrix, net, bends)
    still = torch.zeros_like(x)
    through_ladj, of_slopes = through_gradient(still, x, net, slopes, d_bends, d_rates)
    dy = torch.cholesky_solve((dx + through_ladj)[..., None], factor)[..., 0]
    _, of_point = through_gradient(-dy, x, net, slopes, [], [])
    return dy, totals(net, of_hessian, of_slopes, of_point)
