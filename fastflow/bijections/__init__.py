"""Bijections as modules: forward(x, context) and inverse(y, context) return (outputs, ladj)."""

from fastflow.bijections.autoregressive import MaskedAffineAutoregressive
from fastflow.bijections.base import Bijection
from fastflow.bijections.composition import Chain, Inverse, Permutation
from fastflow.bijections.made import MADE
from fastflow.bijections.pcp import PCPMap
from fastflow.bijections.planar import ConditionalPlanarFlow, PlanarFlow

__all__ = [
    "MADE",
    "Bijection",
    "Chain",
    "ConditionalPlanarFlow",
    "Inverse",
    "MaskedAffineAutoregressive",
    "PCPMap",
    "Permutation",
    "PlanarFlow",
]
