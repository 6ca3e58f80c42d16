"""Pyro's affine autoregressive transforms and planar flows, each with and without a context.

Noise to data is their parallel direction. A layer that takes a context makes a transform of it, by
`condition`; a converted layer makes a fast one.

Pyro's transforms remember the last pair of points, and answer with it whatever has happened to the
parameters since. Converted ones remember the last draw, if anything, until something has changed.

Layout: a network takes c and x side by side, and its outputs are m_1 .. m_D, a_1 .. a_D.

Source:
    Pyro 1.9, pyro/distributions/transforms/affine_autoregressive.py and planar.py,
    pyro/nn/auto_reg_nn.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyro import nn as networks
from pyro.distributions import transforms
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms.planar import ConditionedPlanar as OriginalConditionedPlanar
from pyro.nn.auto_reg_nn import MaskedLinear
from torch import Tensor, nn
from torch.distributions import Transform

from fastflow.bijections.base import check_features
from fastflow.convert import draw
from fastflow.convert.activations import MODULES, check_hooks, one_activation
from fastflow.convert.choice import no_kernel
from fastflow.convert.joined import JoinedLayer
from fastflow.convert.layer import Converted, Unsupported
from fastflow.functional.autoregressive import autoregressive, autoregressive_inverse
from fastflow.functional.planar_flow import planar_flow, planar_flow_inverse
from fastflow.inner import global_hooks, inside, plain
from fastflow.memo import tensors, tensors_of
from fastflow.scales import Clamp, Gate, Scale


class Computed(Transform):
    """A transform that gives values and log-determinants by `compute`, and remembers nothing."""

    def compute(self, point: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """y of a point x, or with `inverse` x of a point y; and the ladj from x to y."""
        raise NotImplementedError(f"{type(self).__name__} has no compute")

    def __call__(self, x: Tensor) -> Tensor:
        return self.compute(x, inverse=False)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.compute(y, inverse=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.compute(x, inverse=False)[1]


class Remembering(Computed):
    """One that remembers its last draw, for those who score it."""

    def sources(self) -> list[Tensor] | None:
        """The tensors that it is computed from beside the point; None where that may not be all."""
        raise NotImplementedError(f"{type(self).__name__} has no sources")

    def __call__(self, x: Tensor) -> Tensor:
        last = draw.last(self)
        if last is not None and last.is_inverted_to(x):  # ComposeTransform does that to score y
            if (known := self._recall(last)) is not None:
                return known[1]
        y, ladj = self.compute(x, inverse=False)
        if draw.watchable() and (sources := self.sources()) is not None:
            draw.remember(self, x, y, ladj, sources)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        last = draw.last(self)
        if last is None or not last.is_of(y) or (known := self._recall(last)) is None:
            return super()._inv_call(y)
        last.inverted = True
        return known[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        last = draw.last(self)
        known = self._recall(last) if last is not None and last.is_of(y) else None
        if known is None or known[0] is not x:
            return super().log_abs_det_jacobian(x, y)
        draw.forget(self)  # a second backward pass through the same ladj would fail
        return known[2]

    def _recall(self, last: draw.Draw) -> tuple[Tensor, Tensor, Tensor] | None:
        """x, y and the ladj of the last draw, if a pass would give the same."""
        sources = self.sources()
        return None if sources is None else last.recall(sources)


class ConvertedTransform(Computed, Converted):
    """A converted layer that is a transform itself."""

    remembered: str
    """The attribute in which the original keeps the log-determinant of its last pair of points."""

    def adopt(self, layer: nn.Module) -> None:
        super().adopt(layer)
        # it would be old if the layer became the original again, and has no copy
        layer.__dict__.update({"_cached_x_y": (None, None), self.remembered: None})


class MaskedNetwork(JoinedLayer):
    """A layer with one of Pyro's masked networks, and settings that make a scale of its outputs."""

    context_first = True
    interleaved = False
    kind: type[networks.ConditionalAutoRegressiveNN]
    """The exact class of the network."""
    place: str
    """The name of the network in the layer."""

    @property
    def hyper(self) -> networks.ConditionalAutoRegressiveNN:
        """The network."""
        return getattr(self, self.place)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the affine step by name; those that are missing have their defaults."""
        raise NotImplementedError(f"{type(self).__name__} has no options")

    def root(self) -> nn.Module | None:
        return self._modules.get(self.place)

    def find_layers(self) -> list[nn.Module]:
        return list(self.hyper.layers)

    def layers(self, called: bool = True) -> list[nn.Module] | None:
        layers = super().layers(called)
        return None if called and layers and "_forward" in self.hyper.__dict__ else layers

    def sources(self) -> list[Tensor] | None:
        layers = self.layers()
        if layers is None:
            return None
        stairs = self.stairs(tensors(layers, "mask"))
        if not isinstance(stairs, Tensor):
            return None
        biases = [bias for bias in tensors(layers, "bias") if bias is not None]
        return [*tensors(layers, "weight"), *biases, stairs]

    def check(self) -> None:
        hyper = self.hyper
        if type(hyper) is not self.kind:
            raise Unsupported(f"its network is a {type(hyper).__name__}, not {self.kind.__name__}")
        if hyper.skip_layer is not None:
            raise Unsupported("skip_connections=True")
        if list(hyper.param_dims) != [1, 1]:
            raise Unsupported(f"param_dims is {hyper.param_dims}, not [1, 1]")
        if any(type(layer) is not MaskedLinear for layer in hyper.layers):
            raise Unsupported("its network has layers other than MaskedLinear")
        check_hooks(hyper)
        self._activation = one_activation([hyper.f])
        self._scale = scale_of(**self.options)


class AffineStep(Remembering):
    """The affine transform that a masked network makes."""

    op: str
    stable: bool
    network: Callable[..., dict[str, Any] | None]
    answered: Callable[..., bool]

    def compute(self, point: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        network: Any = None if not inverse and no_kernel(self.op, point) else self.network()
        if self.answered(point, network, inverse):
            return self._by_pyro(point, inverse)
        alone = point.dim() == 1 and network["terms"] is None
        rows = point.unsqueeze(0) if alone else point  # for ops take a matrix by a shorter way
        image, ladj = (autoregressive_inverse if inverse else autoregressive)(rows, **network)
        image, ladj = (image.squeeze(0), ladj.squeeze(0)) if alone else (image, ladj)
        return image, -ladj if inverse else ladj

    def _by_pyro(self, point: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """As `compute`, by the library's own code, which leaves the ladj in an attribute."""
        original = object.__new__(transforms.AffineAutoregressive)  # of this call, of this thread
        original.__dict__.update(self.__dict__)
        name = ("_inverse" if inverse else "_call") + "_stable" * self.stable
        image = getattr(transforms.AffineAutoregressive, name)(original, point)
        return image, original._cached_log_scale.sum(-1)  # pyright: ignore[reportOptionalMemberAccess]


