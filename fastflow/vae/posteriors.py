"""Approximate posteriors q(z | x): what the encoder's features h become.

A posterior is called with the features and with standard normal noise, and returns the draw that
the noise becomes, so that a caller decides about random numbers and about the number of samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.bijections import Bijection
from fastflow.overflow import overflowed
from fastflow.vae.objectives import (
    diagonal_normal_log_prob,
    gaussian_kl,
    standard_normal_log_prob,
)


class Draw(NamedTuple):
    """Draws of a posterior and what the objective needs to know about them."""

    z: Tensor  # (*samples, B, D)
    log_q: Tensor  # log q(z | x), (*samples, B)
    kl: Tensor  # KL(q || p) (B,) if known in closed form, else its estimate (*samples, B)


class Posterior(nn.Module):
    """What the model, the evaluation and the plots ask of a posterior."""

    latent: int  # D

    def forward(self, h: Tensor, noise: Tensor) -> Draw:
        """Draws z from features h (B, H) and standard normal noise (*samples, B, D)."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        """log q(z | x), shape (*samples, B), at any z (*samples, B, D); no NaN where z and h are
        finite: -inf where the density is 0 to rounding."""
        raise NotImplementedError


class GaussianPosterior(Posterior):
    r"""A diagonal normal whose mean and log-variance are linear in the encoder's features.

    .. math:: q(z | x) = N(z; \mu(x), \sigma^2(x)), \qquad z = \mu + \sigma \epsilon

    Its KL from the prior is the closed form of `gaussian_kl`.

    Arguments:
        in_features: H, the number of features of the encoder.
        latent: D, the number of latent variables.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> posterior = GaussianPosterior(in_features=16, latent=2)
        >>> z, log_q, kl = posterior(torch.randn(5, 16), torch.randn(10, 5, 2))
        >>> z.shape, log_q.shape, kl.shape
        (torch.Size([10, 5, 2]), torch.Size([10, 5]), torch.Size([5]))
    """

    def __init__(self, in_features: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.mean = nn.Linear(in_features, latent)
        self.log_var = nn.Linear(in_features, latent)

    def forward(self, h: Tensor, noise: Tensor) -> Draw:
        mean, log_var = self.mean(h), self.log_var(h)
        z, log_q = _reparametrise(mean, log_var, noise)
        return Draw(z, log_q, gaussian_kl(mean, log_var))

    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        return diagonal_normal_log_prob(z, self.mean(h), self.log_var(h))


class FlowPosterior(GaussianPosterior):
    r"""A diagonal normal carried through a bijection f, conditioned on the image where f can be.

    .. math:: z_0 = \mu + \sigma \epsilon, \qquad z = f(z_0; c), \qquad
        \log q(z | x) = \log N(z_0; \mu, \sigma^2) - \log|\det \partial f / \partial z_0|

    The context c is the encoder's features h if f takes one of their size, and otherwise a dense
    layer of them, elu(W h + b). The density at any z is that of the inverse.

    Arguments:
        in_features: H, the number of features of the encoder.
        bijection: f, any `fastflow.Bijection` of D features.

    Source: Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015.

    Example:
        >>> import fastflow
        >>> flow = fastflow.ConditionalPlanarFlow(2, context_features=16, steps=3)
        >>> posterior = FlowPosterior(in_features=16, bijection=flow)
        >>> z, log_q, kl = posterior(torch.randn(5, 16), torch.randn(10, 5, 2))
        >>> z.shape, log_q.shape, kl.shape
        (torch.Size([10, 5, 2]), torch.Size([10, 5]), torch.Size([10, 5]))
    """

    def __init__(self, in_features: int, bijection: Bijection) -> None:
        super().__init__(in_features, bijection.features)
        self.bijection = bijection
        self.context = None
        if bijection.context_features not in (0, in_features):
            self.context = nn.Sequential(
                nn.Linear(in_features, bijection.context_features), nn.ELU()
            )

    def forward(self, h: Tensor, noise: Tensor) -> Draw:
        z_0, log_q0 = _reparametrise(self.mean(h), self.log_var(h), noise)
        z, ladj = self.bijection(z_0, self._context_of(h))
        log_q = log_q0 - ladj
        return Draw(z, log_q, log_q - standard_normal_log_prob(z))

    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        context = self._context_of(h)
        z_0, ladj = self.bijection.inverse(z, context)
        lost = overflowed(z_0, z, h)  # their density is 0 to rounding
        log_prob = self.base_log_prob(torch.where(lost[..., None], 0, z_0), h) + ladj
        return torch.where(lost, -math.inf, log_prob)

    def base_draw(self, h: Tensor, noise: Tensor) -> Tensor:
        """z_0, the draw before the bijection, shape (*samples, B, D)."""
        return super().forward(h, noise).z

    def base_log_prob(self, z_0: Tensor, h: Tensor) -> Tensor:
        """log q_0(z_0 | x), the density before the bijection, shape (*samples, B)."""
        return super().log_prob(z_0, h)

    def _context_of(self, h: Tensor) -> Tensor | None:
        if not self.bijection.context_features:
            return None
        return h if self.context is None else self.context(h)


def _reparametrise(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z_0 = mean + sigma noise, and log q_0(z_0) from the noise itself: (z_0 - mean) / sigma would
    lose the digits that a small sigma leaves below those of the mean."""
    z_0 = mean + torch.exp(0.5 * log_var) * noise
    return z_0, standard_normal_log_prob(noise) - 0.5 * log_var.sum(-1)
