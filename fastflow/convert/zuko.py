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
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform
from zuko import flows, transforms
from zuko.nn import MaskedLinear, MaskedMLP, Residual

from fastflow.bijections.base import check_features, refuse_context
from fastflow.convert.activations import check_hooks, one_activation
from fastflow.convert.choice import no_kernel
from fastflow.convert.joined import JoinedLayer
from fastflow.convert.layer import Unsupported
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
        super().__init__(partial(layer.meta, c), layer.passes)  # pyright: ignore[reportArgumentType]
        self.layer, self.context = layer, c

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        network = None if no_kernel(layer.op, x) else layer.network(self.context)
        if layer.answered(x, network):
            return super().call_and_ladj(x)
        return autoregressive(x, **network)  # pyright: ignore[reportCallIssue]

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the log-determinant of the inverse."""
        network = self.layer.network(self.context)
        if not self.layer.answered(y, network, inverse=True):
            return autoregressive_inverse(y, **network)  # pyright: ignore[reportCallIssue]
        x = super()._inverse(y)
        return x, -super().log_abs_det_jacobian(x, y)

    @property
    def inv(self) -> Transform:
        if self._inv is None:
            self._inv = InverseTransform(self)
        return self._inv

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch's own leaves the inverse out, which copies then lack


class InverseTransform(_InverseTransform):
    """The inverse of an `AutoregressiveTransform`, with its log-determinant from the same sweep."""

    _inv: AutoregressiveTransform

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv.inverse_and_ladj(y)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch's own leaves out what it is the inverse of


class MaskedAutoregressiveTransform(JoinedLayer, flows.MaskedAutoregressiveTransform):
    """Converts `zuko.flows.MaskedAutoregressiveTransform` with its affine univariate."""

    context_first = False
    interleaved = True
    methods = ("meta",)

    def forward(self, c: Tensor | None = None) -> Transform:
        hyper = self.root()
        if type(hyper) is not MaskedMLP:
            return AutoregressiveTransform(self, c)  # the library's own code will answer
        context_features = hyper.in_features - hyper.out_features // 2
        if not context_features:
            refuse_context("MaskedAutoregressiveTransform", c)
        elif c is None:
            raise TypeError(
                f"MaskedAutoregressiveTransform: c is None, must be (*batch, {context_features})"
            )
        else:
            check_features("MaskedAutoregressiveTransform", "c", c, context_features)
        return AutoregressiveTransform(self, c)

    def root(self) -> nn.Module | None:
        return self._modules.get("hyper")

    def find_layers(self) -> list[nn.Module]:
        return list(self.hyper)[::2]

    def check(self) -> None:
        self._scale = scale_of(self.univariate)
        if type(self.hyper) is not MaskedMLP:
            raise Unsupported(f"its network is a {type(self.hyper).__name__}, not a MaskedMLP")
        if any(isinstance(part, Residual) for part in self.hyper):
            raise Unsupported("residual=True: zuko's blocks do not begin with an activation")
        strange = {type(part) for part in self.find_layers()} - {MaskedLinear}
        if strange:
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise Unsupported(f"its network has parts of class {names}")
        check_hooks(self.hyper)
        self._activation = one_activation(list(self.hyper)[1::2])


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
