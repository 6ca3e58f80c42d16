"""A flow of every kind, small, for tests of what they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow import (
    IAF,
    MAF,
    Chain,
    ConditionalPlanarFlow,
    Flow,
    Inverse,
    MaskedAffineAutoregressive,
    PCPMap,
    Permutation,
    PlanarFlow,
)

D, C = 3, 2
TREE = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).bool()


def recomputing() -> Flow:
    layers = [
        MaskedAffineAutoregressive(D, (8,), 0, "tanh", scale=scale, recompute=True)
        for scale in ("softclip", "softplus")
    ]
    return Flow(Chain(layers[0], Permutation([2, 0, 1]), layers[1]))


def by_adjacency() -> Flow:
    return Flow(MaskedAffineAutoregressive(D, (8,), activation="tanh", adjacency=TREE))


FLOWS = {
    "maf": lambda: MAF(D, 2, (8, 8), activation="tanh"),
    "maf-context": lambda: MAF(D, 2, (8, 8), context_features=C, activation="tanh", order="random"),
    "iaf-residual": lambda: IAF(D, 2, (8, 8), context_features=C, activation="elu", residual=True),
    "recomputing": recomputing,
    "adjacency": by_adjacency,
    "planar": lambda: Flow(PlanarFlow(D, 2)),
    "planar-context": lambda: Flow(Inverse(ConditionalPlanarFlow(D, C, 2, (4,)))),
    "pcp": lambda: Flow(Inverse(PCPMap(D, 0, (6, 5)))),
    "pcp-context": lambda: Flow(PCPMap(D, C, (6, 5))),
}


def make(name: str, seed: int = 0) -> Flow:
    """The flow of this name, always the same one."""
    torch.manual_seed(seed)
    return FLOWS[name]()


def points(flow: Flow, *batch: int) -> tuple[Tensor, Tensor | None]:
    """Points (*batch, D) and a context (*batch, C), if the flow takes one."""
    like = {"dtype": next(flow.parameters()).dtype}
    x = torch.randn(*batch, D, **like)
    return x, torch.randn(*batch, C, **like) if flow.bijection.context_features else None
