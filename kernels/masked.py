# type: ignore  # what Triton makes of a function has other types than its annotations
"""Launches the passes of a masked network in Triton: all layers at once if small, else one by one.

What both ops on such networks share. `saved` holds P_1 .. P_L, and the outputs if an affine step
follows, one (B, n_l) block after the other. `step` is (scale, c0, c1) of that step, or `NO_STEP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import triton
from torch import Tensor

from fastflow.kernels import (
    activations,
    affine,
    masked_layers,
    masked_network,
    masked_sweep,
    masked_weights,
)
from fastflow.kernels.launch import device_of, dot_precision
from fastflow.reference.network import activates, skips

NO_STEP = (affine.NONE.value, 0.0, 0.0)


class Network(NamedTuple):
    """What does not change between the passes of a network."""

    weights: Sequence[Tensor]  # (n_l, n_{l-1})
    stairs: Tensor
    activation: int
    residual: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """n_0 .. n_{L+1}."""
        return self.weights[0].shape[1], *(weight.shape[0] for weight in self.weights)

    @property
    def hidden(self) -> int:
        """L."""
        return len(self.weights) - 1

    @property
    def hidden_units(self) -> int:
        """n_1 + .. + n_L."""
        return sum(self.widths[1:-1])

    def order_at(self, level: int) -> int:
        """Where the order of a level starts in stairs."""
        return self.widths[0] + 2 * sum(self.widths[1:level]) if level else 0

    def activation_of(self, level: int) -> int:
        """The number of a hidden level's activation."""
        active = activates(level, self.hidden, self.residual)
        return self.activation if active else activations.NONE.value

    def blocks(self, flat: Tensor, rows: int) -> list[Tensor]:
        """The (B, n_l) blocks of the hidden levels; the outputs' too if they are there."""
        sizes = [rows * width for width in self.widths[1:]]
        if flat.numel() < sum(sizes):
            del sizes[-1]
        return [block.view(rows, -1) for block in flat.split(sizes)] if sizes else []


def forward(
    net: Network,
    x: Tensor,
    terms: Sequence[Tensor],
    biases: Sequence[Tensor],
    step: tuple[int, float, float],
    save: bool,
) -> tuple[Tensor, Any, Tensor]:
    """(y, ladj, saved); without an affine step y is the network's outputs, ladj None."""
    B, widths = len(x), net.widths
    size = B * net.hidden_units
    has_step = step != NO_STEP
    if save:
        saved = x.new_empty(size + (B * widths[-1] if has_step else 0))
    else:
        saved = x.new_empty(size if net.residual else 0)  # residual blocks add what is there
    p = saved if save or net.residual else None
    outputs = saved[size:].view(B, -1) if save and has_step else x.new_empty(B, widths[-1])
    y, ladj = (x.new_empty(x.shape), x.new_empty(B)) if has_step else (outputs, None)
    terms = [_or_none(term) for term in terms] or [None] * len(net.weights)
    biases = [_or_none(bias) for bias in biases]
    with device_of(x):
        if masked_network.is_small(widths):
            options = masked_network.network_options(widths)
            masked_network.network_forward_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
                *(x, tuple(terms), tuple(net.weights), tuple(biases), net.stairs),
                *(p, x.new_empty(size), outputs, y if has_step else None, ladj, B, widths),
                *(net.hidden_units, net.activation, net.residual, *step, dot_precision(x.dtype)),
                **options,
            )
        else:
            _layers_forward(net, x, terms, biases, p, outputs)
            if has_step:
                options = affine.affine_options(widths[0], x.dtype)
                affine.affine_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
                    *(x, outputs, y, ladj, net.stairs, net.order_at(net.hidden + 1)),
                    *(B, widths[0], *step),
                    **options,
                )
    return y, ladj, saved if save else x.new_empty(0)


