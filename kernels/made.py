"""MADE in Triton: the outputs of a masked network. Letters as in `fastflow.reference.network`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastflow.kernels import masked


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
    """The outputs (B, n_{L+1}), and what backward needs: all pre-activations."""
    net = masked.Network(weights, stairs, activation, residual)
    y, _ladj, saved = masked.forward(net, x, terms, biases, masked.NO_STEP, save)
    return y, saved


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
    net = masked.Network(weights, stairs, activation, residual)
    wanted = terms_grad, biases_given, x_grad, param_grads
    return masked.backward(net, (dy,), x, saved, masked.NO_STEP, *wanted)
