"""The layers of normflows: its MaskedAffineAutoregressive, and Planar."""

from __future__ import annotations

from typing import Any

import torch
from normflows.flows import planar
from normflows.flows.affine import autoregressive
from normflows.flows.neural_spline import autoregressive as splines
from normflows.nets import made
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastflow.convert.choice import no_kernel
from fastflow.convert.layer import Converted, Unsupported
from fastflow.convert.made import MadeLayer
from fastflow.functional.planar_flow import planar_flow, planar_flow_inverse
from fastflow.memo import tensors
from fastflow.scales import Sigmoid


class MaskedAffineAutoregressive(MadeLayer, autoregressive.MaskedAffineAutoregressive):
    """normflows' layer, y = (sigmoid(a + 2) + 1e-3) x + m.

    Its feed-forward networks have no activation between their first two layers, which are one here:
    the product of their masked weights, computed anew at every call. Few rows are not worth that.
    """

    made = made
    scale = Sigmoid(offset=2.0, minimum=1e-3)

    def check(self) -> None:
        super().check()
        net = self.autoregressive_net
        if type(net.preprocessing) is not nn.Identity:
            raise Unsupported("its MADE has a preprocessing")
        if self._residual and len(net.blocks) and hasattr(net, "context_layer"):
            raise Unsupported("residual blocks gated by a context are not supported")

    def residual(self) -> bool:
        blocks = self.autoregressive_net.blocks
        return not len(blocks) or isinstance(blocks[0], made.MaskedResidualBlock)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._residual and len(inputs) < self.features:
            # the product of the weights would take longer than all that it spares
            return super(MadeLayer, self).forward(inputs, context)
        return super().forward(inputs, context)

    def network(self, inputs: Tensor, context: Tensor | None) -> dict[str, Any] | None:
        if self._residual:
            return super().network(inputs, context)
        # the library's class refuses a context in feed-forward blocks
        network = super().network(inputs, None) if context is None else None
        if network is not None:
            first, second = tensors(self.find_layers()[:2], "mask")
            w0, w1, *weights = network["weights"]
            b0, b1, *biases = network["biases"]
            w1 = torch.where(second != 0, w1, 0)
            network["weights"] = [w1 @ torch.where(first != 0, w0, 0), *weights]
            network["biases"] = [nnf.linear(b0, w1, b1), *biases]
        return network

    def as_computed(self, shown: list[Tensor]) -> list[Tensor]:
        if self._residual:
            return shown
        first, second, *rest = shown
        return [second.float() @ first.float() > 0, *rest]

    def terms(self, context: Tensor, layers: int) -> list[Tensor | None]:
        return [self.autoregressive_net.context_layer(context), *[None] * (layers - 1)]


class Planar(Converted, planar.Planar):
    """normflows' planar step with tanh, which has an inverse here."""

    op = "planar_flow_forward"

    def prepare(self) -> None:
        if self.act != "tanh":
            raise Unsupported(f"activation {self.act} is not supported, only tanh")
        if self.w.shape[:1] != (1,) or self.u.shape != self.w.shape or self.b.numel() != 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (self.w, self.u, self.b))
            raise Unsupported(f"w, u and b have shapes {shapes}, not (1, D), (1, D) and (1,)")

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.shape[1:] != self.w.shape[1:] or no_kernel(self.op, z):
            return super().forward(z)
        z_K, ladj = planar_flow(z.flatten(1), *self.step())
        return z_K.view(z.shape), ladj

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.shape[1:] != self.w.shape[1:]:
            return super().inverse(z)
        z_0, ladj = planar_flow_inverse(z.flatten(1), *self.step())
        return z_0.view(z.shape), ladj

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """w, u (1, D) and b (1,)."""
        return self.w.flatten(1), self.u.flatten(1), self.b.view(1)


LAYERS = {
    autoregressive.MaskedAffineAutoregressive: MaskedAffineAutoregressive,
    planar.Planar: Planar,
}
OTHERS = {
    splines.MaskedPiecewiseRationalQuadraticAutoregressive: "fastflow has no autoregressive layer "
    "of splines",
}
"""Layers of a kind that fastflow has, and why it does not have them."""
