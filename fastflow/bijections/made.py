"""Masked autoregressive networks as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow import masks
from fastflow.autograd.context import ContextTerm, plain_linear
from fastflow.bijections.arranged import Arranged
from fastflow.bijections.base import (
    check_batches,
    check_features,
    check_type,
    positive_int,
    refuse_context,
)
from fastflow.functional.made import made
from fastflow.functional.network import check_activation
from fastflow.inner import ModuleList, call_masked, plain_tensors, settled_tensors
from fastflow.notices import warn
from fastflow.reference.network import ACTIVATIONS, activates, reach, skips


class MADE(Arranged):
    r"""A network whose outputs for a feature see the features before it, and the context, only.

    .. math:: o_i = \mathrm{net}_i(x_{j}: \mathrm{order}_j < \mathrm{order}_i;\ c)

    Every hidden unit has a degree, the last feature that it may see; units are stored sorted by
    degree. The context enters the first hidden layer by a dense layer, where some units see nothing
    else (degree 0), so that it reaches every output, those of the first feature included.

    Arguments:
        features: D.
        params_per_feature: P, the number of outputs for a feature.
        hidden_features: widths of the hidden layers; () for a masked linear map. With one feature
            and no context there are none, as their units would see nothing.
        context_features: C, 0 for no context.
        activation: relu, tanh, elu, silu, gelu, softplus or leaky_relu.
        order: the place of every feature in the order: None (natural), "reverse", "random" (drawn
            now), or each of 0 .. D-1 once. It becomes a buffer.
        residual: the hidden layers form, in pairs, blocks h + W'act(W act(h) + b) + b' after a
            first masked layer of their width; an even number of equal widths.
        adjacency: instead of an order, which features each one sees: bool (D, D), [i, j] says that
            feature i sees feature j. No feature may see itself, through others either. It becomes a
            buffer. Hidden units stand for the sets of features in the matrix
            (`fastflow.masks.adjacency_masks`), and the reference computes the network.

    Attributes:
        layers: `nn.Linear` holders of the weights; masked-out weights keep their values and get a
            gradient of exactly zero.
        context_layer: `nn.Linear` without bias, or None.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.

    Warns:
        UserWarning: a hidden layer has fewer units than there are degrees, or sets of features in
            the adjacency, so that some features do not see those right before them. A flow of many
            layers says so once.

    Source:
        Germain, Gregor, Murray and Larochelle, MADE: Masked Autoencoder for Distribution
        Estimation, 2015, arXiv 1502.03509.

    Example:
        >>> net = MADE(3, params_per_feature=2, hidden_features=(32, 32), context_features=5)
        >>> net(torch.randn(8, 3), torch.randn(8, 5)).shape
        torch.Size([8, 3, 2])
    """

    stairs: Tensor  # where there is an order

    def __init__(
        self,
        features: int,
        params_per_feature: int,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        order: str | Sequence[int] | Tensor | None = None,
        residual: bool = False,
        adjacency: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.features = positive_int("MADE", "features", features)
        self.params_per_feature = positive_int("MADE", "params_per_feature", params_per_feature)
        self.context_features = positive_int("MADE", "context_features", context_features, least=0)
        self.activation = check_activation("MADE", activation)
        self.residual = bool(residual)
        self.hidden_features = _widths(hidden_features, self.residual)
        if order is not None and adjacency is not None:
            raise ValueError("MADE: order and adjacency are both given, must be one of them")
        if self.features == 1 and not self.context_features:  # no unit would see anything
            self.hidden_features, self.residual = [], False
        inner = self.hidden_features[:1] * self.residual + self.hidden_features
        widths = [self.features, *inner, self.features * self.params_per_feature]
        self.layers = ModuleList(map(nn.Linear, widths, widths[1:]))
        self.context_layer = None
        if self.context_features:
            self.context_layer = nn.Linear(self.context_features, widths[1], bias=False)
        try:
            if adjacency is None:
                self._arrange("order", masks.ranks(order, self.features))
            else:
                self._arrange("adjacency", masks.adjacency(adjacency, self.features))
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"MADE: {problem}") from None
        self._warn_of_unseen()

    def reset_parameters(self) -> None:
        """Draws the parameters anew; restores the order or adjacency drawn, given or loaded."""
        for layer in self.layers:
            layer.reset_parameters()
        if self.context_layer is not None:
            self.context_layer.reset_parameters()
        super().reset_parameters()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The outputs for every feature.

        Arguments:
            x: points, (\*batch, D).
            context: (\*batch, C), or None if C = 0. The batches of x and context broadcast.

        Returns:
            (\*batch, D, P).
        """
        check_features("MADE", "x", x, self.features)
        network = self.network(context)
        check_batches("MADE", "x", x, context)
        outputs = self._by_calls(x, context) if network is None else made(x, **network)
        return outputs.unflatten(-1, (self.features, self.params_per_feature))

    def network(self, context: Tensor | None, owner: str = "MADE") -> dict[str, Any] | None:
        """The network at a context, as the arguments of `fastflow.functional.made` after x.

        None where modules inside must be called, since they have hooks: `forward` does that.

        Arguments:
            context: as in `forward`.
            owner: who was given the context, for the errors.

        Raises:
            TypeError, ValueError: the context does not fit.
            TypeError: one of `layers` is computed by something that cannot be masked: another
                module in its place, or another `forward`.
        """
        # not by attribute: in a small model, modules' __getattr__ takes longer than the network
        layers: list[Any] = [*self._modules["layers"]._modules.values()]  # pyright: ignore[reportOptionalMemberAccess]
        held = plain_tensors(layers)
        if held is None:
            prefix = "network." * (owner != "MADE")
            held = settled_tensors(owner, f"{prefix}layers", layers)
        terms, context_layer = None, self._modules.get("context_layer")
        if context_layer is None:
            refuse_context(owner, context)
        else:
            if not isinstance(context, Tensor):
                got = "None" if context is None else f"a {type(context).__name__}"
                raise TypeError(
                    f"{owner}: context is {got}, must be a tensor (*batch, {self.context_features})"
                )
            check_features(owner, "context", context, self.context_features)
            own = held[0][0] if held else layers[0].weight
            check_type(owner, "context", context, own)
            if held is None:
                pass  # it is called with the others
            elif plain_linear(context_layer):
                terms = ContextTerm.of(context_layer, context)
            else:
                context = context.to(own.dtype)  # it may refuse a mix
                terms = [context_layer(context), *[None] * (len(layers) - 1)]
        if held is None:
            return None
        weights, biases = held
        return {
            "weights": weights,
            "biases": biases,
            "stairs": self._buffers["stairs"] if self._by_degrees else self.masks(),
            "terms": terms,
            "activation": self.activation,
            "residual": self.residual,
        }

    def _by_calls(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The outputs (*batch, D P) by calls of all modules inside, with their hooks."""
        hidden, act = len(self.layers) - 1, ACTIVATIONS[self.activation].value
        found: list[Tensor] = []
        if context is not None:
            x = x.to(torch.promote_types(x.dtype, context.dtype))
        for level, (layer, mask) in enumerate(zip(self.layers, self.masks()), 1):
            p = call_masked(layer, mask, x)
            if level == 1 and self.context_layer is not None:
                dtype = layer.weight.dtype  # it may refuse a mix
                p = p + self.context_layer(context.to(dtype))  # pyright: ignore[reportOptionalMemberAccess]
            if skips(level, hidden, self.residual):
                p = p + found[level - 3]
            found.append(p)
            x = act(p) if activates(level, hidden, self.residual) else p
        return found[-1]

    def degrees(self) -> list[Tensor]:
        """The degrees of the units of every level, int64: features 1 .. D, hidden, outputs.

        Raises:
            TypeError: the network has an adjacency matrix instead.
        """
        if not self._by_degrees:
            raise TypeError("MADE: a network with an adjacency matrix has no degrees")
        own = self._arranged + 1
        lowest = 0 if self.context_features else 1
        hidden = [
            masks.hidden_degrees(layer.out_features, self.features, lowest)
            for layer in self.layers[:-1]
        ]
        return [own, *hidden, own.repeat_interleave(self.params_per_feature)]

    def masks(self) -> list[Tensor]:
        """What the units of every layer see of the level below: bool (n_l, n_{l-1})."""
        if self._by_degrees:
            widths = [self.features, *(layer.out_features for layer in self.layers)]
            return masks.masks(self.stairs, widths)
        return [getattr(self, f"mask_{number}") for number in range(len(self.layers))]

    @property
    def _by_degrees(self) -> bool:
        return self._arrangement == "order"

    def _checked(self, value: Tensor) -> Tensor:
        check = masks.ranks if self._by_degrees else masks.adjacency
        return check(value, self.features)

    def _derived(self) -> dict[str, Tensor]:
        if self._by_degrees:
            return {"stairs": masks.staircase(self.degrees())}
        found = masks.adjacency_masks(
            self._arranged,
            [layer.out_features for layer in self.layers[:-1]],
            self.params_per_feature,
            context=self.context_features > 0,
        )
        return {f"mask_{number}": mask for number, mask in enumerate(found)}

    def _warn_of_unseen(self) -> None:
        lost = self._unseen_by_degrees() if self._by_degrees else self._unseen_by_adjacency()
        if lost:
            warn(f"MADE: {lost}", kind="unseen")

    def _unseen_by_adjacency(self) -> str:
        seen = reach(list(self._derived().values()), self.residual)
        lost = (self._arranged & ~seen[:: self.params_per_feature]).nonzero().tolist()
        if not lost:
            return ""
        pairs = ", ".join(f"{i} does not see {j}" for i, j in lost[:8])
        return (
            f"hidden layers {tuple(self.hidden_features)} are too narrow for the "
            f"adjacency: feature {pairs}" + ", .." * (len(lost) > 8)
        )

    def _unseen_by_degrees(self) -> str:
        lowest = 0 if self.context_features else 1
        by_rank = self._arranged.argsort().tolist()
        layers = []
        for number, width in enumerate(self.hidden_features):
            missing = masks.unseen(
                masks.hidden_degrees(width, self.features, lowest), self.features, lowest
            )
            names = [by_rank[degree - 1] for degree in missing if degree]
            if not missing:
                continue
            lost = ["the context does not reach the first feature"] * (0 in missing)
            if names:
                shown = ", ".join(map(str, names[:8])) + (", .." if len(names) > 8 else "")
                lost.append(
                    f"the features that come right after feature {shown} in the order do not see it"
                )
            layers.append(
                f"hidden layer {number} has {width} units for "
                f"{self.features - min(lowest, self.features - 1)} degrees: {'; '.join(lost)}"
            )
        return "; ".join(layers)

    def extra_repr(self) -> str:
        text = f"features={self.features}, params_per_feature={self.params_per_feature}"
        text += f", hidden_features={tuple(self.hidden_features)}"
        if self.context_features:
            text += f", context_features={self.context_features}"
        return f"{text}, activation={self.activation!r}" + ", residual=True" * self.residual


def _widths(hidden_features: Sequence[int], residual: bool) -> list[int]:
    if not isinstance(hidden_features, Sequence) or isinstance(hidden_features, str):
        raise TypeError(f"MADE: hidden_features is {hidden_features!r}, must be a sequence")
    widths = [positive_int("MADE", "hidden_features", width) for width in hidden_features]
    if residual and (not widths or len(widths) % 2 or len(set(widths)) > 1):
        raise ValueError(
            f"MADE: hidden_features is {tuple(widths)}, must be an even number of equal widths "
            "where residual is True"
        )
    return widths
