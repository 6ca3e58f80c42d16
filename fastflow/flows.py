"""Distributions built on bijections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from fastflow.bases import check_constant, check_made, moved, takes_context
from fastflow.bijections.autoregressive import MaskedAffineAutoregressive
from fastflow.bijections.base import Bijection, check_bijection, positive_int, refuse_context
from fastflow.bijections.composition import Chain, Inverse
from fastflow.distributions import FlowDistribution, check_context
from fastflow.functional.checks import as_shape, check_tensors
from fastflow.memo import tensors_of
from fastflow.notices import once
from fastflow.overflow import all_finite, may_look, overflowed
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
        base: the distribution of z, with event shape (D,); one of

            - None: a standard normal, on the device and in the type of the bijection's parameters,
              also after `flow.to(...)`.
            - a torch.distributions object without batch shape. Its tensors are constants: they
              move with the flow (the flow then holds a copy), but are no part of its state dict.
            - an nn.Module whose forward returns such an object. It becomes a part of the flow,
              which is trained, moved and saved with it. If its forward takes an argument, that is
              the flow's context (if there is one), and the batch shape of what it makes broadcasts
              to the context's. Modules such as zuko's `UnconditionalDistribution` are of this kind.
            - another `Flow`, which takes the same context, or none.

    Raises:
        TypeError: the bijection is not a `fastflow.Bijection`, or the base none of these.
        ValueError: the base's event shape is not (D,), it has a batch shape, holds tensors with
            gradients, or takes another context than the bijection.

    Note:
        For finite x, context and parameters `log_prob` is never NaN where the bijection's own
        result is a number or out of its type's range: a point that is carried out of range has
        log-density -inf. On CPUs, outside of torch.compile and of function transforms, such a row
        contributes no gradient, so that those of the others are what they are without it; elsewhere
        it may make the gradients of parameters NaN.

    Source:
        Tabak and Turner, A Family of Nonparametric Density Estimation Algorithms, 2013;
        Rezende and Mohamed, 2015, arXiv 1505.05770.

    Example:
        >>> flow = Flow(PlanarFlow(2, steps=8))
        >>> x = flow.sample((5,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    _anchor: Tensor
    _base_takes_context = _base_needs_context = False

    def __init__(self, bijection: Bijection, base: Distribution | nn.Module | None = None) -> None:
        super().__init__()
        check_bijection("Flow", "bijection", bijection)
        self.bijection = bijection
        self._base: Distribution | None = None
        self.base_module: nn.Module | None = None
        self._take_base(base)
        # carries the device and dtype of the standard normal through .to(), quicker than a search
        self.register_buffer("_anchor", _zero_like(bijection), persistent=False)
        self.register_load_state_dict_post_hook(_place_anchor)  # assign=True moves parameters

    @property
    def features(self) -> int:
        """D, the number of features of a sample."""
        return self.bijection.features

    @property
    def base(self) -> Distribution:
        """The base distribution without a context; the standard normal follows the module's device
        and dtype."""
        return self.base_distribution()

    def base_distribution(self, context: Tensor | None = None) -> Distribution:
        r"""The base distribution at a context (\*context_batch, C), if it takes one.

        Raises:
            TypeError, ValueError: a module as base made none, or one of other shapes.
        """
        module = self.base_module
        if module is not None:
            own = context if self._base_takes_context else None
            if isinstance(module, Flow):
                return module.distribution(own)
            if own is None and self._base_needs_context:
                raise TypeError(f"Flow: base {type(module).__name__} needs a context, it is None")
            made = module() if own is None else module(own)
            check_made("Flow", made, self.features, () if own is None else own.shape[:-1])
            return made
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
            log p(x | context), (\*batch,); -inf where a finite point is carried out of range.
        """
        z, ladj = self.bijection.inverse(x, self._for_bijection(context))
        if not may_look(z):
            return self._without_lost(self._lost(z, x, context), z, ladj, context)
        log_prob = None
        # a base given by the user may refuse NaN
        if not self._given_base() or math.isfinite(z.detach().sum().item()):
            log_prob = self.base_log_prob(z, context) + ladj
            if not log_prob.requires_grad:
                sound = torch.equal(log_prob, log_prob)  # no NaN
            else:  # -inf as well: the gradients of such rows overflow
                few = log_prob.dim() == 1 and len(log_prob) <= 32  # an op would take longer
                total = sum(log_prob.tolist()) if few else log_prob.detach().sum().item()
                sound = math.isfinite(total)
            if sound:
                return log_prob
        return self._settled(x, context, z, ladj, log_prob)

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
            x, _ = self.bijection(self._draw(shape, context), self._for_bijection(context))
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
        z = self._draw(shape, context, reparametrised=True)
        x, _ = self.bijection(z, self._for_bijection(context))
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
        if isinstance(self.base_module, Flow):  # whose density would take a pass of its own
            shape = as_shape("Flow", "shape", shape)
            own, more = self._for_base(context)
            z, log_prob = self.base_module.rsample_and_log_prob((*shape, *more), own)
        else:
            z = self._draw(shape, context, reparametrised=True)
            log_prob = self.base_log_prob(z, context)
        x, ladj = self.bijection(z, self._for_bijection(context))
        return x, log_prob - ladj

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

    def base_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The log-density of the base distribution at z (\*batch, D): shape (\*batch,)."""
        if self._given_base():
            return self.base_distribution(context).log_prob(z)
        # a few operations less than by `base`, which also has to be made
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (z * z).sum(-1) * -0.5 - self.features * HALF_LOG_TAU

    def base_sample(
        self, shape: torch.Size, reparametrised: bool = False, context: Tensor | None = None
    ) -> Tensor:
        r"""Draws of the base distribution, (\*shape, D); shape ends in the context's batch."""
        if not self._given_base():
            like = {"dtype": self._anchor.dtype, "device": self._anchor.device}
            return torch.randn(*shape, self.features, **like)
        law = self.base_distribution(context)
        if self._base_takes_context and context is not None:
            batch = context.shape[:-1]
            law = law if law.batch_shape == batch else law.expand(batch)
            shape = shape[: len(shape) - len(batch)]
        return law.rsample(shape) if reparametrised else law.sample(shape)

    def check_context(self, owner: str, context: Tensor | None) -> None:
        """Raises TypeError or ValueError unless the context is one that the flow takes, or None."""
        if self.bijection.context_features or not self._base_takes_context:
            check_context(owner, self.bijection, context)
        elif context is not None:
            check_tensors(owner, context=context)
        if isinstance(self.base_module, Flow):
            self.base_module.check_context(owner, self._for_base(context)[0])

    def _given_base(self) -> bool:
        return self._base is not None or self._modules.get("base_module") is not None

    def _take_base(self, base: Distribution | nn.Module | None) -> None:
        features = self.features
        if isinstance(base, nn.Module):
            self.base_module = base
            self._base_takes_context, self._base_needs_context = takes_context(base)
            if isinstance(base, Flow):
                sizes = base.bijection.context_features, self.bijection.context_features
                if base.features != features or (all(sizes) and sizes[0] != sizes[1]):
                    raise ValueError(
                        f"Flow: base has {base.features} features and takes a context of "
                        f"{sizes[0]}, must be {features} and {sizes[1]}, or no context"
                    )
                self._base_takes_context = sizes[0] > 0 or base._base_takes_context
            return
        if base is None:
            return
        if not isinstance(base, Distribution):
            raise TypeError(
                f"Flow: base is a {type(base).__name__}, must be a torch.distributions object or "
                "an nn.Module that makes one"
            )
        if base.event_shape != (features,) or base.batch_shape:
            raise ValueError(
                f"Flow: base has batch shape {tuple(base.batch_shape)} and event shape "
                f"{tuple(base.event_shape)}, must be () and ({features},)"
            )
        check_constant("Flow", base)
        self._base = base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Flow:
        super()._apply(fn, recurse)
        if self._base is not None:
            self._base = moved(self._base, fn)
        return self

    def _for_bijection(self, context: Tensor | None) -> Tensor | None:
        """What the bijection gets of the context: all of it, unless it is for the base alone."""
        if self._base_takes_context and not self.bijection.context_features:
            return None
        return context

    def _for_base(self, context: Tensor | None) -> tuple[Tensor | None, torch.Size]:
        """What the base gets of the context, and the batch of draws where that is nothing."""
        if context is None or self._base_takes_context:
            return context, torch.Size()
        return None, context.shape[:-1]

    def _lost(self, z: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Which rows were carried out of range, (*batch,)."""
        if not self._given_base():
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            z = z * z  # as the density does
        return overflowed(z.detach(), x, context)

    def _without_lost(
        self, lost: Tensor, z: Tensor, ladj: Tensor, context: Tensor | None
    ) -> Tensor:
        """log p with -inf in the lost rows, which the base does not get to see."""
        log_prob = self.base_log_prob(torch.where(lost[..., None], 0, z), context) + ladj
        return torch.where(lost, -math.inf, log_prob)

    def _settled(
        self,
        x: Tensor,
        context: Tensor | None,
        z: Tensor,
        ladj: Tensor,
        log_prob: Tensor | None,
    ) -> Tensor:
        """log p where some rows may be lost; `log_prob` is what it is without that, if known."""
        lost = self._lost(z, x, context)
        if lost.any() and all_finite(tensors_of(self)):
            if not (ladj.requires_grad or z.requires_grad):
                return self._without_lost(lost, z, ladj, context)
            # once more without the lost rows: zero cotangents times infinities would be NaN
            kept = ~lost
            x = x.expand(*lost.shape, x.shape[-1])[kept]
            if context is not None:
                context = context.expand(*lost.shape, context.shape[-1])[kept]
            z, ladj = self.bijection.inverse(x, self._for_bijection(context))
            # of no rows some distributions have no density
            some = z.sum(-1) if not len(z) else self.base_log_prob(z, context)
            some = some + ladj
            return some.new_full(lost.shape, -math.inf).index_put((kept,), some)
        return self.base_log_prob(z, context) + ladj if log_prob is None else log_prob

    def _draw(
        self, shape: int | Sequence[int], context: Tensor | None, reparametrised: bool = False
    ) -> Tensor:
        shape, batch = as_shape("Flow", "shape", shape), ()
        if context is not None:
            if not (self.bijection.context_features or self._base_takes_context):
                refuse_context("Flow", context)
            check_tensors("Flow", context=context)
            batch = context.shape[:-1]
        try:
            return self.base_sample(torch.Size((*shape, *batch)), reparametrised, context)
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
    However deep, it starts near the base.

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
        base: Distribution | nn.Module | None = None,
    ) -> None:
        layers = (hidden_features, context_features, activation, residual, scale)
        super().__init__(Inverse(_stack("MAF", features, transforms, order, *layers)), base)


class IAF(Flow):
    r"""Inverse autoregressive flow: sampling in one pass, and the density of data in one sweep.

    A stack of `MaskedAffineAutoregressive` layers maps noise to samples. It is the flow of rich
    posteriors: samples and their densities come from one pass, and the context reaches every
    feature. The density of given points, one inversion of every layer, costs about the same.
    However deep, it starts near the base: all gates together forget as much as one alone would.

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
        base: Distribution | nn.Module | None = None,
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
                MaskedAffineAutoregressive(
                    features, *layers, layer_order, residual, scale, depth=count
                )
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
