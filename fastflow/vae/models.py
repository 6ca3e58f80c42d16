"""The variational autoencoder: encoder, posterior, decoder and likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastflow.vae.config import Config
from fastflow.vae.networks import NETWORKS
from fastflow.vae.objectives import BernoulliLikelihood, GaussianLikelihood, Likelihood
from fastflow.vae.posteriors import Draw, Posterior
from fastflow.vae.registry import make_posterior
from fastflow.vae.seeding import seed_for

Module = TypeVar("Module", bound=nn.Module)


class VAE(nn.Module):
    r"""A latent-variable model p(x | z) p(z) with its approximate posterior q(z | x).

    .. math:: z \sim N(0, I), \quad x \sim p(x | \mathrm{decoder}(z)), \quad
        q(z | x) = \mathrm{posterior}(z; \mathrm{encoder}(x))

    Arguments:
        encoder: maps images (B, pixels) to features h (B, H).
        posterior: maps features and noise to draws of z.
        decoder: maps z (\*samples, B, D) to the likelihood's parameters (\*samples, B, pixels).
        likelihood: what the decoder's output means.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014.
    """

    def __init__(
        self, encoder: nn.Module, posterior: Posterior, decoder: nn.Module, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.posterior = posterior
        self.decoder = decoder
        self.likelihood = likelihood

    def infer(self, x: Tensor, noise: Tensor) -> Draw:
        """Draws z (*samples, B, D) from the posterior of images x (B, pixels)."""
        return self.posterior(self.encoder(x), noise)

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters, shape (*samples, B, pixels), of z (*samples, B, D)."""
        return self.decoder(z)

    def generate(self, z: Tensor) -> Tensor:
        """The expected images, shape (*samples, B, pixels), of z (*samples, B, D)."""
        return self.likelihood.mean(self.decode(z))


def build(config: Config, shape: tuple[int, int]) -> VAE:
    """Builds the model that the settings describe, on the default device.

    The initial parameters follow from `config.seed` alone, those of encoder and decoder whatever
    the posterior is; the global random state is left as it was.

    Arguments:
        config: the settings.
        shape: (H, W) of an image.

    Raises:
        VaeError: the network cannot take images of this shape, or the settings do not fit.
    """
    network = NETWORKS[config.network](shape, config.hidden, config.latent)
    return VAE(
        encoder=_seeded(config, "encoder", network.encoder),
        posterior=_seeded(
            config, "posterior", lambda: make_posterior(config, network.out_features)
        ),
        decoder=_seeded(config, "decoder", network.decoder),
        likelihood=(
            BernoulliLikelihood()
            if config.likelihood == "bernoulli"
            else GaussianLikelihood(config.variance)
        ),
    )


def _seeded(config: Config, part: str, make: Callable[[], Module]) -> Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "parameters", part))
        return make()
