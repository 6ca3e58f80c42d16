r"""How an affine autoregressive layer makes a positive scale of a network's output.

Every map is a small object: with a the network's raw output and m its shift, the layer is
:math:`y = s\,x + m` and contributes :math:`l = \log s` to the log-determinant, except for `Gate`,
which mixes: :math:`y = s\,x + (1 - s)\,m`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Scale:
    """A scale map; kernels know it by its number and two constants."""

    number: ClassVar[int]

    @property
    def constants(self) -> tuple[float, float]:
        """The two constants c0, c1 of the formula."""
        raise NotImplementedError

    def start(self, depth: int) -> float:
        """The raw scale a with which the layers of a flow of this depth start: s = 1 if it can be.

        Maps that stay below 1 (nearly) start at s(0) ** (1 / depth), so that `depth` of them scale
        by s(0).
        """
        return 0.0


@dataclass(frozen=True)
class SoftClip(Scale):
    r""":math:`l = a / (1 + |a / \ln \mathrm{slope}|)`, so that slope < s < 1 / slope.

    Its gradient vanishes nowhere. It is zuko's map.

    Arguments:
        slope: at least 1e-35, below 1.
    """

    slope: float = 1e-3
    number = 0

    def __post_init__(self) -> None:
        if not 1e-35 <= self.slope < 1:  # 1 / slope is a float32
            raise ValueError(f"SoftClip: slope is {self.slope}, must be at least 1e-35, below 1")

    @property
    def constants(self) -> tuple[float, float]:
        return math.log(self.slope), 0.0


@dataclass(frozen=True)
class Softplus(Scale):
    r""":math:`s = \operatorname{softplus}(a + \mathrm{offset}) + \mathrm{minimum}`.

    Arguments:
        offset: by default such that s = 1 at a = 0; with 0 it is nflows' map.
        minimum: the smallest scale, between 0 and 1.
    """

    offset: float | None = None
    minimum: float = 1e-3
    number = 1

    def __post_init__(self) -> None:
        if not 0 < self.minimum < 1:
            raise ValueError(f"Softplus: minimum is {self.minimum}, must be between 0 and 1")
        if self.offset is None:  # the inverse of softplus at 1 - minimum
            object.__setattr__(self, "offset", math.log(math.expm1(1 - self.minimum)))

    @property
    def constants(self) -> tuple[float, float]:
        return self.offset, self.minimum  # pyright: ignore[reportReturnType]  # it is never None

    def start(self, depth: int) -> float:
        return math.log(math.expm1(1 - self.minimum)) - self.constants[0]


@dataclass(frozen=True)
class Sigmoid(Scale):
    r""":math:`s = \sigma(a + \mathrm{offset}) + \mathrm{minimum}`; normflows' map.

    Arguments:
        offset: the scale at a = 0 is sigmoid(offset) + minimum.
        minimum: the smallest scale, positive.
    """

    offset: float = 2.0
    minimum: float = 1e-3
    number = 2

    def __post_init__(self) -> None:
        if not self.minimum > 0:
            raise ValueError(f"Sigmoid: minimum is {self.minimum}, must be positive")

    @property
    def constants(self) -> tuple[float, float]:
        return self.offset, self.minimum

    def start(self, depth: int) -> float:
        s = math.exp(_log_sigmoid(self.offset)) + self.minimum
        if not self.minimum < s < 1:  # to rounding
            return 0.0
        return _share(math.log(s), depth, self.minimum) - self.offset


@dataclass(frozen=True)
class Clamp(Scale):
    r""":math:`l = \operatorname{clamp}(a, \mathrm{low}, \mathrm{high})`; Pyro's map.

    The derivative of l is taken as 1 everywhere (straight-through), so that it never dies.

    Arguments:
        low, high: the bounds of the log-scale, between -80 and 80.
    """

    low: float = -5.0
    high: float = 3.0
    number = 3

    def __post_init__(self) -> None:
        if not -80 <= self.low < self.high <= 80:  # exp of either is a float32
            raise ValueError(
                f"Clamp: low and high are {self.low} and {self.high}, must be ascending and "
                "between -80 and 80"
            )

    @property
    def constants(self) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True)
class Gate(Scale):
    r""":math:`s = \sigma(a + \mathrm{bias}),\ y = s\,x + (1 - s)\,m`, the gate of IAF.

    Arguments:
        bias: a positive one starts with the gate open, near the identity.

    Source:
        Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016,
        arXiv 1606.04934.
    """

    bias: float = 1.5
    number = 4

    @property
    def constants(self) -> tuple[float, float]:
        return self.bias, 0.0

    def start(self, depth: int) -> float:
        log_s = _log_sigmoid(self.bias)
        return _share(log_s, depth) - self.bias if -700 < log_s < 0 else 0.0


def _share(log_scale: float, depth: int, extra: float = 0.0) -> float:
    """The logit of exp(log_scale / depth) - extra; 0 <= extra < exp(log_scale) < 1."""
    p = math.exp(log_scale / depth) - extra
    rest = extra - math.expm1(log_scale / depth)  # 1 - p, with all its digits
    return math.log(p / rest)


def _log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


NAMES = {
    "softclip": SoftClip,
    "softplus": Softplus,
    "sigmoid": Sigmoid,
    "clamp": Clamp,
    "gate": Gate,
}


def scale_map(owner: str, scale: str | Scale) -> Scale:
    """The scale map, or the default one of that name.

    Raises:
        TypeError: it is neither a name nor a `Scale`.
        ValueError: there is none of that name.
    """
    if isinstance(scale, Scale):
        return scale
    if not isinstance(scale, str):
        raise TypeError(f"{owner}: scale is {scale!r}, must be a name or a fastflow.scales.Scale")
    if scale not in NAMES:
        raise ValueError(f"{owner}: scale is {scale!r}, must be one of {', '.join(NAMES)}")
    return NAMES[scale]()
