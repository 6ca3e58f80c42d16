"""fastflow: normalizing flows in PyTorch, fast, in both directions, with exact log-determinants."""

from fastflow import distributions, functional, masks, scales, sharding
from fastflow.backends import use_backend
from fastflow.bijections import (
    MADE,
    Bijection,
    Chain,
    ConditionalPlanarFlow,
    Inverse,
    MaskedAffineAutoregressive,
    PCPMap,
    Permutation,
    PlanarFlow,
)
from fastflow.convert import convert, revert
from fastflow.diagnostics import info
from fastflow.distributions import BijectionTransform
from fastflow.flows import IAF, MAF, Flow

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "Bijection",
    "BijectionTransform",
    "Chain",
    "ConditionalPlanarFlow",
    "Flow",
    "Inverse",
    "MaskedAffineAutoregressive",
    "PCPMap",
    "Permutation",
    "PlanarFlow",
    "convert",
    "distributions",
    "functional",
    "info",
    "masks",
    "revert",
    "scales",
    "sharding",
    "use_backend",
]
