"""Bijections made of bijections, and the permutation of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflow import masks
from fastflow.bijections.arranged import Arranged
from fastflow.bijections.base import Bijection, check_bijection, check_features, refuse_context
from fastflow.inner import ModuleList


class Chain(Bijection):
    r"""Applies bijections one after another.

    .. math:: f = f_n \circ \dots \circ f_1, \qquad \mathrm{ladj} = \sum_i \mathrm{ladj}_i

    A context goes to every link that takes one; a chain of which no link does refuses it.

    Arguments:
        bijections: the links f_1 .. f_n, of the same number of features, at least one. Those that
            take a context take one of the same number of features.

    Raises:
        TypeError: a link is not a `Bijection`.
        ValueError: there is no link, or their numbers of features, or of their context's, differ.

    Example:
        >>> chain = Chain(PlanarFlow(3), Permutation([2, 0, 1]), PlanarFlow(3))
        >>> y, ladj = chain(torch.zeros(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, *bijections: Bijection) -> None:
        super().__init__()
        if not bijections:
            raise ValueError("Chain: bijections is empty, must hold at least one")
        for position, bijection in enumerate(bijections):
            check_bijection("Chain", f"bijection {position}", bijection)
            if bijection.features != bijections[0].features:
                raise ValueError(
                    f"Chain: bijection {position} has {bijection.features} features, "
                    f"bijection 0 has {bijections[0].features}"
                )
            if bijection.context_features not in (0, self.context_features):
                if self.context_features:
                    raise ValueError(
                        f"Chain: bijection {position} takes a context of "
                        f"{bijection.context_features} features, another before it one of "
                        f"{self.context_features}"
                    )
                self.context_features = bijection.context_features
        self.features = bijections[0].features
        self.bijections = ModuleList(bijections)

    def __len__(self) -> int:
        return len(self.bijections)

    def __getitem__(self, index: int) -> Bijection:
        return self.bijections[index]

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.bijections)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(context)
        first, *others = self.bijections
        x, ladj = first(x, _share(context, first))
        for bijection in others:
            x, step = bijection(x, _share(context, bijection))
            ladj = ladj + step
        return x, ladj

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(context)
        *others, last = self.bijections
        y, ladj = last.inverse(y, _share(context, last))
        for bijection in reversed(others):
            y, step = bijection.inverse(y, _share(context, bijection))
            ladj = ladj + step
        return y, ladj

    def _check(self, context: Tensor | None) -> None:
        if not self.context_features:
            refuse_context("Chain", context)


def _share(context: Tensor | None, bijection: Bijection) -> Tensor | None:
    """What a link gets of the context."""
    return context if bijection.context_features else None


class Inverse(Bijection):
    r"""Swaps the directions of a bijection: :math:`f^{-1}` as a bijection of its own.

    Arguments:
        bijection: f.

    Raises:
        TypeError: the argument is not a `Bijection`.

    Example:
        >>> flow = PlanarFlow(3, steps=4)
        >>> y, ladj = flow(torch.ones(1, 3))
        >>> x, back = Inverse(flow)(y)
        >>> torch.allclose(x, torch.ones(1, 3), atol=1e-5), torch.allclose(ladj, -back, atol=1e-5)
        (True, True)
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        check_bijection("Inverse", "bijection", bijection)
        self.features = bijection.features
        self.context_features = bijection.context_features
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(y, context)


class Permutation(Arranged, Bijection):
    r"""Reorders the features: :math:`y_i = x_{\mathrm{order}[i]}`, with ladj = 0.

    Arguments:
        order: a permutation of 0 .. D-1, as a sequence or an integer tensor. It becomes a buffer;
            `load_state_dict` takes another of the same D and refuses what is no permutation.

    Raises:
        TypeError: it does not hold integers.
        ValueError: it is not a permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        (tensor([12., 10., 11.]), tensor(0.))
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        try:
            taken = masks.permutation(order)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"Permutation: {problem}") from None
        self.features = len(taken)
        self._arrange("order", taken, order.device if isinstance(order, Tensor) else None)

    def _checked(self, value: Tensor) -> Tensor:
        return masks.permutation(value, self.features)

    def _derived(self) -> dict[str, Tensor]:
        return {"inverse_order": self._arranged.argsort()}

    def _permute(self, name: str, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        check_features("Permutation", name, x, self.features)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.index_select(-1, order), x.new_zeros(x.shape[:-1], dtype=dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        refuse_context("Permutation", context)
        return self._permute("x", x, self.order)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        refuse_context("Permutation", context)
        return self._permute("y", y, self.inverse_order)

    def extra_repr(self) -> str:
        return f"{self._arranged.tolist()}" if self.features <= 16 else f"features={self.features}"
