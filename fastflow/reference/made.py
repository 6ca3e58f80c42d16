"""MADE in plain PyTorch: the outputs of a masked network. See `fastflow.reference.network`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.reference import network

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def made_forward(
    x: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs (B, n_{L+1}), and what backward needs: all pre-activations side by side."""
    *hidden, y = network.forward(x, terms, weights, biases, stairs, activation, residual)
    return y, torch.cat(hidden, -1).flatten() if save and hidden else x.new_empty(0)


def made_backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    terms_grad: int,
    biases_given: int,
    x_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx, and the gradients of terms, weights and biases; shape (0,) where not wanted."""
    hidden = split(saved, x, weights[:-1])
    dx, cotangents = network.backward(dy, x, hidden, weights, stairs, activation, residual)
    lists = gradients(
        cotangents, x, hidden, stairs, activation, residual, terms_grad, biases_given, param_grads
    )
    return dx if x_grad else x.new_empty(0), *lists


def split(saved: Tensor, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The (B, n_l) parts of what a forward pass saved, one for each of these layers."""
    sizes = [weight.shape[0] for weight in weights]
    return list(saved.view(len(x), sum(sizes)).split(sizes, -1))


def gradients(
    cotangents: Sequence[Tensor],
    x: Tensor,
    hidden: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    terms_grad: int,
    biases_given: int,
    param_grads: bool,
) -> Lists:
    """The gradients of terms, weights and biases from the cotangents of all pre-activations."""
    d_terms = network.chosen(cotangents, terms_grad)
    if param_grads:
        return d_terms, *network.parameter_grads(
            cotangents, x, hidden, stairs, activation, residual, biases_given
        )
    none = [x.new_empty(0) for _ in cotangents]
    return d_terms, none, none
