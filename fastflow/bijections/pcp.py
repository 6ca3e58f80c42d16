"""The gradient of a partially input convex network as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastflow.autograd.pcp import gradient_map
from fastflow.bijections.base import Bijection, check_features, positive_int, refuse_context
from fastflow.functional.checks import broadcast_batches, check_tensors
from fastflow.inner import global_hooks, plain
from fastflow.reference.network import softplus
from fastflow.reference.pcp_potential import Network, gradient, hessian
from fastflow.transforms import without_autocast

LEAST_CURVATURE = 1e-3
# A step of Adam moves each parameter by about the learning rate. What training must move far is
# stored divided by a constant, so that such a step moves it further.
SHARPNESS = 12.0  # times the parameters: the U_k
GAIN = 10.0  # times the parameters: what depends on a context, where there is none
CONTEXT_GAIN = 4.0  # times the outputs of a linear layer: the same with a context
START_SHARPNESS = 6.0  # of the U_k: units bend within a sixth of a deviation of normal data
START_CURVATURE = 0.05  # of the network, over sqrt(D); the quadratic has the rest of the identity
START_ROWS = 256  # points and contexts over which this is averaged


class PCPMap(Bijection):
    r"""The gradient of a potential that is convex in x and depends on a context in any way.

    .. math::
        y = \nabla_x P(x; c), \qquad \mathrm{ladj} = \log\det \nabla_x^2 P(x; c)

    The potential is a partially input convex network with a positive definite quadratic; with
    layers k = 1 .. K, :math:`s` = softplus, :math:`w_0 = 0` and :math:`v_0 = c`,

    .. math::
        v_k &= \operatorname{elu}(A_k v_{k-1} + a_k) \\
        w_k &= s\big(W_k (w_{k-1} \circ \alpha_k) + U_k (x \circ \beta_k) + \tau_k\big) \\
        P &= \rho \cdot w_K + \sigma \cdot x + \tfrac12\, x \cdot (\kappa \circ x)

    where :math:`\beta_k, \tau_k` and :math:`\alpha_k \ge 0` are affine in :math:`v_{k-1}`,
    :math:`\rho \ge 0, \sigma` and :math:`\kappa \ge 10^{-3}` in :math:`v_K`, and
    :math:`W_k \ge 0`, what is bounded below through a softplus. Without a context
    :math:`\alpha = \beta = 1` and the others are parameters. So the Jacobian is the Hessian,
    symmetric and positive definite; it is computed in closed form, by matrix products. The inverse
    is a damped Newton iteration that converges from everywhere, down to rounding (see
    `fastflow.reference.pcp_inverse`); its gradients are those of the implicit function theorem.

    It starts near the identity for every context. Parameters are stored divided by constants, so
    that optimizers like Adam at their usual rates, 0.001 and above, move the map far enough.

    Arguments:
        features: D.
        context_features: C, 0 for no context.
        hidden_features: the widths of the layers, at least one; both of w_k and of v_k.

    Attributes:
        inputs: the U_k / 12, (H_k, D).
        weights: the W_k before the softplus, (H_k, H_{k-1}).
        terms: `nn.Linear` layers that make of v_{k-1} a quarter of all that depends on it, v_k
            before the elu included; without a context a tenth of it, as parameters.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.

    Note:
        ladj is NaN in a row whose Hessian is not positive definite to the precision of its type:
        in float32 from condition numbers of about 1e7 on.

        There are kernels for CPUs, the backend "cpp"; all other backends compute it as "reference"
        does.

    Source:
        Wang, Baptista, Marzouk, Ruthotto and Verma, Efficient Neural Network Approaches for
        Conditional Optimal Transport with Applications in Bayesian Inference, 2023, arXiv
        2310.16975 (PCP-Map; its quadratic has one curvature for all features); Amos, Xu and Kolter,
        Input Convex Neural Networks, 2017, arXiv 1609.07152.

    Example:
        >>> layer = PCPMap(2, context_features=5)
        >>> x, context = torch.randn(8, 2), torch.randn(8, 5)
        >>> y, ladj = layer(x, context)
        >>> torch.allclose(layer.inverse(y, context)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self, features: int, context_features: int = 0, hidden_features: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        self.features = positive_int("PCPMap", "features", features)
        self.context_features = positive_int(
            "PCPMap", "context_features", context_features, least=0
        )
        if not isinstance(hidden_features, Sequence) or isinstance(hidden_features, str):
            raise TypeError(f"PCPMap: hidden_features is {hidden_features!r}, must be a sequence")
        widths = [positive_int("PCPMap", "hidden_features", width) for width in hidden_features]
        if not widths:
            raise ValueError("PCPMap: hidden_features is empty, must hold at least one width")
        self.hidden_features = tuple(widths)
        self.inputs = nn.ParameterList([torch.empty(width, features) for width in widths])
        self.weights = nn.ParameterList([torch.empty(b, a) for a, b in pairwise(widths)])
        sizes = [sum(some) for some in self._sizes()]
        if context_features:
            below = [context_features, *widths]
            self.terms = nn.ModuleList(map(nn.Linear, below, sizes))
        else:
            self.terms = nn.ParameterList([torch.empty(size) for size in sizes])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew, near the identity."""
        for matrix in self.inputs:
            matrix.normal_(0, START_SHARPNESS / SHARPNESS / math.sqrt(self.features))
        for matrix in self.weights:
            matrix.normal_()
        terms: list[Any] = list(self.terms)
        biases, gain = terms, GAIN
        if self.context_features:
            biases, gain = [layer.bias for layer in terms], CONTEXT_GAIN
            for layer in terms:
                layer.reset_parameters()
                layer.weight.div_(gain)
                layer.bias.div_(gain)
            terms[-1].weight.mul_(0.01)
        *hidden, top = (bias.split(few) for bias, few in zip(biases, self._sizes()))
        for offset, *conditional in hidden:
            offset.normal_(0, START_SHARPNESS / gain)  # where along x the units bend
            if conditional:
                _, scale, *gate = conditional
                scale.fill_(1 / gain)
                for one in gate:
                    one.fill_(math.log(math.expm1(1)) / gain)
        slope, shift, curvature = top
        for one in top:
            one.zero_()
        # the network with the slopes of softplus(0), and of it as much as there shall be
        bias, bend = self._averages()
        share = START_CURVATURE / (math.sqrt(self.features) * bend.mean())
        slope.copy_(inverse_softplus(share * math.log(2)).expand_as(slope) / gain)
        shift.copy_(-share * bias / gain)
        rest = (1 - share * bend).clamp(min=0.5)
        curvature.copy_(inverse_softplus(rest - LEAST_CURVATURE) / gain)

    _version = 2  # of state dicts; in those of version 1 parameters are not divided by constants

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        if local_metadata.get("version") == 1:
            gain = CONTEXT_GAIN if self.context_features else GAIN
            for name, divisor in (("inputs.", SHARPNESS), ("terms.", gain)):
                for key in state_dict:
                    if key.startswith(prefix + name):
                        state_dict[key] = state_dict[key] / divisor
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _averages(self) -> tuple[Tensor, Tensor]:
        """The network's own gradient and curvature of each feature, (D,) both: their means over
        standard normal points and contexts."""
        like = {"device": self.inputs[0].device, "dtype": self.inputs[0].dtype}
        x, context = torch.randn(START_ROWS, self.features, **like), None
        if self.context_features:
            context = torch.randn(START_ROWS, self.context_features, **like)
        compute = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            x = x.to(compute)
            net = self.network(None if context is None else context.to(compute), compute)
            y, slopes = gradient(x, net)
            matrix, _ = hessian(slopes, net)
        bend = matrix.diagonal(dim1=-2, dim2=-1) - net.curvature
        return (y - net.shift - net.curvature * x).mean(0), bend.mean(0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run("x", x, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run("y", y, context, inverse=True)

    def network(self, context: Tensor | None, dtype: torch.dtype) -> Network:
        r"""The potential at a context (\*batch, C), its terms (\*batch, n), in a floating type."""
        weights = [softplus(matrix.to(dtype)) / matrix.shape[1] for matrix in self.weights]
        inputs = [SHARPNESS * matrix.to(dtype) for matrix in self.inputs]
        offsets, gates, scales, made = [], [], [], []
        v = context
        for terms, sizes in zip(self.terms, self._sizes()):
            if v is None:
                made = GAIN * terms.to(dtype)  # pyright: ignore[reportOperatorIssue]
            else:
                made = CONTEXT_GAIN * _apply(terms, v, self.inputs[0].dtype)
            made = made.split(sizes, -1)
            if len(offsets) == len(inputs):
                break
            offset, *conditional = made
            offsets.append(offset)
            if conditional:
                v, scale, *gate = conditional
                v = nnf.elu(v)
                scales.append(scale)
                gates += [softplus(one) for one in gate]
        slope, shift, curvature = made
        slope = softplus(slope) / math.sqrt(slope.shape[-1])
        curvature = softplus(curvature) + LEAST_CURVATURE
        return Network(inputs, weights, offsets, slope, shift, curvature, gates, scales)

    def _sizes(self) -> list[list[int]]:
        """What `terms` consist of: offset, v, scale and gate; at last slope, shift, curvature."""
        D, widths = self.features, self.hidden_features
        sizes = [[width] for width in widths]
        if self.context_features:
            below = [[], *([width] for width in widths)]
            sizes = [[width, width, D, *gate] for width, gate in zip(widths, below)]
        return [*sizes, [widths[-1], D, D]]

    def _run(
        self, name: str, points: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        tensors: dict[str, Any] = {name: points}
        if self.context_features:
            tensors["context"] = context
        else:
            refuse_context("PCPMap", context)
        check_tensors("PCPMap", **tensors, parameters=self.inputs[0])
        check_features("PCPMap", name, points, self.features)
        if context is not None:
            check_features("PCPMap", "context", context, self.context_features)
        batches = {key: tensor.shape[:-1] for key, tensor in tensors.items()}
        batch = broadcast_batches("PCPMap", **batches)
        dtype = self.inputs[0].dtype
        for tensor in tensors.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        compute = torch.promote_types(dtype, torch.float32)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.expand(*batch, tensor.shape[-1]).reshape(-1, tensor.shape[-1])

        with without_autocast(points.device.type):  # it would round the Hessian
            net = self.network(None if context is None else context.to(compute), compute)
            image, ladj = gradient_map(rows(points.to(compute)), net.map_rows(rows), inverse)
        return image.view(*batch, self.features).to(dtype), ladj.view(batch)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"hidden_features={self.hidden_features}"
        )


def _apply(layer: nn.Module, v: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer of a type at v (*batch, n), in the type of v; called if it is not plain."""
    if type(layer) is nn.Linear and plain(layer) and not global_hooks():
        return nnf.linear(v, layer.weight.to(v.dtype), layer.bias.to(v.dtype))
    return layer(v.to(dtype)).to(v.dtype)


def inverse_softplus(value: Tensor) -> Tensor:
    """The x at which softplus(x) is this."""
    return value.expm1().log()
