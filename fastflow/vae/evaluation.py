"""How good a model is on images that it was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.vae.models import VAE
from fastflow.vae.objectives import (
    importance_weighted_bound,
    negative_elbo,
    standard_normal_log_prob,
)

MAX_ROWS = 8192  # decoded at once: 25 MB per copy of 784 float32 pixels


@torch.no_grad()
def mean_negative_elbo(model: VAE, images: Tensor, generator: torch.Generator) -> float:
    """Estimates the mean -ELBO with one draw per image, in nats.

    Arguments:
        model: the autoencoder.
        images: shape (N, pixels).
        generator: of the noise, on the device of the images.
    """
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    for x in images.split(MAX_ROWS):
        total += negative_elbo(model, x, _noise(model, 1, len(x), generator)[0]).loss.sum()
    return total.item() / len(images)


@torch.no_grad()
def evaluate(
    model: VAE, images: Tensor, generator: torch.Generator, samples: int = 128
) -> dict[str, float]:
    r"""Estimates -ELBO and -log p(x), means over images, in nats.

    Both come from the same `samples` draws per image. -log p(x) is the importance-sampled
    estimate of Burda et al. (2016), from above in expectation:

    .. math:: -\log \tfrac1S \sum_s p(x | z_s)\, p(z_s) / q(z_s | x), \qquad z_s \sim q(z | x)

    Images and samples are taken in parts: memory grows with neither, but for a weight per sample.

    Arguments:
        model: the autoencoder.
        images: shape (N, pixels).
        generator: of the noise, on the device of the images.
        samples: S.

    Returns:
        `negative_elbo`, its parts `reconstruction` and `kl`, and `negative_log_likelihood`.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=images.device)
    for x in images.split(max(1, MAX_ROWS // samples)):
        log_weights = []
        for start in range(0, samples, MAX_ROWS):
            drawn = min(MAX_ROWS, samples - start)
            z, log_q, kl = model.infer(x, _noise(model, drawn, len(x), generator))
            nll = model.likelihood.nll(model.decode(z), x)
            log_weights.append(standard_normal_log_prob(z) - log_q - nll)
            totals[0] += nll.sum() / samples
            totals[1] += kl.expand_as(nll).sum() / samples
        totals[2] -= importance_weighted_bound(torch.cat(log_weights)).sum()
    reconstruction, kl, nll = (totals / len(images)).tolist()
    return {
        "negative_elbo": reconstruction + kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "negative_log_likelihood": nll,
    }


def _noise(model: VAE, samples: int, batch: int, generator: torch.Generator) -> Tensor:
    latent = model.posterior.latent
    return torch.randn(samples, batch, latent, generator=generator, device=generator.device)
