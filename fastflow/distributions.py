r"""Flows and bijections as citizens of torch.distributions, and so of what is built on it, as Pyro.

`Flow.distribution` gives a flow at a context as a `Distribution`; `BijectionTransform` makes a
bijection a `Transform`, for `TransformedDistribution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from fastflow.bijections.base import Bijection, check_bijection, check_features, refuse_context
from fastflow.functional.checks import as_shape, check_tensors
from fastflow.overflow import overflowed

if TYPE_CHECKING:
    from fastflow.flows import Flow


class BijectionTransform(Transform):
    r"""A bijection, at a context if it takes one, as a transform of torch.distributions.

    .. math:: y = f(x; c), \qquad x, y \in \mathbb R^D

    Nothing is remembered, so that nothing is stale after a change of a parameter, the context or a
    point, and every value has the gradients that PyTorch would give it. A value and its
    log-determinant take one pass each; `Flow.rsample_and_log_prob` gives both of one.

    Arguments:
        bijection: f.
        context: (\*context_batch, C), or None if f takes none. Its batch becomes part of the batch
            shape of a `TransformedDistribution`.
        cache_size: 0 or 1, as other transforms take it. It changes nothing: `inv` of a value is
            always computed, for no cache would see every change of a parameter.

    Raises:
        TypeError: the bijection is none, or the context is missing, no tensor, or not taken.
        ValueError: the context has not C features.

    Example:
        >>> flow = MAF(3, transforms=2)
        >>> given = BijectionTransform(flow.bijection)
        >>> law = torch.distributions.TransformedDistribution(flow.base, given)
        >>> x = law.sample((5,))
        >>> torch.allclose(law.log_prob(x), flow.log_prob(x), atol=1e-5)
        True
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(
        self, bijection: Bijection, context: Tensor | None = None, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size)
        owner = type(self).__name__
        check_bijection(owner, "bijection", bijection)
        check_context(owner, bijection, context)
        self.bijection, self.context = bijection, context

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        """The transform with a cache of this size: itself, or another of the same bijection."""
        if cache_size == self._cache_size:
            return self
        return type(self)(self.bijection, self.context, cache_size)

    @property
    def inv(self) -> Transform:
        """The inverse as a transform; its own `inv` is this transform."""
        if self._inv is None:
            self._inv = InverseBijectionTransform(self)
        return self._inv

    def __call__(self, x: Tensor) -> Tensor:
        return self.bijection(x, self.context)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        x = self.bijection.inverse(y, self.context)[0]
        lost = overflowed(x, y, self.context)
        return torch.where(lost[..., None], torch.inf, x)  # where a base has density 0

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""log|det dy/dx| of a pair x, y (\*batch, D), computed from x: shape (\*batch,).

        0 where a finite y has an x that is out of range, or so large that the way back is: a base's
        density is 0 there.
        """
        ladj = self.bijection(x, self.context)[1]
        lost = overflowed(x, y, self.context) | overflowed(ladj[..., None], y, self.context)
        return torch.where(lost, 0, ladj)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of y for one of x: the batch of the context is broadcast with its own."""
        if not shape or shape[-1] != self.bijection.features:
            raise ValueError(
                f"{type(self).__name__}: shape is {tuple(shape)}, must be "
                f"(..., {self.bijection.features})"
            )
        batch = () if self.context is None else self.context.shape[:-1]
        return torch.Size((*torch.broadcast_shapes(shape[:-1], batch), shape[-1]))

    inverse_shape = forward_shape

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch's own leaves the inverse out, which copies then lack

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.bijection).__name__})"


