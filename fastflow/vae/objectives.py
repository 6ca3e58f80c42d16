"""The terms of the evidence lower bound (ELBO) of a variational autoencoder.

Every term is in nats, one value per image, summed over pixels or latent features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as nnf

LOG_2PI = math.log(2 * math.pi)


def diagonal_normal_log_prob(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Computes the log-density of a diagonal normal.

    .. math:: \log N(z; \mu, \sigma^2) =
        -\tfrac12 \sum_d \big(\log 2\pi + \log \sigma_d^2 + (z_d - \mu_d)^2 / \sigma_d^2\big)

    Arguments:
        z: points, shape (\*batch, D).
        mean: :math:`\mu`, shape broadcastable to that of z.
        log_var: :math:`\log \sigma^2`, shape broadcastable to that of z.

    Returns:
        The log-density, shape (\*batch,).
    """
    return -0.5 * (LOG_2PI + log_var + (z - mean).square() * torch.exp(-log_var)).sum(-1)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    r"""Computes :math:`\log N(z; 0, I)`, the prior of the latent variables.

    Arguments:
        z: points, shape (\*batch, D).

    Returns:
        The log-density, shape (\*batch,).
    """
    return -0.5 * (LOG_2PI + z.square()).sum(-1)


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Computes the divergence of a diagonal normal from the prior in closed form.

    .. math:: KL(N(\mu, \sigma^2) \| N(0, I)) =
        \tfrac12 \sum_d (\mu_d^2 + \sigma_d^2 - 1 - \log \sigma_d^2)

    Arguments:
        mean: :math:`\mu`, shape (\*batch, D).
        log_var: :math:`\log \sigma^2`, shape (\*batch, D).

    Returns:
        The divergence, shape (\*batch,).

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B.
    """
    # expm1: sigma near 1 is where 1 + log sigma^2 - sigma^2 cancels.
    return 0.5 * (mean.square() + (torch.expm1(log_var) - log_var)).sum(-1)


class Likelihood(Protocol):
    """What the decoder's output means: a distribution over images."""

    def nll(self, output: Tensor, x: Tensor) -> Tensor:
        """-log p(x | z), shape (*samples, B), of output (*samples, B, D) and images x (B, D)."""
        ...

    def mean(self, output: Tensor) -> Tensor:
        """The expected image, shape of output."""
        ...


@dataclass(frozen=True)
class BernoulliLikelihood:
    r"""Pixels are independent coins, the decoder gives their logits l.

    .. math:: -\log p(x | z) = \sum_d \big(\mathrm{softplus}(l_d) - x_d l_d\big)

    Grey values in [0, 1] are accepted, as is customary, but only for binary pixels is this the
    logarithm of a probability.
    """

    def nll(self, output: Tensor, x: Tensor) -> Tensor:
        """-log p(x | z), shape (*samples, B), of logits (*samples, B, D) and images x (B, D)."""
        ...
        target = x.expand_as(output)
        return nnf.binary_cross_entropy_with_logits(output, target, reduction="none").sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """The probability of each pixel, shape of output."""
        return torch.sigmoid(output)


@dataclass(frozen=True)
class GaussianLikelihood:
    r"""Pixels are independent normals of one fixed variance, the decoder gives their means m.

    .. math:: -\log p(x | z) = \tfrac12 \sum_d \big(\log 2\pi v + (x_d - m_d)^2 / v\big)
    """

    variance: float = 0.1

    def nll(self, output: Tensor, x: Tensor) -> Tensor:
        """-log p(x | z), shape (*samples, B), of means (*samples, B, D) and images x (B, D)."""
        ...
        constant = LOG_2PI + math.log(self.variance)
        return 0.5 * (constant + (x - output).square() / self.variance).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """The mean of each pixel: output itself."""
        return output


class ElboTerms(NamedTuple):
    """-ELBO and the two terms that it is the sum of, each of shape (*samples, B), in nats."""

    loss: Tensor
    reconstruction: Tensor  # -log p(x | z)
    kl: Tensor  # KL(q || p), or its one-sample estimate log q(z | x) - log p(z)


class SupportsElbo(Protocol):
    """What the objectives need of a model: fastflow.vae.VAE, or anything like it."""

    likelihood: Likelihood

    def infer(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws z (*samples, B, D) of the posterior of x, with log q(z | x) and the KL term."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters, shape (*samples, B, pixels)."""
        ...


def negative_elbo(model: SupportsElbo, x: Tensor, noise: Tensor) -> ElboTerms:
    r"""Estimates the negative evidence lower bound of each image.

    .. math:: -ELBO = E_q[-\log p(x | z_K)]
        + \log q_0(z_0 | x) - \sum_k \log|\det \partial f_k / \partial z_{k-1}| - \log p(z_K)

    with :math:`z_0 = \mu + \sigma \epsilon` and :math:`z_k = f_k(z_{k-1})`. The last three terms
    are one-sample estimates, except for a Gaussian posterior, whose KL has a closed form.

    Arguments:
        model: the autoencoder.
        x: images, shape (B, pixels).
        noise: :math:`\epsilon`, standard normal, shape (\*samples, B, D).

    Returns:
        loss, reconstruction and kl, each of shape (\*samples, B).

    Source: Kingma and Welling 2014, equation 7; Rezende and Mohamed, Variational Inference with
    Normalizing Flows, 2015, equation 15.
    """
    z, _, kl = model.infer(x, noise)
    reconstruction = model.likelihood.nll(model.decode(z), x)
    return ElboTerms(reconstruction + kl, reconstruction, kl.expand_as(reconstruction))


def training_loss(
    terms: ElboTerms, kl_weight: float | Tensor = 1.0, free_bits: float = 0.0
) -> Tensor:
    r"""Computes what training minimises: -ELBO, averaged over a batch, or a softened form of it.

    .. math:: \overline{-\log p(x | z)} + \beta \max(\lambda, \overline{KL})

    with bars for averages over samples and batch. The latents form one group: a flow's divergence
    is no sum over latents, and posteriors shall be compared under one objective. Below
    :math:`\lambda` the divergence is free and has no gradient. For :math:`\lambda = 0` the second
    term is :math:`\beta \overline{KL}`: an estimate of the divergence may be negative.

    Arguments:
        terms: what `negative_elbo` returns.
        kl_weight: :math:`\beta`, less than 1 while the KL term warms up.
        free_bits: :math:`\lambda`, in nats per image.

    Returns:
        The loss, shape ().

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016,
    section C.8 (free bits); Soenderby et al., Ladder Variational Autoencoders, 2016 (warm-up).

    Example:
        >>> terms = ElboTerms(torch.tensor([4.0]), torch.tensor([3.0]), torch.tensor([1.0]))
        >>> training_loss(terms), training_loss(terms, kl_weight=0.5, free_bits=4.0)
        (tensor(4.), tensor(5.))
    """
    kl = terms.kl.mean()
    if free_bits:  # a bound of 0 would bias the loss where an estimate is negative
        kl = kl.clamp(min=free_bits)
    return terms.reconstruction.mean() + kl_weight * kl


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    r"""Estimates log p(x) from S draws of the posterior, from below in expectation.

    .. math:: \log \tfrac1S \sum_s \exp(\log w_s), \qquad
        \log w_s = \log p(x | z_s) + \log p(z_s) - \log q(z_s | x)

    One sample gives the ELBO; the bound tightens as S grows.

    Arguments:
        log_weights: shape (S, \*batch).

    Returns:
        The bound, shape (\*batch,).

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, equation 8.
    """
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])
