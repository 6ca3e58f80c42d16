r"""Flows and bijections as citizens of torch.distributions, and so of what is built on it, as Pyro.

`Flow.distribution` gives a flow at a context as a `Distribution`; `BijectionTransform` makes a
bijection a `Transform`, for `TransformedDistribution`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from fastflow.bijections.base import Bijection, check_bijection, check_features, refuse_context
from fastflow.functional.checks import check_tensors
from fastflow.memo import Memo, tensors_of
from fastflow.overflow import overflowed
from fastflow.transforms import transforms_active

if TYPE_CHECKING:
    from fastflow.flows import Flow


class BijectionTransform(Transform):
    r"""A bijection, at a context if it takes one, as a transform of torch.distributions.

    .. math:: y = f(x; c), \qquad x, y \in \mathbb R^D

    The value and its log-determinant come from one pass, in either direction: the determinant is
    remembered for the `log_abs_det_jacobian` that follows, until it is asked for or until x, y, the
    context or a parameter has changed. (Under torch.compile and function transforms nothing is
    remembered.)

    Arguments:
        bijection: f.
        context: (\*context_batch, C), or None if f takes none. Its batch becomes part of the batch
            shape of a `TransformedDistribution`.
        cache_size: 1 to keep the last pair x, y as well, as other transforms do: `inv` of a value
            is then what the value was made of, unless a parameter has changed or gradients are
            wanted that were not recorded.

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
        self._ladj = Memo()

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        """The transform with a cache of this size: itself, or another of the same bijection."""
        if cache_size == self._cache_size:
            return self
        return type(self)(self.bijection, self.context, cache_size)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if self._may_cache() else self._call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return super()._inv_call(y) if self._may_cache() else self._inverse(y)

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.bijection(x, self.context)
        self._ladj.keep(self._inputs(x, y), (ladj,))
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, ladj = self.bijection.inverse(y, self.context)
        lost = overflowed(x, y, self.context)
        x = torch.where(lost[..., None], torch.inf, x)  # where a base has density 0
        ladj = torch.where(lost, 0, ladj)
        self._ladj.keep(self._inputs(x, y), (-ladj,))
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""log|det dy/dx| of a pair x, y (\*batch, D): shape (\*batch,).

        0 where a finite y has an x that is out of range, and so infinite: a base's density is 0.
        """
        known = self._ladj.recall(self._inputs(x, y))
        if known is None:
            ladj = self.bijection(x, self.context)[1]
            return torch.where(overflowed(x, y, self.context), 0, ladj)
        if not self._cache_size:
            self._ladj.clear()  # it holds on to the graph
        return known[0]

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
        state = self.__dict__ | {"_inv": None, "_ladj": Memo()}
        return state | {"_cached_x_y": (None, None)} if self._cache_size else state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.bijection).__name__})"

    def _inputs(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        yield from (x, y)
        if self.context is not None:
            yield self.context
        yield from tensors_of(self.bijection)

    def _may_cache(self) -> bool:
        """Whether pairs may be kept; one that is stale is forgotten."""
        if not self._cache_size or transforms_active():
            return False
        x, y = self._cached_x_y
        if x is not None and self._ladj.recall(self._inputs(x, y)) is None:
            self._cached_x_y = None, None
        return True


class FlowDistribution(Distribution):
    r"""A flow at a context, as `Flow.distribution` gives it.

    It follows the flow: its parameters, its device and its type are those of the moment of a call.
    The last draw is remembered, so that `log_prob` of it, as inference libraries ask for, takes no
    pass; not if it, the context or a parameter has changed meanwhile, or if gradients are wanted
    that were not recorded.

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

    support = constraints.real_vector

    def __init__(
        self, flow: Flow, context: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        flow.check_context(type(self).__name__, context)
        self.flow, self.context = flow, context
        self._draw = Memo()
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

    def entropy(self) -> Tensor:
        """Raises NotImplementedError: estimate it by -log_prob of samples."""
        raise self._no_closed_form("entropy", "the mean of -log_prob over samples")

    def expand(
        self, batch_shape: Sequence[int], _instance: FlowDistribution | None = None
    ) -> FlowDistribution:
        """The same flow for a larger batch; the context is expanded, not copied."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch = torch.Size(batch_shape)
        context = self.context
        if context is not None:
            context = context.expand(*batch, context.shape[-1])
        new.flow, new.context, new._draw = self.flow, context, Memo()
        super(FlowDistribution, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        r"""The log-density at values (\*batch, D), broadcast against `batch_shape`: (\*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        drawn = self._draw.recall(self._inputs(value))
        if drawn is not None:
            return self.flow.base_log_prob(drawn[0], self.context) - drawn[1]
        log_prob = self.flow.log_prob(value, self.context)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        r"""Draws without gradients, (\*sample_shape, \*batch_shape, D)."""
        with torch.no_grad():
            return self._drawn(sample_shape)[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        r"""Draws with gradients, (\*sample_shape, \*batch_shape, D).

        Raises:
            NotImplementedError: the base distribution cannot be reparametrised.
        """
        return self._drawn(sample_shape, reparametrised=True)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        r"""Draws, (\*sample_shape, \*batch_shape, D), and their log-density, from one pass.

        Raises:
            NotImplementedError: the base distribution cannot be reparametrised.
        """
        x, z, ladj = self._drawn(sample_shape, reparametrised=True)
        return x, self.flow.base_log_prob(z, self.context) - ladj

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_draw": Memo()}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.flow).__name__}, batch_shape: "
            f"{self.batch_shape}, event_shape: {self.event_shape})"
        )

    def _drawn(
        self, sample_shape: Sequence[int], reparametrised: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = torch.Size((*sample_shape, *self.batch_shape))
        z = self.flow.base_sample(shape, reparametrised, self.context)
        x, ladj = self.flow.bijection(z, self.flow._for_bijection(self.context))
        self._draw.keep(self._inputs(x), (z, ladj))
        return x, z, ladj

    def _no_closed_form(self, what: str, estimator: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}: the {what} of a flow has no closed form; estimate it from "
            f"{estimator}"
        )

    def _inputs(self, x: Tensor) -> Iterator[Tensor]:
        yield x
        if self.context is not None:
            yield self.context
        yield from tensors_of(self.flow)


def check_context(owner: str, bijection: Bijection, context: Tensor | None) -> None:
    """Raises unless the context is one that the bijection takes, or None where it takes none."""
    if not bijection.context_features:
        refuse_context(owner, context)
    else:
        check_tensors(owner, context=context)
        check_features(owner, "context", context, bijection.context_features)
