"""The network of an affine autoregressive layer that all contenders are given, and its formulas.

The peers agree on the layer, but every one has its own map from a to the scale. So one network is
drawn, and fastflow's layer is given the scale map of the peer it is compared with: a `Form`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fastflow
from fastflow import masks, scales

ACTIVATIONS = {"relu": (torch.relu, nn.ReLU), "tanh": (torch.tanh, nn.Tanh)}


@dataclass(frozen=True)
class Form:
    """The formulas of a layer.

    Arguments:
        scale: the map from a to the scale.
        residual: the hidden layers form blocks h + W' act(W act(h) + b) + b' after a first one.
        active_context: the first hidden layer adds act(V c + v), not V c.
    """

    scale: scales.Scale
    residual: bool = False
    active_context: bool = False


PLAIN = Form(scales.SoftClip(slope=1e-3))
FORMS = {
    "zuko": PLAIN,
    "nflows": Form(scales.Softplus(offset=0.0, minimum=1e-3), active_context=True),
    # normflows' layers without blocks have no activation after the first layer: no MLP to compare
    "normflows": Form(scales.Sigmoid(offset=2.0, minimum=1e-3), residual=True),
    "pyro": Form(scales.Clamp(-5.0, 3.0)),
}


@dataclass(frozen=True)
class Network:
    """One network with its numbers, and where it is evaluated.

    Arguments:
        form: its formulas.
        activation: "relu" or "tanh".
        hidden: L, the number of hidden layers.
        masks: bool (n_l, n_{l-1}) for every layer l = 1 .. L + 1.
        tensors: x (B, D) first, which is y for an inverse; then W1, b1, .. for every layer, and
            context (B, C), V (H, C) and, where the context's part is activated, v (H,).
    """

    form: Form
    activation: str
    hidden: int
    masks: list[Tensor]
    tensors: dict[str, Tensor]

    def at(self, x: Tensor) -> Network:
        """The same network at other points."""
        return replace(self, tensors=self.tensors | {"x": x})

    def double(self) -> Network:
        tensors = {name: tensor.double() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients."""
        return tuple(f"d{name}" for name in self.tensors)


def draw(
    rows: int,
    features: int,
    widths: Sequence[int],
    context: int,
    activation: str,
    form: Form,
    device: torch.device,
) -> Network:
    """A network whose units are of order 1 and whose scales are moderate, at random points."""
    if form.residual:
        widths = widths[:1] * max(2, len(widths) // 2 * 2)
    layer = layer_of(features, widths, context, activation, form)
    levels = [features, *(holder.out_features for holder in layer.network.layers)]
    seen = masks.masks(layer.network.stairs, levels)
    generator = torch.Generator().manual_seed(features + sum(widths))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"x": randn(rows, features)}
    for number, mask in enumerate(seen, 1):
        gain = 0.3 if number == len(seen) else 1.0
        fan = mask.sum(1, keepdim=True).clamp(min=1)
        tensors[f"W{number}"] = gain * randn(*mask.shape) / fan**0.5
        tensors[f"b{number}"] = 0.1 * randn(len(mask))
    if context:
        tensors |= {"context": randn(rows, context), "V": randn(levels[1], context) / context**0.5}
        if form.active_context:
            tensors["v"] = 0.1 * randn(levels[1])
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Network(form, activation, len(seen) - 1, [mask.to(device) for mask in seen], tensors)


def layer_of(
    features: int, widths: Sequence[int], context: int, activation: str, form: Form
) -> fastflow.MaskedAffineAutoregressive:
    """fastflow's layer of these sizes and formulas."""
    return fastflow.MaskedAffineAutoregressive(
        *(features, tuple(widths), context, activation), residual=form.residual, scale=form.scale
    )
