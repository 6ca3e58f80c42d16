"""Bijections as modules: forward(x, context) and inverse(y, context) return (outputs, ladj)."""

from fastflow.bijections.base import Bijection
from fastflow.bijections.composition import Chain, Inverse, Permutation
from fastflow.bijections.planar import ConditionalPlanarFlow, PlanarFlow

__all__ = [
    "Bijection",
    "Chain",
    "ConditionalPlanarFlow",
    "Inverse",
    "Permutation",
    "PlanarFlow",
]
