"""Bijections made of bijections, and the permutation of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastflow.bijections.base import Bijection, check_features


class Chain(Bijection):
    r"""Applies bijections one after another.

    .. math:: f = f_n \circ \dots \circ f_1, \qquad \mathrm{ladj} = \sum_i \mathrm{ladj}_i

    The context, if there is one, goes to every link.

    Arguments:
        bijections: the links f_1 .. f_n, of the same number of features, at least one.

    Raises:
        TypeError: a link is not a `Bijection`.
        ValueError: there is no link, or their numbers of features differ.

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
            if not isinstance(bijection, Bijection):
                raise TypeError(
                    f"Chain: bijection {position} is a {type(bijection).__name__}, "
                    "must be a fastflow.Bijection"
                )
            if bijection.features != bijections[0].features:
                raise ValueError(
                    f"Chain: bijection {position} has {bijection.features} features, "
                    f"bijection 0 has {bijections[0].features}"
                )
        self.features = bijections[0].features
        self.bijections = nn.ModuleList(bijections)

    def __len__(self) -> int:
        return len(self.bijections)

    def __getitem__(self, index: int) -> Bijection:
        return self.bijections[index]

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.bijections)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.bijections[0](x, context)
        for bijection in self.bijections[1:]:
            x, step = bijection(x, context)
            ladj = ladj + step
        return x, ladj

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.bijections[-1].inverse(y, context)
        for bijection in reversed(self.bijections[:-1]):
            y, step = bijection.inverse(y, context)
            ladj = ladj + step
        return y, ladj


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
        if not isinstance(bijection, Bijection):
            raise TypeError(
                f"Inverse: bijection is a {type(bijection).__name__}, must be a fastflow.Bijection"
            )
        self.features = bijection.features
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(y, context)


class Permutation(Bijection):
    r"""Reorders the features: :math:`y_i = x_{\mathrm{order}[i]}`, with ladj = 0.

    Arguments:
        order: a permutation of 0 .. D-1, as a sequence or an integer tensor. It is a buffer.

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
        order = torch.as_tensor(order)
        if order.numel() and (order.is_floating_point() or order.dtype == torch.bool):
            raise TypeError(f"Permutation: order is {order.dtype}, must hold integers")
        count = torch.arange(order.numel(), device=order.device)
        if order.dim() != 1 or not order.numel() or not torch.equal(order.sort().values, count):
            raise ValueError(
                f"Permutation: order is {order.tolist()}, must hold each of 0 .. D-1 once"
            )
        self.features = order.numel()
        self.register_buffer("order", order.long())
        self.register_buffer("inverse_order", order.argsort(), persistent=False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.inverse_order = self.order.argsort()

    def _permute(self, name: str, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        check_features("Permutation", name, x, self.features)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.index_select(-1, order), x.new_zeros(x.shape[:-1], dtype=dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._permute("x", x, self.order)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._permute("y", y, self.inverse_order)

    def extra_repr(self) -> str:
        return f"{self.order.tolist()}" if self.features <= 16 else f"features={self.features}"
