"""What every bijection is."""

from __future__ import annotations

from typing import SupportsIndex

from torch import Tensor, nn

from fastflow.functional.checks import as_int, broadcast_batches


class Bijection(nn.Module):
    r"""A differentiable, invertible map of (\*batch, D) onto itself.

    `forward` and `inverse` return the image and the log-determinant of the map just applied,

    .. math:: \mathrm{ladj} = \log\left|\det \frac{\partial y}{\partial x}\right|,

    of shape (\*batch,). The inverse's ladj is minus the forward's at the same pair of points.

    A bijection that takes a context says of how many features, in `context_features`; it requires
    one. All others refuse a context. Bijections made of others take one if any of their members
    does, and give it to those members alone, so that both kinds may be mixed.

    Floating-point types may be mixed: points, context and parameters are promoted together as in
    PyTorch's arithmetic (`torch.promote_types`) and computed with in that type, in float32 at
    least; the image has the promoted type, ladj float32 at least. Autocast rounds what networks
    make of a context, and nothing else. Integer points or contexts are refused.

    A bijection of your own sets `features` and defines both methods, with a context that may be
    None; it then works in `Chain`, `Inverse`, `Flow` and everything built on them.

    Attributes:
        features: D, the size of the last dimension.
        context_features: C, the size of the context's last dimension; 0 if there is no context.

    Example:
        >>> class Scaling(Bijection):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.features = features
        ...         self.log_scale = nn.Parameter(torch.zeros(features))
        ...
        ...     def forward(self, x, context=None):
        ...         return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[:-1])
        ...
        ...     def inverse(self, y, context=None):
        ...         return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-1])
        >>> Flow(Scaling(3)).sample((5,)).shape
        torch.Size([5, 3])
    """

    features: int
    context_features: int = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Maps x to y.

        Arguments:
            x: points, (\*batch, D).
            context: what the map is conditioned on, (\*batch, C), or None if C = 0. The batches of
                x and context broadcast.

        Returns:
            y (\*batch, D) and ladj (\*batch,).

        Raises:
            TypeError: a context is given to a map that takes none, or is missing; points or context
                are no floating-point tensors.
            ValueError: shapes do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Maps y back to x.

        Arguments:
            y: points, (\*batch, D).
            context: as in `forward`.

        Returns:
            x (\*batch, D) and ladj (\*batch,).

        Raises:
            TypeError, ValueError: as `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no inverse")


def positive_int(owner: str, name: str, value: SupportsIndex, least: int = 1) -> int:
    """The value as Python's own int, if it is an integer of any kind no smaller than `least`.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is too small.
    """
    count = as_int(value)
    if count is None:
        raise TypeError(f"{owner}: {name} is {value!r}, must be an integer")
    if count < least:
        raise ValueError(f"{owner}: {name} is {count}, must be at least {least}")
    return count


def check_bijection(owner: str, name: str, value: Bijection) -> None:
    """Raises TypeError unless the value is a bijection that says how many features it has."""
    kind = type(value).__name__
    if not isinstance(value, Bijection):
        raise TypeError(f"{owner}: {name} is a {kind}, must be a fastflow.Bijection")
    if as_int(getattr(value, "features", None)) is None:
        raise TypeError(f"{owner}: {name}, a {kind}, must have an integer attribute `features`")


def check_features(owner: str, name: str, tensor: Tensor | None, features: int) -> None:
    """Raises ValueError unless the last dimension has this size, TypeError if it is no tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(tensor).__name__}, must be a torch.Tensor")
    if not tensor.dim() or tensor.shape[-1] != features:
        raise ValueError(
            f"{owner}: {name} has shape {tuple(tensor.shape)}, must be (..., {features})"
        )


def check_batches(owner: str, name: str, points: Tensor, context: Tensor | None) -> None:
    """Raises ValueError unless the batches of points and of a context, if there is one, fit."""
    if context is not None and points.shape[:-1] != context.shape[:-1]:  # most often they are equal
        broadcast_batches(owner, **{name: points.shape[:-1], "context": context.shape[:-1]})


def check_type(owner: str, name: str, tensor: Tensor, parameter: Tensor) -> None:
    """Raises TypeError unless a tensor can be computed with together with parameters.

    Floating-point types may differ: they are promoted.
    """
    if tensor.dtype != parameter.dtype and not tensor.is_floating_point():
        raise TypeError(f"{owner}: {name} is {tensor.dtype}, must be a floating-point tensor")


def refuse_context(owner: str, context: Tensor | None) -> None:
    """Raises TypeError if a context is given to a map that takes none."""
    if context is not None:
        raise TypeError(
            f"{owner}: context is a {type(context).__name__}, must be None: it takes no context"
        )
