"""zuko's masked affine autoregressive layer, which its MAF consists of.

The layer is lazy: called with a context, it returns a transform. A converted one returns a
transform that computes value and log-determinant together, and its inverse by one sweep instead of
a pass for every feature.

Layout: `hyper` is masked layers and activations in turn. Its inputs are x and c side by side, its
outputs m_1, a_1, m_2, a_2, ..; the layer is y = x exp(l(a)) + m.

Source:
    zuko 1.6, zuko/flows/autoregressive.py and zuko/transforms.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform
from zuko import flows, transforms
from zuko.nn import MaskedLinear, MaskedMLP, Residual

from fastflow import masks
from fastflow.bijections.base import check_features, refuse_context
from fastflow.convert.activations import activation_name, check_hooks
from fastflow.convert.layer import MaskedLayer, Unsupported, tensors
from fastflow.functional.autoregressive import autoregressive, autoregressive_inverse
from fastflow.scales import SoftClip

SLOPE = inspect.signature(transforms.MonotonicAffineTransform).parameters["slope"].default
"""It is no part of a model's state, and not the same in all releases."""


class AutoregressiveTransform(transforms.AutoregressiveTransform):
    """What a converted layer returns: the affine transform at a context, in both directions.

    Arguments:
        layer: the converted layer.
        c: the context, (*batch, C), or None.
    """

    def __init__(self, layer: MaskedAutoregressiveTransform, c: Tensor | None) -> None:
        super().__init__(partial(layer.meta, c), layer.passes)
        self.layer, self.context = layer, c

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        network = self.layer.network(self.context)
        return super().call_and_ladj(x) if network is None else autoregressive(x, **network)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the log-determinant of the inverse."""
        network = self.layer.network(self.context)
        if network is not None:
            return autoregressive_inverse(y, **network)
        x = super()._inverse(y)
        return x, -super().log_abs_det_jacobian(x, y)

    @property
    def inv(self) -> Transform:
        if self._inv is None:
            self._inv = InverseTransform(self)
        return self._inv


class InverseTransform(_InverseTransform):
    """The inverse of an `AutoregressiveTransform`, with its log-determinant from the same sweep."""

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv.inverse_and_ladj(y)


class MaskedAutoregressiveTransform(MaskedLayer, flows.MaskedAutoregressiveTransform):
    """Converts `zuko.flows.MaskedAutoregressiveTransform` with its affine univariate."""

    derived = (*MaskedLayer.derived, "_activation", "_scale")
    _activation: str
    _scale: SoftClip

    def forward(self, c: Tensor | None = None) -> Transform:
        _, context_features = self.sizes()
        if not context_features:
            refuse_context("MaskedAutoregressiveTransform", c)
        elif c is None:
            raise TypeError(
                f"MaskedAutoregressiveTransform: c is None, must be (*batch, {context_features})"
            )
        else:
            check_features("MaskedAutoregressiveTransform", "c", c, context_features)
        return AutoregressiveTransform(self, c)

    def sizes(self) -> tuple[int, int]:
        """D and C."""
        features = self.hyper.out_features // 2
        return features, self.hyper.in_features - features

    def layers(self) -> list[MaskedLinear]:
        """The masked layers, first to last."""
        return list(self.hyper)[::2]

    def network(self, c: Tensor | None) -> dict[str, Any] | None:
        """The layer at a context as ops take it; None where zuko's own code must answer."""
        layers = self.layers()
        stairs = self.stairs(tensors(layers, "mask"))
        if stairs is None:
            return None
        weights, terms = tensors(layers, "weight"), None
        if c is not None:
            own, of_context = weights[0].split(self.sizes(), 1)
            weights[0] = own.contiguous()  # as the node wants it, see fastflow.autograd.node
            terms = [c @ of_context.mT, *[None] * (len(weights) - 1)]
        return {
            "weights": weights,
            "biases": tensors(layers, "bias"),
            "stairs": stairs,
            "terms": terms,
            "activation": self._activation,
            "scale": self._scale,
        }

    def sources(self) -> list[Tensor]:
        return tensors(self.layers(), "mask")

    def derive(self, sources: Sequence[Tensor]) -> Tensor:
        first, *others = sources
        own, of_context = first.split(self.sizes(), 1)
        if not of_context.all():
            raise Unsupported("its adjacency hides the context from some features")
        stairs = masks.staircase_of([own, *others])
        if stairs is None:
            raise Unsupported("its adjacency is not that of an order of the features")
        return stairs

    def check(self) -> None:
        self._scale = scale_of(self.univariate)
        if any(isinstance(part, Residual) for part in self.hyper):
            raise Unsupported("residual=True: zuko's blocks do not begin with an activation")
        strange = {type(part) for part in (self.hyper, *self.layers())} - {MaskedMLP, MaskedLinear}
        if strange:
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise Unsupported(f"its network has parts of class {names}")
        check_hooks(self.hyper)
        names = {activation_name(part) for part in list(self.hyper)[1::2]} or {"relu"}
        if len(names) > 1:
            raise Unsupported(f"it has several activations: {', '.join(sorted(names))}")
        (self._activation,) = names


def scale_of(univariate: Callable[..., Transform]) -> SoftClip:
    """The scale map of a layer's univariate.

    Raises:
        Unsupported: it is not the affine one, or has a slope out of range.
    """
    settings = {}
    if type(univariate) is partial and not univariate.args:
        univariate, settings = univariate.func, univariate.keywords
    if univariate is not transforms.MonotonicAffineTransform:
        name = getattr(univariate, "__name__", type(univariate).__name__)
        raise Unsupported(f"univariate is {name}, not MonotonicAffineTransform")
    if not settings.keys() <= {"slope"}:
        raise Unsupported(f"univariate has the options {', '.join(settings)}, only slope is known")
    try:
        return SoftClip(settings.get("slope", SLOPE))
    except ValueError as problem:
        raise Unsupported(str(problem)) from None


LAYERS = {flows.MaskedAutoregressiveTransform: MaskedAutoregressiveTransform}
"""What replaces a class of zuko."""
OTHERS: dict[type, str] = {}
"""Classes of the same kind that nothing replaces, and why."""
