"""The memory of transforms of torch.distributions, with log-determinants and nothing stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from fastflow.transforms import transforms_active


class Remembering(Transform):
    """A transform whose value and log-determinant come from one pass, and are remembered.

    Like any transform with a cache, it knows the last pair of points, and answers from memory when
    it is asked about the very tensors that it was given or returned. Unlike others it does so only
    while these and all that they were made of are unchanged, and never with a result without
    history where gradients are recorded.
    """

    memory: tuple[str, ...] = ("_ladj", "_made_of", "_recorded")
    """The attributes beside `_cached_x_y`, which torch has."""

    _cached_x_y: tuple[Tensor | None, Tensor | None]
    _ladj: Tensor | None
    _made_of: list[tuple[Tensor, int]]
    _recorded: bool

    def compute(self, point: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """y of a point x, or with `inverse` x of a point y; and the ladj from x to y."""
        raise NotImplementedError(f"{type(self).__name__} has no compute")

    def made_of(self) -> Sequence[Tensor]:
        """What the result depends on beside the point: parameters, a context."""
        raise NotImplementedError(f"{type(self).__name__} has no made_of")

    def recall(self, point: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """What `compute` returns, from memory if it is still there."""
        if transforms_active():  # of tensors that are wrapped or traced there is nothing to know
            return self.compute(point, inverse)
        if self._knows(point, inverse):
            return self._cached_x_y[not inverse], self._ladj
        image, ladj = self.compute(point, inverse)
        self._cached_x_y = (image, point) if inverse else (point, image)
        self._ladj, self._recorded = ladj, torch.is_grad_enabled()
        self._made_of = [(t, version(t)) for t in (point, image, *self.made_of())]
        return image, ladj

    def _knows(self, point: Tensor, inverse: bool) -> bool:
        x, y = self._cached_x_y
        if point is not (y if inverse else x):
            return False
        if torch.is_grad_enabled() and not self._recorded:
            return False
        tensors = (*(one for one, _ in self._made_of[:2]), *self.made_of())
        return len(tensors) == len(self._made_of) and all(
            tensor is known and version(tensor) == then
            for tensor, (known, then) in zip(tensors, self._made_of)
        )

    def forget(self) -> None:
        """Empties the memory."""
        self.__dict__.update(self.nothing())

    def nothing(self) -> dict[str, Any]:
        """The attributes of an empty memory."""
        return {"_cached_x_y": (None, None), "_ladj": None, "_made_of": [], "_recorded": False}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | self.nothing()  # what has a history has no copy

    def __call__(self, x: Tensor) -> Tensor:
        return self.recall(x, inverse=False)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.recall(y, inverse=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.recall(x, inverse=False)[1]

    # properties, as some instances have methods of these names of their own, which go first else
    @property
    def _call(self) -> Callable[[Tensor], Tensor]:
        return lambda x: self.compute(x, inverse=False)[0]

    @property
    def _inverse(self) -> Callable[[Tensor], Tensor]:
        return lambda y: self.compute(y, inverse=True)[0]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where PyTorch does not count, in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
