"""Approximate posteriors q(z | x): what the encoder's features h become.

A posterior is called with the features and with standard normal noise, and returns the draw that
the noise becomes, so that a caller decides about random numbers and about the number of samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastflow import PlanarFlow
from fastflow.bijections.planar import identity_direction
from fastflow.functional import planar_flow, planar_flow_inverse
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
        """log q(z | x), shape (*samples, B), at any z (*samples, B, D)."""
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


class PlanarPosterior(Posterior):
    r"""A diagonal normal carried through a chain of K planar steps.

    .. math:: z_0 = \mu + \sigma \epsilon, \qquad z_k = f_k(z_{k-1}), \qquad
        \log q(z_K | x) = \log N(z_0; \mu, \sigma^2)
            - \sum_k \log|\det \partial f_k / \partial z_{k-1}|

    The steps are those of `fastflow.functional.planar_flow`. Amortised, their parameters are linear
    in the encoder's features, so that every image has a flow of its own; shared, they are plain
    parameters, one flow for all images.

    Arguments:
        in_features: H, the number of features of the encoder.
        latent: D, the number of latent variables.
        steps: K.
        amortised: whether the encoder emits w, u (K, D) and b (K,) per image.
        constraint: what keeps a step invertible, see `fastflow.functional.planar_flow`.

    Source: Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015.

    Example:
        >>> posterior = PlanarPosterior(in_features=16, latent=2, steps=3)
        >>> z, log_q, kl = posterior(torch.randn(5, 16), torch.randn(10, 5, 2))
        >>> z.shape, log_q.shape, kl.shape
        (torch.Size([10, 5, 2]), torch.Size([10, 5]), torch.Size([10, 5]))
    """

    def __init__(
        self,
        in_features: int,
        latent: int,
        steps: int = 3,
        amortised: bool = True,
        constraint: str = "paper",
    ) -> None:
        super().__init__()
        self.latent = latent
        self.steps = steps
        self.amortised = amortised
        self.constraint = constraint
        self.mean = nn.Linear(in_features, latent)
        self.log_var = nn.Linear(in_features, latent)
        if amortised:
            self.w = nn.Linear(in_features, steps * latent)
            self.u = nn.Linear(in_features, steps * latent)
            self.b = nn.Linear(in_features, steps)
            self._start_near_identity()
        else:
            self.flow = PlanarFlow(latent, steps, constraint)

    def _start_near_identity(self) -> None:
        """u_hat grows without bound as w vanishes: start with w of length 1 and u_hat of 0."""
        w = nnf.normalize(torch.randn(self.steps, self.latent), dim=-1)
        starts = (w, identity_direction(w, self.constraint), torch.zeros(self.steps))
        with torch.no_grad():
            for layer, start in zip((self.w, self.u, self.b), starts, strict=True):
                layer.weight.mul_(0.1)
                layer.bias.copy_(start.flatten())

    def forward(self, h: Tensor, noise: Tensor) -> Draw:
        z_0, log_q0 = self._base(h, noise)
        if self.amortised:
            z, ladj = planar_flow(z_0, *self.flow_parameters(h), self.constraint)
        else:
            z, ladj = self.flow(z_0)
        log_q = log_q0 - ladj
        return Draw(z, log_q, log_q - standard_normal_log_prob(z))

    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        """log q(z | x) at any z (*samples, B, D), by the exact inverse of the chain."""
        if self.amortised:
            z_0, ladj = planar_flow_inverse(z, *self.flow_parameters(h), self.constraint)
        else:
            z_0, ladj = self.flow.inverse(z)
        return self.base_log_prob(z_0, h) + ladj

    def base_draw(self, h: Tensor, noise: Tensor) -> Tensor:
        """z_0, the draw before the chain, shape (*samples, B, D)."""
        return self._base(h, noise)[0]

    def base_log_prob(self, z_0: Tensor, h: Tensor) -> Tensor:
        """log q_0(z_0 | x), the density before the chain, shape (*samples, B)."""
        return diagonal_normal_log_prob(z_0, self.mean(h), self.log_var(h))

    def flow_parameters(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The steps' w, u (B, K, D) and b (B, K) of features h (B, H), amortised only."""
        shape = (*h.shape[:-1], self.steps, self.latent)
        return self.w(h).reshape(shape), self.u(h).reshape(shape), self.b(h)

    def _base(self, h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return _reparametrise(self.mean(h), self.log_var(h), noise)


def _reparametrise(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z_0 = mean + sigma noise, and log q_0(z_0) from the noise itself: (z_0 - mean) / sigma would
    lose the digits that a small sigma leaves below those of the mean."""
    z_0 = mean + torch.exp(0.5 * log_var) * noise
    return z_0, standard_normal_log_prob(noise) - 0.5 * log_var.sum(-1)
