"""The affine autoregressive layer of MAF and IAF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.bijections.base import Bijection, check_batches, check_features, positive_int
from fastflow.bijections.made import MADE
from fastflow.functional.autoregressive import autoregressive, autoregressive_inverse
from fastflow.inner import plain
from fastflow.reference.autoregressive import inverse_by_passes, settled_by_passes
from fastflow.reference.network import reach
from fastflow.reference.scales import step
from fastflow.scales import Gate, Scale, scale_map

OWNER = "MaskedAffineAutoregressive"
SMALL = 0.01  # the weights of outputs at the start, as a share of PyTorch's


class MaskedAffineAutoregressive(Bijection):
    r"""Shifts and scales every feature by what a MADE makes of those before it.

    .. math::
        y_i = s_i x_i + m_i, \qquad (m_i, a_i) = \mathrm{net}_i(x_{<i};\ c), \quad
        s_i = s(a_i), \qquad \mathrm{ladj} = \sum_i \log s_i

    (with the gate of IAF :math:`y_i = s_i x_i + (1 - s_i) m_i`). Both directions cost about one
    pass through the network: `forward` computes all features at once, `inverse` sweeps over them
    and computes every unit once.

    Arguments:
        features: D.
        hidden_features, context_features, activation, order, residual, adjacency: as in
            `fastflow.MADE`. With an adjacency matrix `inverse` takes as many passes through the
            network as the longest path in it has features (`fastflow.masks.depth`).
        scale: "softclip", "softplus", "sigmoid", "clamp", "gate", or an object of
            `fastflow.scales`.
        recompute: save memory in training: backward computes the hidden layers once more instead
            of keeping them.
        depth: how many such layers the whole flow has; the start of "gate" and "sigmoid" depends on
            it.

    The layer starts near the identity, for every context: the weights of the last layer (and those
    of the context where it feeds that layer) are a hundredth of PyTorch's, large enough for
    gradients to reach the layers below; its biases give shift 0 and scale s = 1. The weights of the
    gate's shifts are PyTorch's own, for 1 - s is small. The maps that cannot reach 1, "gate" and
    "sigmoid", start at
    :math:`s(0)^{1/\mathrm{depth}}`: the layers of a flow together scale by s(0), as one does alone.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.

    Source:
        Papamakarios, Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation, 2017,
        arXiv 1705.07057; Kingma et al., Improving Variational Inference with Inverse Autoregressive
        Flow, 2016, arXiv 1606.04934.

    Example:
        >>> layer = MaskedAffineAutoregressive(3, hidden_features=(32, 32))
        >>> x = torch.randn(8, 3)
        >>> y, ladj = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        order: str | Sequence[int] | Tensor | None = None,
        residual: bool = False,
        scale: str | Scale = "softclip",
        recompute: bool = False,
        adjacency: Tensor | None = None,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.scale = scale_map(OWNER, scale)
        start = self.scale.start(positive_int(OWNER, "depth", depth))
        self.network = MADE(
            *(features, 2, hidden_features, context_features, activation, order, residual),
            adjacency=adjacency,
        )
        outputs = [self.network.layers[-1]]
        if len(self.network.layers) == 1 and self.network.context_layer is not None:
            outputs.append(self.network.context_layer)
        for layer in outputs:
            _NearIdentity(layer, 1.0 if isinstance(self.scale, Gate) else SMALL, start)
        self.features = self.network.features
        self.context_features = self.network.context_features
        self.recompute = bool(recompute)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(OWNER, "x", x, self.features)
        network = self._plain_network("x", x, context)
        if network is None:
            return self._by_calls(x, context, inverse=False)
        return autoregressive(x, **network, scale=self.scale, recompute=self.recompute)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(OWNER, "y", y, self.features)
        network = self._plain_network("y", y, context)
        if network is None:
            return self._by_calls(y, context, inverse=True)
        return autoregressive_inverse(y, **network, scale=self.scale, recompute=self.recompute)

    def _plain_network(
        self, name: str, points: Tensor, context: Tensor | None
    ) -> dict[str, Any] | None:
        """The network at a context as ops take it; None where modules inside must be called."""
        made = self._modules["network"]
        if type(made) is not MADE or not plain(made):
            if not isinstance(made, MADE):
                raise TypeError(
                    f"{OWNER}: network is a {type(made).__module__}.{type(made).__qualname__}, "
                    "must be a fastflow.MADE: wrap the whole layer instead of what is inside"
                )
            return None
        network = made.network(context, OWNER)
        check_batches(OWNER, name, points, context)
        return network

    def _by_calls(
        self, points: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Either direction by calls of the network with its hooks; the inverse takes D of them."""
        made = self.network
        dtype = torch.promote_types(points.dtype, next(made.parameters()).dtype)
        if context is not None:
            dtype = torch.promote_types(dtype, context.dtype)
        compute = torch.promote_types(dtype, torch.float32)
        c0, c1 = self.scale.constants
        setting = self.scale.number, float(c0), float(c1)

        def shift_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
            return made(x.to(dtype), context).to(compute).unbind(-1)

        points = points.to(compute)
        if inverse:
            seen = reach(made.masks(), made.residual).unflatten(0, (-1, 2)).any(1)
            settled = settled_by_passes(seen)
            image, ladj = inverse_by_passes(points, shift_and_scale, settled, setting)
        else:
            image, logs = step(points, *shift_and_scale(points), *setting)
            ladj = logs.sum(-1)
        return image.to(dtype), ladj

    def extra_repr(self) -> str:
        return f"scale={self.scale}" + ", recompute=True" * self.recompute


class _NearIdentity:
    """The `reset_parameters` of a layer that makes shifts and raw scales, two for every feature.

    Its weights start small, its biases at shift 0 and at a raw scale. It belongs to the layer, not
    to its parent, since tools that fill modules made on the meta device ask every module alone.

    Arguments:
        layer: whose method it becomes.
        shifts: the weights of the shifts, as a share of PyTorch's.
        start: the raw scale.
    """

    def __init__(self, layer: nn.Linear, shifts: float, start: float) -> None:
        self.layer, self.shares, self.start = layer, (shifts, SMALL), start
        layer.__dict__["reset_parameters"] = self
        self()

    def __call__(self) -> None:
        nn.Linear.reset_parameters(self.layer)
        with torch.no_grad():
            for weights, share in zip(
                self.layer.weight.unflatten(0, (-1, 2)).unbind(1), self.shares
            ):
                weights.mul_(share)
            if self.layer.bias is not None:
                shift, scale = self.layer.bias.view(-1, 2).unbind(-1)
                shift.zero_()
                scale.fill_(self.start)
