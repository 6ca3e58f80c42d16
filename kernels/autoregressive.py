"""The affine autoregressive layer in Triton: a masked network and the step that it parametrises.

Letters and equations are those of `fastflow.reference.autoregressive` and `.scales`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastflow.kernels import masked


def autoregressive_forward(
    x: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, D), ladj (B,), and what backward needs: all pre-activations and the outputs."""
    net = masked.Network(weights, stairs, activation, residual)
    return masked.forward(net, x, terms, biases, (scale, c0, c1), save)


def autoregressive_backward(
    dy: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    terms_grad: int,
    biases_given: int,
    x_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx, and the gradients of terms, weights and biases; shape (0,) where not wanted."""
    net = masked.Network(weights, stairs, activation, residual)
    wanted = terms_grad, biases_given, x_grad, param_grads
    return masked.backward(net, (dy, dladj), x, saved, (scale, c0, c1), *wanted)


def autoregressive_inverse(
    y: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D), ladj (B,) of the inverse, and what backward needs, as the forward op leaves it."""
    net = masked.Network(weights, stairs, activation, residual)
    return masked.inverse(net, y, terms, biases, (scale, c0, c1), save)


def autoregressive_inverse_backward(
    dx: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    terms_grad: int,
    biases_given: int,
    x_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dy, and the gradients of terms, weights and biases; shape (0,) where not wanted."""
    net = masked.Network(weights, stairs, activation, residual)
    wanted = terms_grad, biases_given, x_grad, param_grads
    return masked.inverse_backward(net, (dx, dladj), x, saved, (scale, c0, c1), *wanted)
