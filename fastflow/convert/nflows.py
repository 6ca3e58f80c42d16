"""The layers of nflows: its MaskedAffineAutoregressiveTransform."""

from __future__ import annotations

from typing import Any, ClassVar

from nflows.transforms import autoregressive, made
from torch import Tensor

from fastflow.autograd.context import ContextTerm, plain_linear
from fastflow.convert.layer import Unsupported
from fastflow.convert.made import MadeLayer
from fastflow.scales import Softplus


class MaskedAffineAutoregressiveTransform(
    MadeLayer, autoregressive.MaskedAffineAutoregressiveTransform
):
    """nflows' layer, y = softplus(a) x + 1e-3 x + m. Its parallel direction takes data to noise."""

    made = made
    scale: ClassVar[Softplus] = Softplus(offset=0.0, minimum=1e-3)

    def check(self) -> None:
        if self._epsilon != self.scale.minimum:
            raise Unsupported(f"_epsilon is {self._epsilon}, only {self.scale.minimum} is known")
        super().check()

    def residual(self) -> bool:
        return self.autoregressive_net.use_residual_blocks

    def terms(self, context: Tensor, layers: int) -> list[Tensor | None] | ContextTerm:
        net = self._modules["autoregressive_net"]
        layer = net._modules.get("context_layer")
        if not self._residual and plain_linear(layer):
            return ContextTerm.of(layer, context, activated=True)
        found: list[Any] = [None] * layers
        found[0] = net.activation(net.context_layer(context))
        if self._residual:
            found[1:-1:2] = [block.context_layer(context) for block in net.blocks]
        return found


LAYERS = {autoregressive.MaskedAffineAutoregressiveTransform: MaskedAffineAutoregressiveTransform}
OTHERS = dict.fromkeys(
    (
        autoregressive.MaskedPiecewiseLinearAutoregressiveTransform,
        autoregressive.MaskedPiecewiseQuadraticAutoregressiveTransform,
        autoregressive.MaskedPiecewiseCubicAutoregressiveTransform,
        autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    ),
    "fastflow has no autoregressive layer of splines",
)
"""Layers of a kind that fastflow has, and why it does not have them."""
