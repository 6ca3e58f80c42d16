"""The masked layers of zuko and Pyro, whose networks take points and context side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastflow.autograd.context import ContextTerm
from fastflow.convert.layer import MaskedLayer, Unsupported, as_bool
from fastflow.convert.staircase import staircase_of
from fastflow.memo import tensors
from fastflow.scales import Scale


class JoinedLayer(MaskedLayer):
    """A converted layer on such a network, with an activation and a scale map read by `check`."""

    derived = (*MaskedLayer.derived, "_activation", "_scale")
    context_first: ClassVar[bool]
    """Whether the context stands before the points."""
    interleaved: ClassVar[bool]
    """Whether outputs are m_1, a_1, m_2, a_2, .. or m_1 .. m_D, a_1 .. a_D."""

    _activation: str
    _scale: Scale

    def sizes(self, given: Sequence[Tensor]) -> tuple[int, int]:
        """D and C, from the weights or the masks of all layers."""
        features = len(given[-1]) // 2
        return features, given[0].shape[1] - features

    def network(self, context: Tensor | None = None) -> dict[str, Any] | None:
        """The layer at a context as ops take it; None where the library's own code must answer."""
        layers = self.layers()
        if layers is None:
            return None
        stairs = self.stairs(tensors(layers, "mask"))
        if stairs is None:
            return None
        weights, terms = tensors(layers, "weight"), None
        if context is not None:
            own, of_context = self._parts(weights[0], self.sizes(weights))
            weights[0] = own.contiguous()  # as the node wants it, see fastflow.autograd.node
            terms = ContextTerm(context, of_context.contiguous(), None, activated=False)
        return {
            "weights": weights,
            "biases": tensors(layers, "bias"),
            "stairs": stairs,
            "terms": terms,
            "activation": self._activation,
            "scale": self._scale,
        }

    def derive(self, sources: Sequence[Tensor]) -> Tensor:
        seen = as_bool(sources)
        sizes = self.sizes(seen)
        seen[0], of_context = self._parts(seen[0], sizes)
        if not of_context.all():
            raise Unsupported("its masks hide the context from some features")
        outputs = torch.arange(2 * sizes[0], device="cpu")
        outputs = outputs.view(-1, 2) if self.interleaved else outputs.view(2, -1).T
        stairs = staircase_of(seen, outputs)
        if stairs is None:
            raise Unsupported("its masks are not those of an order of the features")
        return stairs

    def _parts(self, joined: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The columns of the points and those of the context."""
        if not self.context_first:
            return joined.split(sizes, 1)  # pyright: ignore[reportReturnType]
        of_context, own = joined.split(sizes[::-1], 1)
        return own, of_context
