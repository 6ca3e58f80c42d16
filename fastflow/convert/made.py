"""The affine autoregressive layer that nflows and, after it, normflows build on their MADE.

A layer is its `autoregressive_net`: an initial layer, blocks of one masked layer each or of two
around which the input is added, and a final layer whose outputs are, feature after feature, raw
scale and shift. The context reaches the initial layer and, in some, the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastflow.autograd.context import ContextTerm
from fastflow.convert.activations import check_hooks, one_activation
from fastflow.convert.choice import no_kernel
from fastflow.convert.layer import MaskedLayer, Unsupported, as_bool
from fastflow.convert.staircase import staircase_of
from fastflow.functional.autoregressive import autoregressive, autoregressive_inverse
from fastflow.memo import tensors
from fastflow.scales import Scale


class MadeLayer(MaskedLayer):
    """A converted layer on a MADE of nflows or normflows, to stand before the library's class."""

    derived = (*MaskedLayer.derived, "_activation", "_residual")
    made: ClassVar[ModuleType]
    """The library's module that defines MADE and its parts."""
    scale: ClassVar[Scale]
    autoregressive_net: Any
    _activation: str
    _residual: bool
    methods = ("_elementwise_forward", "_elementwise_inverse", "_unconstrained_scale_and_shift")

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = None if no_kernel(self.op, inputs) else self.network(inputs, context)
        if self.answered(inputs, network):
            return super().forward(inputs, context)
        return autoregressive(inputs, **network)  # pyright: ignore[reportCallIssue]

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = self.network(inputs, context)
        if self.answered(inputs, network, inverse=True):
            return super().inverse(inputs, context)  # pyright: ignore[reportAttributeAccessIssue]
        return autoregressive_inverse(inputs, **network)  # pyright: ignore[reportCallIssue]

    def network(self, inputs: Tensor, context: Tensor | None) -> dict[str, Any] | None:
        """The network as ops take it; None where the library's own class must answer."""
        layers = self.layers()
        if layers is None:
            return None
        stairs = self.stairs(tensors(layers, "mask"))
        if stairs is None or inputs.dim() != 2:  # the library's class knows rows only
            return None
        return {
            "weights": tensors(layers, "weight"),
            "biases": tensors(layers, "bias"),
            "stairs": stairs,
            "terms": None if context is None else self.terms(context, len(layers)),
            "activation": self._activation,
            "residual": self._residual,
            "scale": self.scale,
        }

    def terms(self, context: Tensor, layers: int) -> list[Tensor | None] | ContextTerm:
        """What the context (B, C) adds to the pre-activations of every layer."""
        raise NotImplementedError(f"{type(self).__name__} has no terms")

    def root(self) -> nn.Module | None:
        return self._modules.get("autoregressive_net")

    def find_layers(self) -> list[nn.Module]:
        net = self.autoregressive_net
        layers = [net.initial_layer]
        for block in net.blocks:
            layers += [block.linear] if hasattr(block, "linear") else block.linear_layers
        return [*layers, net.final_layer]

    def derive(self, sources: Sequence[Tensor]) -> Tensor:
        shown = self.as_computed(as_bool(sources))
        outputs = torch.arange(len(shown[-1]), device="cpu").view(-1, 2).flip(-1)
        stairs = staircase_of(shown, outputs, self._residual)
        if stairs is None:
            raise Unsupported("its masks are not those of an autoregressive staircase")
        return stairs

    def as_computed(self, shown: list[Tensor]) -> list[Tensor]:
        """The masks, bool, of the layers that `network` gives, from those of the masked layers."""
        return shown

    def check(self) -> None:
        made, net = self.made, self.autoregressive_net
        _check_class("autoregressive_net", net, made.MADE)
        check_hooks(net)
        for name in ("initial_layer", "final_layer"):
            _check_class(name, getattr(net, name), made.MaskedLinear)
        for number, block in enumerate(net.blocks):
            _check_block(f"blocks.{number}", block, made)
        if len(set(map(type, net.blocks))) > 1:
            raise Unsupported("it has blocks of both kinds")
        users = [net] * hasattr(net, "activation") + list(net.blocks)
        self._activation = one_activation(user.activation for user in users)
        self._residual = self.residual()

    def residual(self) -> bool:
        """Whether the last hidden units feed the outputs without an activation in between."""
        raise NotImplementedError(f"{type(self).__name__} has no residual")


def _check_block(name: str, block: Any, made: ModuleType) -> None:
    if isinstance(block, made.MaskedResidualBlock):
        _check_class(name, block, made.MaskedResidualBlock)
        normalised, linear = block.use_batch_norm, list(block.linear_layers)
    else:
        _check_class(name, block, made.MaskedFeedforwardBlock)
        normalised, linear = block.batch_norm is not None, [block.linear]
    if normalised:
        raise Unsupported("batch norm is not supported")
    if block.dropout.p:
        raise Unsupported(f"dropout is not supported, its probability is {block.dropout.p}")
    for layer in linear:
        _check_class(f"a layer of {name}", layer, made.MaskedLinear)


def _check_class(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises Unsupported unless the module is of exactly this class: others may not compute it."""
    if type(module) is not kind:
        raise Unsupported(f"{name} is a {type(module).__name__}, not a {kind.__name__}")
