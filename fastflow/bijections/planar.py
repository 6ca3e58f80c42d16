"""Planar flows as layers: learned parameters, or parameters that a network makes of a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastflow.bijections.base import (
    Bijection,
    check_features,
    positive_int,
    refuse_context,
)
from fastflow.functional.checks import broadcast_batches, check_tensors
from fastflow.functional.planar_flow import check_constraint, planar_flow, planar_flow_inverse

OWNER = "ConditionalPlanarFlow"


class PlanarFlow(Bijection):
    r"""A chain of K planar steps with learned parameters shared by all rows.

    .. math::
        z_k = z_{k-1} + \hat u_k \tanh(w_k^\top z_{k-1} + b_k), \qquad
        \mathrm{ladj} = \sum_k \log\left(1 + \operatorname{sech}^2(a_k)\, w_k^\top \hat u_k\right)

    It starts near the identity: w has rows of length 1, b = 0, and u is such that
    :math:`\hat u_k` is small (at w·u = ln(e - 1) under "paper", at w·u = 0 under "centred",
    :math:`w^\top \hat u = 0`).

    Arguments:
        features: D.
        steps: K.
        constraint: "paper" or "centred", see `fastflow.functional.planar_flow`.

    Attributes:
        w, u: (K, D). b: (K,).

    Raises:
        TypeError, ValueError: an argument is not a positive integer or not a known constraint.

    Source:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015, arXiv 1505.05770.

    Example:
        >>> flow = PlanarFlow(64, steps=16)
        >>> x = torch.randn(8, 64)
        >>> y, ladj = flow(x)
        >>> torch.allclose(flow.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(self, features: int, steps: int = 1, constraint: str = "paper") -> None:
        super().__init__()
        self.features = positive_int("PlanarFlow", "features", features)
        self.steps = positive_int("PlanarFlow", "steps", steps)
        self.constraint = check_constraint("PlanarFlow", constraint)
        self.w = nn.Parameter(torch.empty(steps, features))
        self.u = nn.Parameter(torch.empty(steps, features))
        self.b = nn.Parameter(torch.empty(steps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, near the identity."""
        with torch.no_grad():
            self.w.copy_(nnf.normalize(torch.randn_like(self.w), dim=-1))
            self.u.normal_(0, 0.01 / math.sqrt(self.features))
            self.u += identity_direction(self.w, self.constraint)
            self.b.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        refuse_context("PlanarFlow", context)
        return planar_flow(x, self.w, self.u, self.b, self.constraint)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        refuse_context("PlanarFlow", context)
        return planar_flow_inverse(y, self.w, self.u, self.b, self.constraint)

    def extra_repr(self) -> str:
        return f"features={self.features}, steps={self.steps}, constraint={self.constraint!r}"


class ConditionalPlanarFlow(Bijection):
    r"""A chain of K planar steps whose parameters a network makes of the context.

    .. math:: (w_k, u_k, b_k)_{k=1}^{K} = \mathrm{net}(c), \qquad w_k, u_k \in \mathbb R^D

    The network is a multilayer perceptron (ELU) whose last layer starts small around a draw of w:
    the chain starts near the identity for every context, each step along another direction.

    Arguments:
        features: D.
        context_features: C.
        steps: K.
        hidden_features: widths of the hidden layers; () is an affine map of the context.
        constraint: "paper" or "centred", see `fastflow.functional.planar_flow`.

    Raises:
        TypeError, ValueError: an argument is not a positive integer or not a known constraint.

    Source:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015, arXiv 1505.05770.

    Example:
        >>> flow = ConditionalPlanarFlow(2, context_features=5, steps=3, hidden_features=(32,))
        >>> y, ladj = flow(torch.zeros(8, 2), torch.randn(8, 5))
        >>> y.shape, ladj.shape
        (torch.Size([8, 2]), torch.Size([8]))
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        steps: int = 1,
        hidden_features: Sequence[int] = (),
        constraint: str = "paper",
    ) -> None:
        super().__init__()
        self.features = positive_int(OWNER, "features", features)
        self.context_features = positive_int(OWNER, "context_features", context_features)
        self.steps = positive_int(OWNER, "steps", steps)
        self.constraint = check_constraint(OWNER, constraint)
        if not isinstance(hidden_features, Sequence):
            raise TypeError(f"{OWNER}: hidden_features is {hidden_features!r}, must be a sequence")
        widths = [self.context_features]
        widths += [positive_int(OWNER, "hidden_features", width) for width in hidden_features]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ELU()]
        layers.append(_ChainParameters(widths[-1], self.features, self.steps, self.constraint))
        self.network = nn.Sequential(*layers)

    def reset_parameters(self) -> None:
        """Draws the parameters anew, near the identity."""
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def parameters_of(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The chain's parameters at a context.

        Arguments:
            context: (\*batch, C).

        Returns:
            w, u (\*batch, K, D) and b (\*batch, K), in the type to which those of context and
            parameters are promoted.

        Raises:
            TypeError: the context is not a floating-point tensor.
            ValueError: its last dimension is not of size C.
        """
        check_tensors(OWNER, context=context)
        dtype = torch.promote_types(context.dtype, self._type(context))
        w, u, b = (one.to(dtype) for one in self._made(context, dtype))
        return w, u, b

    def _type(self, context: Tensor) -> torch.dtype:
        """The type of the parameters; that of the context where tools replaced the last layer."""
        weight = getattr(self.network[-1], "weight", None)
        return weight.dtype if isinstance(weight, Tensor) else context.dtype

    def _made(self, context: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The chain's parameters, computed in a type, in float32 at least."""
        check_features(OWNER, "context", context, self.context_features)
        compute, own = torch.promote_types(dtype, torch.float32), self._type(context)
        if context.dtype == own == compute:
            made = self.network(context)
        elif any(one.is_floating_point() for one in self.network.buffers()):
            made = self.network(context.to(own)).to(compute)  # hooks may refuse a mix
        else:
            cast = {name: one.to(compute) for name, one in self.network.named_parameters()}
            made = torch.func.functional_call(self.network, cast, context.to(compute))
        size = self.steps * self.features
        w, u, b = made.split([size, size, self.steps], dim=-1)
        shape = (self.steps, self.features)
        return w.unflatten(-1, shape), u.unflatten(-1, shape), b

    def _run(self, op: Callable, name: str, points: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        check_tensors(OWNER, **{name: points, "context": context})
        broadcast_batches(OWNER, **{name: points.shape[:-1], "context": context.shape[:-1]})
        dtype = self._type(context)
        if points.dtype != dtype or context.dtype != dtype:
            for tensor in (points, context):
                dtype = torch.promote_types(dtype, tensor.dtype)
        image, ladj = op(points, *self._made(context, dtype), self.constraint)
        return image.to(dtype), ladj

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(planar_flow, "x", x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(planar_flow_inverse, "y", y, context)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"steps={self.steps}, constraint={self.constraint!r}"
        )


class _ChainParameters(nn.Linear):
    """The layer that makes the parameters (w, u, b) of a chain: small, around a draw of them."""

    def __init__(self, in_features: int, features: int, steps: int, constraint: str) -> None:
        self.chain = (steps, features, constraint)  # before the parameters are drawn
        super().__init__(in_features, steps * (2 * features + 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        steps, features, constraint = self.chain
        w = nnf.normalize(torch.randn(steps, features), dim=-1)
        u = identity_direction(w, constraint)
        with torch.no_grad():
            self.weight.mul_(0.01)
            self.bias.copy_(torch.cat([w.flatten(), u.flatten(), torch.zeros(steps)]))


def identity_direction(w: Tensor, constraint: str) -> Tensor:
    """The u (K, D) parallel to w (K, D) for which u_hat = 0, so that the step is the identity."""
    if constraint == "centred":
        return torch.zeros_like(w)
    return math.log(math.e - 1) * w / w.square().sum(-1, keepdim=True)