class InverseBijectionTransform(_InverseTransform):
    """The inverse of a `BijectionTransform`, which copies and pickles as that does."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch's own leaves out what it is the inverse of


class FlowDistribution(Distribution):
    r"""A flow at a context, as `Flow.distribution` gives it.

    It follows the flow: its parameters, its device and its type are those of the moment of a call.
    Nothing is remembered: `log_prob` inverts the flow at whatever it is given, also at what was
    just drawn, with gradients of parameters and points. Draws together with their density take one
    pass by `rsample_and_log_prob`.

    Arguments:
        flow: p(x | c).
        context: (\*context_batch, C), or None if the flow takes none.
        validate_args: whether the context and values must be free of NaN and values must fit; by
            default as `Distribution.set_default_validate_args` says.

    Attributes:
        batch_shape: context_batch, or what `expand` made of it.
        event_shape: (D,).

    Raises:
        TypeError: the context is missing, no tensor, or not taken.
        ValueError: it has not C features, or holds NaN.
    """

    support = constraints.real_vector  # pyright: ignore[reportAssignmentType]

    def __init__(
        self, flow: Flow, context: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        flow.check_context(type(self).__name__, context)
        self.flow, self.context = flow, context
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size((flow.features,)), validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """The context holds numbers."""
        return {} if self.context is None else {"context": constraints.real_vector}

    @property
    def has_rsample(self) -> bool:
        """Whether the base distribution can be reparametrised."""
        return self.flow.base_distribution(self.context).has_rsample

    @property
    def mean(self) -> Tensor:
        """Raises NotImplementedError: estimate it from samples."""
        raise self._no_closed_form("mean", "samples")

    @property
    def variance(self) -> Tensor:
        """Raises NotImplementedError: estimate it from samples."""
        raise self._no_closed_form("variance", "samples")

    @property
    def mode(self) -> Tensor:
        """Raises NotImplementedError: search for it by gradients of log_prob."""
        raise self._no_closed_form("mode", "samples, and climb log_prob from the best of them")

    def entropy(self) -> Tensor:
        """Raises NotImplementedError: estimate it by -log_prob of samples."""
        raise self._no_closed_form("entropy", "the mean of -log_prob over samples")

    def cdf(self, value: Tensor) -> Tensor:
        """Raises NotImplementedError: estimate it from samples."""
        raise self._no_closed_form("cdf", "the share of samples below the value")

    def icdf(self, value: Tensor) -> Tensor:
        """Raises NotImplementedError: estimate quantiles of each feature from samples."""
        raise self._no_closed_form("icdf", "quantiles of samples, feature by feature")

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Raises NotImplementedError: the support is no finite set."""
        raise NotImplementedError(
            f"{type(self).__name__}: the support of a flow is continuous and cannot be enumerated; "
            "draw samples"
        )

    def expand(
        self, batch_shape: Sequence[int], _instance: FlowDistribution | None = None
    ) -> FlowDistribution:
        """The same flow for a larger batch; the context is expanded, not copied."""
        new: FlowDistribution = self._get_checked_instance(FlowDistribution, _instance)  # pyright: ignore[reportAssignmentType]
        batch = torch.Size(as_shape(type(self).__name__, "batch_shape", batch_shape))
        context = self.context
        if context is not None:
            context = context.expand(*batch, context.shape[-1])
        new.flow, new.context = self.flow, context
        super(FlowDistribution, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        r"""The log-density at values (\*batch, D), broadcast against `batch_shape`: (\*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.flow.log_prob(value, self.context)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        r"""Draws without gradients, (\*sample_shape, \*batch_shape, D).

        Arguments:
            sample_shape: e.g. (10,); one integer n is (n,).

        Raises:
            TypeError, ValueError: the sample shape is none.
        """
        return self.flow.sample(self._shape(sample_shape), self.context)

    def rsample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        r"""Draws with gradients, (\*sample_shape, \*batch_shape, D).

        Raises:
            TypeError, ValueError: as `sample`.
            NotImplementedError: the base distribution cannot be reparametrised.
        """
        return self.flow.rsample(self._shape(sample_shape), self.context)

    def rsample_and_log_prob(self, sample_shape: int | Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        r"""Draws, (\*sample_shape, \*batch_shape, D), and their log-density, from one pass.

        Raises:
            TypeError, ValueError, NotImplementedError: as `rsample`.
        """
        return self.flow.rsample_and_log_prob(self._shape(sample_shape), self.context)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.flow).__name__}, batch_shape: "
            f"{self.batch_shape}, event_shape: {self.event_shape})"
        )

    def _shape(self, sample_shape: int | Sequence[int]) -> tuple[int, ...]:
        """The shape to ask the flow for; a context brings the batch shape itself."""
        shape = as_shape(type(self).__name__, "sample_shape", sample_shape)
        return shape if self.context is not None else (*shape, *self.batch_shape)

    def _no_closed_form(self, what: str, estimator: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}: the {what} of a flow has no closed form; estimate it from "
            f"{estimator}"
        )


def check_context(owner: str, bijection: Bijection, context: Tensor | None) -> None:
    """Raises unless the context is one that the bijection takes, or None where it takes none."""
    if not bijection.context_features:
        refuse_context(owner, context)
    else:
        check_tensors(owner, context=context)
        check_features(owner, "context", context, bijection.context_features)