def _layers_forward(
    net: Network,
    x: Tensor,
    terms: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    p: Tensor | None,
    outputs: Tensor,
) -> None:
    B, hidden = len(x), net.hidden
    kept = [None] * hidden if p is None else net.blocks(p, B)[:hidden]
    below = x
    for level, (K, N) in enumerate(pairwise(net.widths), 1):
        options = masked_layers.layer_options(N, K, x.dtype)
        grid = triton.cdiv(B, options["BLOCK_B"]), triton.cdiv(N, options["BLOCK_N"])
        last = level > hidden
        active = not last and activates(level, hidden, net.residual)
        a = x.new_empty(B, N) if active else None
        masked_layers.layer_product_kernel[grid](
            *(below, net.weights[level - 1], biases[level - 1], terms[level - 1]),
            kept[level - 3] if skips(level, hidden, net.residual) else None,
            *(outputs if last else kept[level - 1], a, net.stairs),
            *(net.order_at(level - 1), net.order_at(level), B, N, K),
            *(net.activation, dot_precision(x.dtype)),
            **options,
        )
        below = a if active else None if last else kept[level - 1]


def backward(
    net: Network,
    cotangents: tuple[Tensor, ...],
    x: Tensor,
    saved: Tensor,
    step: tuple[int, float, float],
    terms_grad: int,
    biases_given: int,
    x_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx and the gradients of terms, weights and biases; shape (0,) where not wanted.

    cotangents are (dy, dladj), or (dy,) without an affine step.
    """
    B, widths, none = len(x), net.widths, x.new_empty(0)
    size = B * net.hidden_units
    has_step = step != NO_STEP
    dx = x.new_empty(x.shape) if x_grad else None
    past = x.new_empty(x.shape) if x_grad and has_step else None  # what the step gives to dx
    d = x.new_empty(size)
    a = x.new_empty(size) if param_grads else None
    d_outputs = x.new_empty(B, widths[-1]) if has_step else cotangents[0]
    outputs = saved[size:] if has_step else None
    dy, dladj = cotangents if has_step else (None, None)
    with device_of(x):
        if masked_network.is_small(widths):
            options = masked_network.network_options(widths)
            masked_network.network_backward_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
                *(dy, dladj, x, tuple(net.weights), net.stairs, saved, outputs, a, d, d_outputs),
                *(dx, past, B, widths, net.hidden_units, net.activation, net.residual, *step),
                *(param_grads, dot_precision(x.dtype)),
                **options,
            )
        else:
            if has_step:
                options = affine.affine_options(widths[0], x.dtype)
                affine.affine_grad_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
                    *(dy, dladj, x, outputs, past, d_outputs, net.stairs),
                    *(net.order_at(net.hidden + 1), B, widths[0], *step),
                    **options,
                )
            _layers_backward(net, x, saved, a, d, d_outputs, dx, past)
        d_weights, d_biases = [none] * len(net.weights), [none] * len(net.weights)
        if param_grads:
            grads = _parameter_gradients(net, x, a, d, d_outputs)
            d_weights, d_biases = masked_weights.split_gradients(grads, widths, biases_given)
    return dx if x_grad else none, _terms(net, d, d_outputs, terms_grad), d_weights, d_biases


def _terms(net: Network, d: Tensor, d_outputs: Tensor, terms_grad: int) -> list[Tensor]:
    """The cotangents of the terms that there are, which are those of the pre-activations."""
    levels = [*net.blocks(d, len(d_outputs))[: net.hidden], d_outputs]
    return [
        level if terms_grad >> layer & 1 else d.new_empty(0) for layer, level in enumerate(levels)
    ]


def _layers_backward(
    net: Network,
    x: Tensor,
    saved: Tensor,
    a: Tensor | None,
    d: Tensor,
    d_outputs: Tensor,
    dx: Tensor | None,
    past: Tensor | None,
) -> None:
    B, hidden, widths = len(x), net.hidden, net.widths
    p = [None, *net.blocks(saved, B)]
    found = [dx, *net.blocks(d, B)[:hidden], d_outputs]
    values = [None] * (hidden + 1) if a is None else [None, *net.blocks(a, B)]
    for level in range(hidden, -1 if dx is not None else 0, -1):
        N, K = widths[level + 1], widths[level]
        options = masked_layers.layer_options(N, K, x.dtype)
        grid = triton.cdiv(B, options["BLOCK_B"]), triton.cdiv(K, options["BLOCK_N"])
        skip = found[level + 2] if skips(level + 2, hidden, net.residual) else None
        masked_layers.layer_pullback_kernel[grid](
            *(found[level + 1], net.weights[level], p[level], skip if level else past),
            *(found[level], values[level], net.stairs),
            *(net.order_at(level), net.order_at(level + 1), B, N, K),
            *(net.activation_of(level), dot_precision(x.dtype)),
            **options,
        )


def inverse(
    net: Network,
    y: Tensor,
    terms: Sequence[Tensor],
    biases: Sequence[Tensor],
    step: tuple[int, float, float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, ladj, saved) with y the result of the affine step at x."""
    B, size = len(y), len(y) * net.hidden_units
    p = y.new_empty(size + B * net.widths[-1])
    x, ladj = y.new_zeros(y.shape), y.new_empty(B)
    terms = [_or_none(term) for term in terms] or [None] * len(net.weights)
    biases = [_or_none(bias) for bias in biases]
    options = masked_sweep.sweep_options()
    with device_of(y):
        masked_sweep.sweep_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
            *(y, tuple(terms), tuple(net.weights), tuple(biases), net.stairs, p),
            *(y.new_zeros(size), x, ladj, B, net.widths, net.hidden_units),
            *(net.activation, net.residual, *step, dot_precision(y.dtype)),
            **options,
        )
    return x, ladj, p if save else y.new_empty(0)