class AffineAutoregressive(
    MaskedNetwork, AffineStep, ConvertedTransform, transforms.AffineAutoregressive
):
    """Converts `pyro.distributions.transforms.AffineAutoregressive`."""

    kind = networks.AutoRegressiveNN
    remembered = "_cached_log_scale"
    place = "arn"

    @property
    def options(self) -> dict[str, Any]:
        names = ("log_scale_min_clip", "log_scale_max_clip", "sigmoid_bias", "stable")
        return {name: getattr(self, name) for name in names}


class Conditional(ConditionalTransformModule):
    """A converted layer that makes a transform of a context.

    Python swaps classes only if their first bases agree, so that this stands before `Converted`.
    """

    conditioned: type[Conditioned]

    def condition(self, context: Tensor) -> Conditioned:
        transform = super().condition(context)  # pyright: ignore[reportAbstractUsage]
        transform.__class__ = self.conditioned
        transform.__dict__.update(layer=partial(_same, self), context=context)
        return transform


class Conditioned(Computed):
    """A transform that a converted layer made of a context.

    Attributes:
        layer: gives the layer; not the layer itself, which would become a submodule.
        context: (*batch, C).
    """

    layer: Callable[[], Any]
    context: Tensor


class ConditionedAffineAutoregressive(AffineStep, Conditioned, transforms.AffineAutoregressive):
    """What the layer that follows makes of a context."""

    op = MaskedNetwork.op

    def network(self) -> dict[str, Any] | None:
        return self.layer().network(self.context)

    def sources(self) -> list[Tensor] | None:
        sources = self.layer().sources()
        return None if sources is None else [*sources, self.context]

    def answered(self, x: Tensor, network: dict[str, Any] | None, inverse: bool = False) -> bool:
        return self.layer().answered(x, network, inverse)


