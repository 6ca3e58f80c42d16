"""Distributions built on bijections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from fastflow.bijections.autoregressive import MaskedAffineAutoregressive
from fastflow.bijections.base import Bijection, check_bijection, positive_int, refuse_context
from fastflow.bijections.composition import Chain, Inverse
from fastflow.distributions import FlowDistribution
from fastflow.functional.checks import as_shape, check_tensors
from fastflow.memo import tensors_of
from fastflow.notices import once
from fastflow.scales import Scale

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


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
        check_bijection("Flow", "bijection", bijection)
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
        self.register_load_state_dict_post_hook(_place_anchor)  # assign=True moves parameters

    @property
    def features(self) -> int:
        """D, the number of features of a sample."""
        return self.bijection.features

    @property
    def base(self) -> Distribution:
        """The base distribution; the standard normal follows the module's device and dtype."""
        if self._base is not None:
            return self._base
        zeros = torch.zeros(self.features, dtype=self._anchor.dtype, device=self._anchor.device)
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
        return self.base_log_prob(z) + ladj

    def sample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        r"""Draws without gradients.

        Arguments:
            shape: the sample shape, e.g. (n,), for which n may be written.
            context: (\*context_batch, C), or None.

        Returns:
            x, (\*shape, \*context_batch, D).

        Raises:
            TypeError, ValueError: the shape is none, or the context does not fit.
        """
        with torch.no_grad():
            x, _ = self.bijection(self._draw(shape, context), context)
        return x

    def rsample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        r"""Draws with gradients.

        Arguments:
            shape, context: as in `sample`.

        Returns:
            x, (\*shape, \*context_batch, D).

        Raises:
            TypeError, ValueError: as `sample`.
            NotImplementedError: the base distribution cannot be reparametrised.
        """
        x, _ = self.bijection(self._draw(shape, context, reparametrised=True), context)
        return x

    def rsample_and_log_prob(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draws with gradients, and the log-density of the draws from the same pass.

        Arguments:
            shape, context: as in `sample`.

        Returns:
            x (\*shape, \*context_batch, D) and log p(x | context) (\*shape, \*context_batch).

        Raises:
            TypeError, ValueError, NotImplementedError: as `rsample`.
        """
        z = self._draw(shape, context, reparametrised=True)
        x, ladj = self.bijection(z, context)
        return x, self.base_log_prob(z) - ladj

    def distribution(
        self, context: Tensor | None = None, validate_args: bool | None = None
    ) -> FlowDistribution:
        r"""The flow at a context as an object of torch.distributions, with event shape (D,).

        Arguments:
            context: (\*context_batch, C), or None. Its batch is the batch shape.
            validate_args: as in torch.distributions.

        Raises:
            TypeError, ValueError: the context does not fit; the message says how.

        Example:
            >>> posterior = IAF(3, context_features=2).distribution(torch.randn(8, 2))
            >>> x = posterior.rsample((5,))
            >>> x.shape, posterior.log_prob(x).shape, posterior.expand((4, 8)).batch_shape
            (torch.Size([5, 8, 3]), torch.Size([5, 8]), torch.Size([4, 8]))
        """
        return FlowDistribution(self, context, validate_args)

    def base_log_prob(self, z: Tensor) -> Tensor:
        r"""The log-density of the base distribution at z (\*batch, D): shape (\*batch,)."""
        if self._base is not None:
            return self._base.log_prob(z)
        # a few operations less than by `base`, which also has to be made
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (z * z).sum(-1) * -0.5 - self.features * HALF_LOG_TAU

    def base_sample(self, shape: torch.Size, reparametrised: bool = False) -> Tensor:
        r"""Draws of the base distribution, (\*shape, D)."""
        if self._base is not None:
            return self._base.rsample(shape) if reparametrised else self._base.sample(shape)
        like = {"dtype": self._anchor.dtype, "device": self._anchor.device}
        return torch.randn(*shape, self.features, **like)

    def _draw(
        self, shape: int | Sequence[int], context: Tensor | None, reparametrised: bool = False
    ) -> Tensor:
        shape, batch = as_shape("Flow", "shape", shape), ()
        if context is not None:
            if not self.bijection.context_features:
                refuse_context("Flow", context)
            check_tensors("Flow", context=context)
            batch = context.shape[:-1]
        try:
            return self.base_sample(torch.Size((*shape, *batch)), reparametrised)
        except NotImplementedError:
            if not reparametrised:
                raise
            raise NotImplementedError(
                "Flow: its base distribution cannot be reparametrised (has_rsample is False); "
                "`sample` draws from it without gradients"
            ) from None


class MAF(Flow):
    r"""Masked autoregressive flow: density estimation in one pass, and sampling in one sweep.

    A stack of `MaskedAffineAutoregressive` layers maps data to noise, the direction in which a
    layer computes all features at once. Sampling inverts layer after layer, each for about the
    cost of one pass, so that training by samples (reverse KL) is as cheap as training by data.

    Arguments:
        features: D.
        transforms: the number of layers.
        hidden_features, context_features, activation, residual, scale: of every layer, as in
            `MaskedAffineAutoregressive`.
        order: "alternate" (natural, reversed, natural, ..) or "random" (drawn now for each).
        base: as in `Flow`.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.

    Source:
        Papamakarios, Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation, 2017,
        arXiv 1705.07057.

    Example:
        >>> flow = MAF(3, transforms=2, context_features=4)
        >>> context = torch.randn(8, 4)
        >>> flow.log_prob(torch.randn(8, 3), context).shape, flow.sample((5,), context).shape
        (torch.Size([8]), torch.Size([5, 8, 3]))
    """

    def __init__(
        self,
        features: int,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        order: str = "alternate",
        residual: bool = False,
        scale: str | Scale = "softclip",
        base: Distribution | None = None,
    ) -> None:
        layers = (hidden_features, context_features, activation, residual, scale)
        super().__init__(Inverse(_stack("MAF", features, transforms, order, *layers)), base)


class IAF(Flow):
    r"""Inverse autoregressive flow: sampling in one pass, and the density of data in one sweep.

    A stack of `MaskedAffineAutoregressive` layers maps noise to samples. It is the flow of rich
    posteriors: samples and their densities come from one pass, and the context reaches every
    feature. The density of given points, one inversion of every layer, costs about the same.

    Arguments:
        features: D.
        transforms: the number of layers.
        hidden_features, context_features, activation, residual, scale: of every layer, as in
            `MaskedAffineAutoregressive`; the default scale is the gate of the source.
        order: "alternate" (natural, reversed, natural, ..) or "random" (drawn now for each).
        base: as in `Flow`.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.

    Source:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling, Improving Variational Inference
        with Inverse Autoregressive Flow, 2016, arXiv 1606.04934.

    Example:
        >>> x, log_prob = IAF(3, transforms=2).rsample_and_log_prob((5,))
        >>> x.shape, log_prob.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        transforms: int = 4,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        order: str = "alternate",
        residual: bool = False,
        scale: str | Scale = "gate",
        base: Distribution | None = None,
    ) -> None:
        layers = (hidden_features, context_features, activation, residual, scale)
        super().__init__(_stack("IAF", features, transforms, order, *layers), base)


def _stack(
    owner: str,
    features: int,
    transforms: int,
    order: str,
    hidden_features: Sequence[int],
    context_features: int,
    activation: str,
    residual: bool,
    scale: str | Scale,
) -> Chain:
    if order not in ("alternate", "random"):
        raise ValueError(f"{owner}: order is {order!r}, must be 'alternate' or 'random'")
    count = positive_int(owner, "transforms", transforms)
    orders = (
        ["random"] * count
        if order == "random"
        else [(None, "reverse")[i % 2] for i in range(count)]
    )
    layers = (hidden_features, context_features, activation)
    with once():
        return Chain(
            *(
                MaskedAffineAutoregressive(features, *layers, layer_order, residual, scale)
                for layer_order in orders
            )
        )


def _zero_like(module: nn.Module) -> Tensor:
    """A scalar on the device of the module and, if it holds floating-point tensors, of its type."""
    tensors = tensors_of(module)
    for tensor in tensors:
        if tensor.is_floating_point():
            return torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return torch.zeros((), device=tensors[0].device if tensors else None)


def _place_anchor(flow: Flow, _: object) -> None:
    flow._anchor = _zero_like(flow.bijection)
