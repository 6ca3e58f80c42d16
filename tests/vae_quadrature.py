"""Posteriors far from a normal, and integrals over a 2-D grid, for the tests of fastflow.vae."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow import PCPMap
from fastflow.bijections.pcp import CONTEXT_GAIN, SHARPNESS
from fastflow.vae import Posterior

POINTS, STEP = 128, 0.125  # the grid reaches from -16 to 16
ROUNDING = 1e-11  # float64, after some tens of operations on values of order 10


def strong_flow(posterior: Posterior) -> Posterior:
    """The posterior, its flow far from the identity: no part of it may go unnoticed."""
    with torch.no_grad():
        for name, parameter in posterior.named_parameters():
            if name.startswith("bijection."):
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
                parameter.normal_(0, 0.6 * fan_in**-0.5)
        if isinstance(getattr(posterior, "bijection", None), PCPMap):
            # it takes its parameters times these
            for name, parameter in posterior.bijection.named_parameters():
                parameter /= {"inputs": SHARPNESS, "terms": CONTEXT_GAIN}.get(name.split(".")[0], 1)
    return posterior


def grid() -> Tensor:
    """Points (G, 1, 2) of a square around the origin."""
    line = torch.arange(-POINTS, POINTS + 1) * STEP
    return torch.cartesian_prod(line, line).unsqueeze(1)


def integral(values: Tensor) -> tuple[Tensor, Tensor]:
    """The integral over the grid of values (G, *batch), and what remains of its error.

    The integrands die out within the square. Where they are smooth, sums over a grid converge
    faster than any power of the step; where ELU makes the second derivative jump, the errors of
    both steps scatter. So twice the largest change from twice the step bounds every row's error.
    """
    side = 2 * POINTS + 1
    values = values.reshape(side, side, *values.shape[1:])
    fine, coarse = (values[::skip, ::skip].sum((0, 1)) * (skip * STEP) ** 2 for skip in (1, 2))
    error = (fine - coarse).abs()
    assert (error < 0.01 * fine.abs()).all(), "the grid is too coarse for this integrand"
    return fine, 2 * error.max() + ROUNDING
