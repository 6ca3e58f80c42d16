"""Distributions built on bijections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from fastflow.bijections.base import Bijection, refuse_context
from fastflow.functional.checks import check_tensors


class Flow(nn.Module):
    r"""A bijection as a distribution: x = f(z), with z drawn from a base distribution.

    .. math::
        \log p(x \mid c) = \log p_0(f^{-1}(x; c))
            + \log\left|\det \frac{\partial f^{-1}}{\partial x}(x; c)\right|

    The bijection's `forward` maps base to data, its `inverse` maps data to base.

    Arguments:
        bijection: f.
        base: any torch.distributions object with event shape (D,) and no batch shape; by default a
            standard normal, on the device and in the type of the bijection's parameters, also
            after `flow.to(...)`.

    Raises:
        TypeError: the bijection is not a `fastflow.Bijection`, or the base not a distribution.
        ValueError: the base's event shape is not (D,), or it has a batch shape.

    Source:
        Tabak and Turner, A Family of Nonparametric Density Estimation Algorithms, 2013;
        Rezende and Mohamed, 2015, arXiv 1505.05770.

    Example:
        >>> flow = Flow(PlanarFlow(2, steps=8))
        >>> x = flow.sample((5,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, bijection: Bijection, base: Distribution | None = None) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(
                f"Flow: bijection is a {type(bijection).__name__}, must be a fastflow.Bijection"
            )
        if base is not None:
            if not isinstance(base, Distribution):
                raise TypeError(
                    f"Flow: base is a {type(base).__name__}, must be a torch.distributions object"
                )
            if base.event_shape != (bijection.features,) or base.batch_shape:
                raise ValueError(
                    f"Flow: base has batch shape {tuple(base.batch_shape)} and event shape "
                    f"{tuple(base.event_shape)}, must be () and ({bijection.features},)"
                )
        self.bijection = bijection
        self._base = base
        # carries the device and dtype of the standard normal through .to(), quicker than a search
        self.register_buffer("_anchor", _zero_like(bijection), persistent=False)

    @property
    def features(self) -> int:
        """D, the number of features of a sample."""
        return self.bijection.features

    @property
    def base(self) -> Distribution:
        """The base distribution; the standard normal follows the module's device and dtype."""
        if self._base is not None:
            return self._base
        zeros = self._anchor.new_zeros(self.features)
        return Independent(Normal(zeros, zeros + 1, validate_args=False), 1, validate_args=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`log_prob`, under the name that wrappers such as DistributedDataParallel call."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The log-density at x.

        Arguments:
            x: points, (\*batch, D).
            context: (\*batch, C), broadcast against the batch, or None.

        Returns:
            log p(x | context), (\*batch,).
        """
        z, ladj = self.bijection.inverse(x, context)
        return self.base.log_prob(z) + ladj

    def sample(self, shape: Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        r"""Draws without gradients.

        Arguments:
            shape: the sample shape, e.g. (n,).
            context: (\*context_batch, C), or None.

        Returns:
            x, (\*shape, \*context_batch, D).
        """
        with torch.no_grad():
            x, _ = self.bijection(self._draw(self.base.sample, shape, context), context)
        return x

    def rsample_and_log_prob(
        self, shape: Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draws with gradients, and the log-density of the draws from the same pass.

        Arguments:
            shape: the sample shape, e.g. (n,).
            context: (\*context_batch, C), or None.

        Returns:
            x (\*shape, \*context_batch, D) and log p(x | context) (\*shape, \*context_batch).

        Raises:
            NotImplementedError: the base distribution cannot be reparametrised.
        """
        z = self._draw(self.base.rsample, shape, context)
        x, ladj = self.bijection(z, context)
        return x, self.base.log_prob(z) - ladj

    def _draw(
        self, draw: Callable[[torch.Size], Tensor], shape: Sequence[int], context: Tensor | None
    ) -> Tensor:
        if not isinstance(shape, Sequence):
            raise TypeError(f"Flow: shape is {shape!r}, must be a sequence of integers, e.g. (10,)")
        if context is None:
            return draw(torch.Size(shape))
        if not self.bijection.context_features:
            refuse_context("Flow", context)
        check_tensors("Flow", context=context)
        return draw(torch.Size((*shape, *context.shape[:-1])))


def _zero_like(module: nn.Module) -> Tensor:
    """A scalar on the device of the module and, if it holds floating-point tensors, of its type."""
    tensors = list(chain(module.parameters(), module.buffers()))
    for tensor in tensors:
        if tensor.is_floating_point():
            return tensor.new_zeros(())
    return torch.zeros((), device=tensors[0].device if tensors else None)
