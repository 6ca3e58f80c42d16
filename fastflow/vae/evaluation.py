"""How good a model is on images that it was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflow.vae.config import Config
from fastflow.vae.models import VAE
from fastflow.vae.objectives import (
    importance_weighted_bound,
    negative_elbo,
    standard_normal_log_prob,
)
from fastflow.vae.seeding import generator_for

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
) -> dict[str, float | None]:
    r"""Estimates -ELBO and -log p(x), means over images, in nats.

    Both come from the same `samples` draws per image. -log p(x) is the importance-sampled
    estimate of Burda et al. (2016), from above in expectation:

    .. math:: -\log \tfrac1S \sum_s p(x | z_s)\, p(z_s) / q(z_s | x), \qquad z_s \sim q(z | x)

    A standard error is that of the mean over images: what other images of the same kind would have
    changed, and the noise of the draws.

    Arguments:
        model: the autoencoder.
        images: shape (N, pixels).
        generator: of the noise, on the device of the images.
        samples: S.

    Returns:
        `negative_elbo`, its parts `reconstruction` and `kl`, and `negative_log_likelihood`; the
        standard errors `negative_elbo_error` and `negative_log_likelihood_error`, None for N = 1.
    """
    reconstruction, kl, nll = image_terms(model, images, generator, samples).unbind()
    return {
        "negative_elbo": (reconstruction + kl).mean().item(),
        "negative_elbo_error": standard_error(reconstruction + kl),
        "reconstruction": reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "negative_log_likelihood": nll.mean().item(),
        "negative_log_likelihood_error": standard_error(nll),
    }


def evaluate_run(model: VAE, config: Config, images: Tensor) -> dict[str, float | None]:
    """Evaluates a model as its settings say; the draws follow from their seed alone.

    Arguments:
        model: the autoencoder.
        config: its settings.
        images: test images (N, pixels), binarised where the settings say so, on its device.

    Returns:
        What `evaluate` returns, and the number of samples, `importance_samples`.
    """
    generator = generator_for(images.device, config.seed, "evaluation")
    test = evaluate(model, images, generator, config.importance_samples)
    return test | {"importance_samples": config.importance_samples}


@torch.no_grad()
def image_terms(
    model: VAE, images: Tensor, generator: torch.Generator, samples: int = 128
) -> Tensor:
    """Estimates the parts of -ELBO, and -log p(x), of every image, in nats.

    Images and samples are taken in parts: memory grows with neither, but for a weight per sample.

    Arguments:
        model, images, generator, samples: as of `evaluate`.

    Returns:
        Reconstruction, KL and -log p(x), shape (3, N), float64.
    """
    parts = []
    for x in images.split(max(1, MAX_ROWS // samples)):
        totals = torch.zeros(3, len(x), dtype=torch.float64, device=images.device)
        log_weights = []
        for start in range(0, samples, MAX_ROWS):
            drawn = min(MAX_ROWS, samples - start)
            z, log_q, kl = model.infer(x, _noise(model, drawn, len(x), generator))
            nll = model.likelihood.nll(model.decode(z), x)
            log_weights.append(standard_normal_log_prob(z) - log_q - nll)
            totals[0] += nll.sum(0) / samples
            totals[1] += kl.expand_as(nll).sum(0) / samples
        totals[2] -= importance_weighted_bound(torch.cat(log_weights))
        parts.append(totals)
    return torch.cat(parts, 1)


def standard_error(values: Tensor) -> float | None:
    """The standard error of the mean of values (N,), None if there is only one."""
    return None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()


def _noise(model: VAE, samples: int, batch: int, generator: torch.Generator) -> Tensor:
    latent = model.posterior.latent
    return torch.randn(samples, batch, latent, generator=generator, device=generator.device)