class ConditionalAffineAutoregressive(
    Conditional, MaskedNetwork, transforms.ConditionalAffineAutoregressive
):
    """Converts `pyro.distributions.transforms.ConditionalAffineAutoregressive`."""

    kind = networks.ConditionalAutoRegressiveNN
    conditioned = ConditionedAffineAutoregressive
    place = "nn"

    @property
    def options(self) -> dict[str, Any]:
        return self.kwargs

    def condition(self, context: Tensor) -> Conditioned:
        if isinstance(self.nn, self.kind):
            check_features(type(self).__name__, "context", context, self.nn.context_dim)
        return super().condition(context)


class PlanarStep(Computed):
    """A planar transform. Unlike Pyro's it has an inverse."""

    op = "planar_flow_forward"
    _params: Callable[[], tuple[Tensor, Tensor, Tensor]]

    def compute(self, point: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if not inverse and no_kernel(self.op, point):
            original = object.__new__(transforms.Planar)  # of this call, of this thread
            original.__dict__.update(self.__dict__)
            return transforms.Planar._call(original, point), original._cached_logDetJ  # pyright: ignore[reportReturnType]
        b, u, w = self._params()
        chain = (w.unsqueeze(-2), u.unsqueeze(-2), b)  # of one step
        if not inverse:
            return planar_flow(point, *chain)
        x, ladj = planar_flow_inverse(point, *chain)
        return x, -ladj


class Planar(PlanarStep, ConvertedTransform, transforms.Planar):
    """Converts `pyro.distributions.transforms.Planar`."""

    remembered = "_cached_logDetJ"

    def prepare(self) -> None:
        """It needs nothing, and has no settings."""


class ConditionedPlanar(Remembering, PlanarStep, Conditioned, OriginalConditionedPlanar):
    """What the layer that follows makes of a context.

    It remembers its last draw, as the network costs more than the planar step.
    """

    # for transforms that are no modules have none
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def sources(self) -> list[Tensor] | None:
        net = self.layer().nn
        if type(net) is not networks.DenseNN or "f" not in net._modules or global_hooks():
            return None
        modules = inside(net)
        known = all([one is not None and type(one) in DENSE and plain(one) for one in modules])
        return [*tensors_of(net), self.context] if known and "_forward" not in vars(net) else None


class ConditionalPlanar(Conditional, Converted, transforms.ConditionalPlanar):
    """Converts `pyro.distributions.transforms.ConditionalPlanar`, whatever its network is."""

    op = PlanarStep.op

    conditioned = ConditionedPlanar

    def prepare(self) -> None:
        """It needs nothing, and has no settings."""


DENSE = (networks.DenseNN, nn.ModuleList, nn.Linear, *MODULES)
"""The modules of a network whose outputs depend on its parameters and inputs alone."""


def _same(layer: nn.Module) -> nn.Module:
    return layer


def scale_of(
    log_scale_min_clip: float = -5.0,
    log_scale_max_clip: float = 3.0,
    sigmoid_bias: float = 2.0,
    stable: bool = False,
) -> Scale:
    """The scale map that options of Pyro's affine step mean.

    Raises:
        Unsupported: bounds are out of range.
    """
    if stable:
        return Gate(sigmoid_bias)
    try:
        return Clamp(log_scale_min_clip, log_scale_max_clip)
    except ValueError as problem:
        raise Unsupported(str(problem)) from None


LAYERS = {
    transforms.AffineAutoregressive: AffineAutoregressive,
    transforms.ConditionalAffineAutoregressive: ConditionalAffineAutoregressive,
    transforms.Planar: Planar,
    transforms.ConditionalPlanar: ConditionalPlanar,
}
"""What replaces a class of Pyro."""
OTHERS = {
    kind: "it is no affine transform"
    for kind in (
        transforms.BlockAutoregressive,
        transforms.NeuralAutoregressive,
        transforms.ConditionalNeuralAutoregressive,
        transforms.SplineAutoregressive,
        transforms.ConditionalSplineAutoregressive,
    )
}
"""Classes of the same kind that nothing replaces, and why."""