def inverse_backward(
    net: Network,
    cotangents: tuple[Tensor, Tensor],
    x: Tensor,
    saved: Tensor,
    step: tuple[int, float, float],
    terms_grad: int,
    biases_given: int,
    x_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dy and the gradients of terms, weights and biases from (dx, dladj), as `backward`."""
    B, size, none = len(x), len(x) * net.hidden_units, x.new_empty(0)
    a, d = x.new_empty(size), x.new_zeros(saved.shape)
    dy = x.new_empty(x.shape)
    options = masked_sweep.sweep_options()
    with device_of(x):
        masked_sweep.sweep_back_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
            *(*cotangents, x, tuple(net.weights), net.stairs, saved, a, d, x.new_empty(x.shape)),
            *(dy, B, net.widths, net.hidden_units, net.activation, net.residual, *step),
            dot_precision(x.dtype),
            **options,
        )
        d_outputs = d[size:].view(B, -1)
        d_weights, d_biases = [none] * len(net.weights), [none] * len(net.weights)
        if param_grads:
            grads = _parameter_gradients(net, x, a, d[:size], d_outputs)
            d_weights, d_biases = masked_weights.split_gradients(grads, net.widths, biases_given)
    d_terms = _terms(net, d[:size], d_outputs, terms_grad)
    return dy if x_grad else none, d_terms, d_weights, d_biases


def _parameter_gradients(
    net: Network, x: Tensor, a: Tensor, d: Tensor, d_outputs: Tensor
) -> Tensor:
    """The gradients of all weights and biases side by side."""
    B, widths = len(x), net.widths
    precision = dot_precision(x.dtype)
    options = masked_weights.weight_options(x.dtype)
    chunks, chunk = masked_weights.weight_chunks(B, widths, options)
    size = sum(N * K + N for K, N in pairwise(widths))
    grads = x.new_empty(chunks, size)
    if masked_network.is_small(widths):
        tiles = max(masked_weights.layer_tiles(N, K, options) for K, N in pairwise(widths))
        masked_weights.network_weights_kernel[(tiles, len(net.weights), chunks)](
            *(x, a, d, d_outputs, grads, net.stairs, size, B, chunk, widths, precision), **options
        )
    else:
        inputs = [x, *net.blocks(a, B)[: net.hidden]]
        cotangents = [*net.blocks(d, B)[: net.hidden], d_outputs]
        at = 0
        for level, (K, N) in enumerate(pairwise(widths), 1):
            grid = triton.cdiv(K, options["BLOCK_J"]), triton.cdiv(N, options["BLOCK_N"]), chunks
            masked_weights.layer_weights_kernel[grid](
                *(cotangents[level - 1], inputs[level - 1], grads, net.stairs),
                *(net.order_at(level - 1), net.order_at(level), at, size, B, chunk, N, K),
                precision,
                **options,
            )
            at += N * K + N
    return grads[0] if chunks == 1 else grads.sum(0)


def _or_none(tensor: Tensor) -> Tensor | None:
    return None if tensor.shape == (0,) else tensor
