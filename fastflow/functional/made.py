"""Masked linear layers and MADE as one op."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastflow import masks
from fastflow.functional import network


def made(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    stairs: Tensor | Sequence[Tensor],
    terms: Sequence[Tensor | None] | None = None,
    activation: str = "relu",
    residual: bool = False,
    recompute: bool = False,
) -> Tensor:
    r"""Applies a masked network, layer after layer, without the work that the masks remove.

    .. math::
        P_l = (M_l \odot W_l) A_{l-1} + b_l + T_l, \qquad A_0 = x, \quad A_l = \phi(P_l)

    and the last layer's P are the outputs. A residual network consists of a first layer and blocks
    of two, :math:`h + W'\phi(W \phi(h) + b) + b'`; the outputs then see h itself.

    Arguments:
        x: points, (\*batch, D).
        weights: one (n_l, n_{l-1}) for every layer, n_0 = D. Masked-out entries may hold anything,
            and their gradient is exactly zero.
        biases: (n_l,) or None for every layer, or None.
        stairs: the masks, as `fastflow.masks.staircase` writes them; or, where they are no
            staircase, a list of bool (n_l, n_{l-1}), which the reference computes.
        terms: (\*batch, n_l) or None for every layer, or None: what a context contributes. Their
            batches broadcast with that of x.
        activation: relu, tanh, elu, silu, gelu, softplus or leaky_relu.
        residual: whether hidden layers form residual blocks; equal widths and degrees.
        recompute: save memory: backward computes the hidden layers once more.

    Returns:
        The outputs, (\*batch, n_L).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source:
        Germain, Gregor, Murray and Larochelle, 2015, arXiv 1502.03509.

    Example:
        >>> x = torch.zeros(5, 3)
        >>> degrees = [torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2, 3])]
        >>> weights = [torch.ones(4, 3), torch.ones(3, 4)]
        >>> made(x, weights, None, fastflow.masks.staircase(degrees)).shape
        torch.Size([5, 3])
    """
    (y,) = network.run(
        *("made", "x", x, weights, biases, stairs, terms, activation, residual),
        recompute=recompute,
    )
    return y


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool = False,
) -> Tensor:
    r"""A linear layer in which output o sees the inputs of no higher degree.

    .. math::
        y_o = b_o + \sum_{i:\ \mathrm{out}_o \ge \mathrm{in}_i} W_{oi}\, x_i

    (:math:`>` if strict). Masked-out weights are selected away, not multiplied by zero: an inf in
    one does not leak. Their gradient is exactly zero.

    Arguments:
        x: (\*batch, I).
        weight: (O, I).
        bias: (O,) or None.
        in_degrees: integers, (I,).
        out_degrees: integers, (O,).
        strict: whether an output needs a higher degree than the inputs that it sees.

    Returns:
        y, (\*batch, O).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> weight, degrees = torch.ones(3, 3), torch.tensor([1, 2, 3])
        >>> masked_linear(torch.ones(3), weight, None, degrees, degrees)
        tensor([1., 2., 3.])
    """
    for name, degrees in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
        if not isinstance(degrees, Tensor) or degrees.is_floating_point() or degrees.dim() != 1:
            raise TypeError(f"masked_linear: {name} must be an integer tensor of one dimension")
    if not isinstance(weight, Tensor) or weight.shape != (len(out_degrees), len(in_degrees)):
        raise ValueError(
            f"masked_linear: weight has shape {tuple(getattr(weight, 'shape', ()))}, must be "
            f"({len(out_degrees)}, {len(in_degrees)}) as the degrees say"
        )
    if isinstance(bias, Tensor) and bias.shape != (len(out_degrees),):
        raise ValueError(
            f"masked_linear: bias has shape {tuple(bias.shape)}, must be ({len(out_degrees)},) or "
            "None"
        )
    stairs = masks.staircase([in_degrees, out_degrees], strict)
    return made(x, [weight], [bias], stairs)
