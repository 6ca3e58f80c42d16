"""The true posterior p(z | x) of two latents, on a grid, and how far approximations are from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow.vae.errors import VaeError
from fastflow.vae.evaluation import MAX_ROWS, standard_error
from fastflow.vae.models import VAE
from fastflow.vae.objectives import negative_elbo, standard_normal_log_prob

SIDE = 201  # points per side: a normal that fills the grid is sampled 16 times per sigma
LARGEST_SIDE = 801  # for ridges across the axes and for several modes, as fine as it needs to be
FIRST_HALF = 6.0  # of the first square; the prior has a mass of 4e-9 outside
DEPTH = 20.0  # nats below the maximum that the grid reaches: e^-20 is 2e-9
LARGEST_HALF = 100.0
MOST_GRIDS = 50  # a ridge seen on a fine grid and missed on a coarse one could take turns for ever
LARGEST_BORDER, LARGEST_ERROR = 1e-6, 1e-3  # what a grid must keep, else it is refused


@dataclass(frozen=True)
class GridDensity:
    """A density on a rectangular grid of two latents, z_1 fastest.

    Arguments:
        points: shape (N, 1, 2), N a square.
        log_prob: normalised log-density at the points, shape (N, 1).
        log_evidence: log p(x), the logarithm of what it was normalised by.
        border_mass: the mass of the outermost cells, a bound for what lies outside.
        quadrature_error: how much log p(x) changes when every other point is left out.
    """

    points: Tensor
    log_prob: Tensor
    log_evidence: float
    border_mass: float
    quadrature_error: float


@torch.no_grad()
def true_posterior(model: VAE, x: Tensor) -> GridDensity:
    r"""Computes p(z | x) on a grid that holds all of its mass but a negligible part.

    .. math:: p(z | x) = p(x | z)\, p(z) / p(x), \qquad p(x) = \int p(x | z)\, p(z)\, dz

    The integral is a sum over the grid, in logarithms. The grid starts as a wide square around the
    prior and shrinks to where the density is within `DEPTH` nats of its maximum.

    Arguments:
        model: an autoencoder with two latents, of which the decoder and the likelihood are used.
        x: one image, shape (1, pixels).

    Raises:
        VaeError: the model has another number of latents, or no grid holds the density well.
    """
    if model.posterior.latent != 2:
        raise VaeError(
            f"the true posterior needs 2 latents, the model has {model.posterior.latent}"
        )
    half, centre = x.new_full((2,), FIRST_HALF), x.new_zeros(2)
    for _ in range(MOST_GRIDS):
        points, values = _on_grid(model, x, centre, half, SIDE)
        if not values.max().isfinite():
            raise VaeError("the true posterior is not finite, the decoder's outputs are too large")
        low, high = _extent(points, values)
        if half[0] < LARGEST_HALF and _touches(low, high, centre, half):
            half = 2 * half
            continue
        smaller = (high - low) / 2 + 4 * half / (SIDE - 1)  # two cells of margin on each side
        if (smaller > 0.8 * half).all():
            break
        centre, half = (low + high) / 2, torch.minimum(smaller, half)
    else:
        raise VaeError(f"the true posterior fits none of {MOST_GRIDS} grids that were tried")
    side, density = SIDE, _normalised(points, values, half)
    while density.quadrature_error > LARGEST_ERROR and side < LARGEST_SIDE:
        side = 2 * side - 1
        density = _normalised(*_on_grid(model, x, centre, half, side), half)
    if not (density.border_mass < LARGEST_BORDER and density.quadrature_error < LARGEST_ERROR):
        raise VaeError(
            f"the true posterior does not fit a grid: mass at its border {density.border_mass:.1e},"
            f" error of the quadrature {density.quadrature_error:.1e}"
        )
    return density


def _on_grid(
    model: VAE, x: Tensor, centre: Tensor, half: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Points (side^2, 1, 2) of a grid and log p(x, z) there, (side^2, 1)."""
    steps = torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device)
    vertical, horizontal = torch.meshgrid(
        centre[1] + half[1] * steps, centre[0] + half[0] * steps, indexing="ij"
    )
    points = torch.stack([horizontal, vertical], -1).reshape(-1, 1, 2)
    return points, torch.cat([log_joint(model, x, z) for z in points.split(MAX_ROWS)])


def log_joint(model: VAE, x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z), shape (N, 1), of one image x (1, pixels) at z (N, 1, 2)."""
    return standard_normal_log_prob(z) - model.likelihood.nll(model.decode(z), x)


def _extent(points: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of the box of all points within DEPTH of the maximum."""
    inside = points[log_prob > log_prob.max() - DEPTH]
    return inside.amin(0), inside.amax(0)


def _touches(low: Tensor, high: Tensor, centre: Tensor, half: Tensor) -> bool:
    edge = 0.999 * half  # the outermost points, whatever rounding made of them
    return bool(((low < centre - edge) | (high > centre + edge)).any())


def _normalised(points: Tensor, log_joint: Tensor, half: Tensor) -> GridDensity:
    side = math.isqrt(len(points))
    values = log_joint.double().reshape(side, side)
    log_cell = (2 * half / (side - 1)).double().log().sum()
    log_evidence = torch.logsumexp(values.flatten(), 0) + log_cell
    coarse = torch.logsumexp(values[::2, ::2].flatten(), 0) + log_cell + math.log(4)
    mass = torch.exp(values - log_evidence + log_cell)
    return GridDensity(
        points,
        log_joint - log_evidence,
        log_evidence.item(),
        (mass.sum() - mass[1:-1, 1:-1].sum()).item(),
        (coarse - log_evidence).abs().item(),
    )


@torch.no_grad()
def kl_to_true(
    model: VAE, x: Tensor, log_evidence: float, generator: torch.Generator, draws: int = 16384
) -> tuple[float, float | None]:
    r"""Estimates how far the model's approximate posterior is from the true one, in nats.

    .. math:: KL(q \| p) = E_q[\log q(z | x) - \log p(x, z)] + \log p(x)

    Arguments:
        model: the autoencoder.
        x: one image, shape (1, pixels).
        log_evidence: log p(x), from quadrature.
        generator: of the noise, on the device of x.
        draws: of q.

    Returns:
        The estimate and its standard error.
    """
    terms = []
    for start in range(0, draws, MAX_ROWS):
        drawn = min(MAX_ROWS, draws - start)
        noise = torch.randn(drawn, 1, 2, generator=generator, dtype=x.dtype, device=x.device)
        z, log_q, _ = model.infer(x, noise)
        terms.append((log_q - log_joint(model, x, z)).flatten().double())
    values = torch.cat(terms) + log_evidence
    return values.mean().item(), standard_error(values)


def fit(
    model: VAE,
    parameters: Sequence[Tensor],
    images: Tensor,
    generator: torch.Generator,
    iterations: int,
    lr: float,
    draws: int = 16,
) -> None:
    """Maximises the ELBO of a few images, all of them in every step, the learning rate falling.

    Arguments:
        model: the autoencoder.
        parameters: those of them that are fitted.
        images: shape (N, pixels).
        generator: of the noise, on the device of the images.
        iterations: steps of Adam.
        lr: its first learning rate; half a cosine takes it to 0.
        draws: of the posterior, for every image and step.

    Raises:
        VaeError: the loss is not finite in the end.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    like = {"dtype": images.dtype, "device": images.device}
    for _ in range(iterations):
        noise = torch.randn(draws, len(images), 2, generator=generator, **like)
        loss = negative_elbo(model, images, noise).loss.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not loss.isfinite():
        raise VaeError(f"the loss is not finite, a smaller learning rate than {lr:g} may help")
