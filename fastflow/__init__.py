"""fastflow: normalizing flows in PyTorch, fast, in both directions, with exact log-determinants."""

from fastflow import functional
from fastflow.backends import use_backend
from fastflow.bijections import (
    Bijection,
    Chain,
    ConditionalPlanarFlow,
    Inverse,
    Permutation,
    PlanarFlow,
)
from fastflow.diagnostics import info
from fastflow.flows import Flow

__version__ = "0.1.0"

__all__ = [
    "Bijection",
    "Chain",
    "ConditionalPlanarFlow",
    "Flow",
    "Inverse",
    "Permutation",
    "PlanarFlow",
    "functional",
    "info",
    "use_backend",
]
