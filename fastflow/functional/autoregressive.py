"""The affine autoregressive layer, network and affine step as one op, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastflow.functional import network
from fastflow.scales import Scale, scale_map


def autoregressive(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    stairs: Tensor | Sequence[Tensor],
    terms: Sequence[Tensor | None] | None = None,
    activation: str = "relu",
    residual: bool = False,
    scale: str | Scale = "softclip",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Shifts and scales every feature by what a masked network makes of those before it.

    .. math::
        y_i = s_i x_i + m_i, \qquad (m_i, a_i) = \mathrm{net}_i(x_{<i}), \quad
        s_i = s(a_i), \qquad \mathrm{ladj} = \sum_i \log s_i

    (the gate of IAF: :math:`y_i = s_i x_i + (1 - s_i) m_i`). All features are computed at once.

    Arguments:
        x: points, (\*batch, D).
        weights, biases, stairs, terms, activation, residual, recompute: a network with 2 D outputs,
            as in `fastflow.functional.made`. Of the two outputs of a feature, which have the same
            degree and see the features before it only, the first is its shift m and the other its
            raw scale a.
        scale: the map from a to s, by name or as an object of `fastflow.scales`.

    Returns:
        y (\*batch, D) and ladj (\*batch,).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. So with stairs of a
            network that is not autoregressive, which are looked at when they come for the first
            time, in both directions and on every backend (not in a graph, nor under capture).

    Source:
        Papamakarios, Pavlakou and Murray, 2017, arXiv 1705.07057; Kingma et al., 2016, arXiv
        1606.04934.

    Example:
        >>> degrees = [torch.tensor([1, 2]), torch.tensor([1, 1]), torch.tensor([1, 1, 2, 2])]
        >>> stairs = fastflow.masks.staircase(degrees)
        >>> weights = [torch.ones(2, 2), torch.ones(4, 2)]
        >>> y, ladj = autoregressive(torch.ones(5, 2), weights, None, stairs)
        >>> y.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    constants = _constants("autoregressive", scale)
    return network.run(
        *("autoregressive", "x", x, weights, biases, stairs, terms, activation, residual),
        *(True, constants, recompute),
    )


def autoregressive_inverse(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    stairs: Tensor | Sequence[Tensor],
    terms: Sequence[Tensor | None] | None = None,
    activation: str = "relu",
    residual: bool = False,
    scale: str | Scale = "softclip",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Inverts `autoregressive`, for about the cost of one pass through its network.

    One sweep visits the features in their order: :math:`x_i = (y_i - m_i) / s_i` is known once
    those before it are, and then every hidden unit that it completes is computed, once. Gradients
    take one sweep in reverse.

    Arguments:
        y: points, (\*batch, D).
        weights, biases, stairs, terms, activation, residual, scale, recompute: as in
            `autoregressive`.

    Returns:
        x (\*batch, D), and ladj (\*batch,) of this map: minus that of `autoregressive` at x.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> degrees = [torch.tensor([1, 2]), torch.tensor([1, 1]), torch.tensor([1, 1, 2, 2])]
        >>> stairs = fastflow.masks.staircase(degrees)
        >>> weights = [torch.ones(2, 2), torch.ones(4, 2)]
        >>> y, ladj = autoregressive(torch.ones(5, 2), weights, None, stairs)
        >>> x, back = autoregressive_inverse(y, weights, None, stairs)
        >>> torch.allclose(x, torch.ones(5, 2)), torch.allclose(back, -ladj)
        (True, True)
    """
    constants = _constants("autoregressive_inverse", scale)
    return network.run(
        *("autoregressive_inverse", "y", y, weights, biases, stairs, terms, activation, residual),
        *(True, constants, recompute),
    )


def _constants(op: str, scale: str | Scale) -> tuple[int, float, float]:
    """A scale map as ops take it."""
    scale = scale_map(op, scale)
    c0, c1 = scale.constants
    return scale.number, float(c0), float(c1)
