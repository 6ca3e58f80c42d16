"""Random masked autoregressive networks and what they mean, in float64, one pass per feature.

A network is described as the raw ops take it: sorted orders and prefixes, the staircase that
fastflow.masks derives from degrees. Here both are drawn at random instead, so that the kernels
meet every staircase that the description allows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("relu", "tanh", "elu", "silu", "gelu", "softplus", "leaky_relu")
SCALES = ("softclip", "softplus", "sigmoid", "clamp", "gate")
CONSTANTS = ((-6.907755278982137, 0.0), (0.3, 1e-3), (2.0, 1e-3), (-1.0, 1.5), (1.0, 0.0))


def softplus(value: Tensor) -> Tensor:
    return value.clamp(min=0) + torch.log1p(torch.exp(-value.abs()))


def activate(value: Tensor, kind: int) -> Tensor:
    name = ACTIVATIONS[kind]
    return softplus(value) if name == "softplus" else getattr(functional, name)(value)


@dataclass(frozen=True)
class Network:
    """The arguments of the ops autoregressive_* (terms, weights, biases, flags) and the masks."""

    terms: list[Tensor]
    weights: list[Tensor]  # masked-out entries are NaN
    biases: list[Tensor]
    orders: list[Tensor]
    prefixes: list[Tensor]
    activation: int
    residual: bool
    scale: int

    @property
    def features(self) -> int:
        return len(self.orders[0])

    @property
    def constants(self) -> tuple[float, float]:
        return CONSTANTS[self.scale]

    @property
    def stairs(self) -> Tensor:
        pairs = zip(self.orders[1:], self.prefixes, strict=True)
        return torch.cat([self.orders[0], *(part for pair in pairs for part in pair)]).int()

    @property
    def masks(self) -> list[Tensor]:
        masks = []
        for inputs, outputs, prefix in zip(
            self.orders[:-1], self.orders[1:], self.prefixes, strict=True
        ):
            mask = torch.zeros(len(outputs), len(inputs), dtype=torch.bool)
            mask[outputs] = inputs.argsort() < prefix[:, None]
            masks.append(mask)
        return masks

    def to(self, dtype: torch.dtype) -> Network:
        lists = {name: getattr(self, name) for name in ("terms", "weights", "biases")}
        return replace(self, **{name: [t.to(dtype) for t in ts] for name, ts in lists.items()})

    def rows(self, which: slice | list[int] | Tensor) -> Network:
        return replace(self, terms=[t[which].contiguous() if t.numel() else t for t in self.terms])

    def flags(self) -> tuple[int, bool, int, float, float]:
        return (self.activation, self.residual, self.scale, *self.constants)

    def layers(self, tensors: list[Tensor]) -> int:
        return sum(1 << index for index, tensor in enumerate(tensors) if tensor.numel())


def network(
    features: int,
    hidden: tuple[int, ...],
    rows: int,
    *,
    activation: int = 0,
    scale: int = 0,
    residual: bool = False,
    shuffled: bool = False,
    ragged: bool = False,
    lowest: int = 1,
    terms: int = 0,
    biases: int = -1,
    spread: float = 1.0,
    seed: int = 0,
) -> Network:
    """A random network in float64. `terms` and `biases` are bit masks of the layers that have one.

    shuffled: every level's units are in random order; ragged: prefixes shorter than the degrees
    allow; lowest: the smallest degree of a hidden unit (0: it sees no feature).
    """
    generator = torch.Generator().manual_seed(seed + 31 * features + 7 * len(hidden) + rows)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    sizes = [features, *hidden, 2 * features]
    degrees = [torch.arange(1, features + 1)]
    for level, size in enumerate(hidden):
        if residual and level >= 2 and level % 2 == 0:
            degrees.append(degrees[-2])
            continue
        low = min(lowest, features - 1)
        draw = torch.randint(low, max(features, low + 1), (size,), generator=generator)
        degrees.append(draw.sort().values)
    degrees.append(torch.arange(features).repeat_interleave(2))
    prefixes = []
    for lower, upper in itertools.pairwise(degrees):
        prefix = torch.searchsorted(lower, upper, right=True)
        if ragged:
            shrink = torch.rand(len(prefix), generator=generator)
            if len(prefixes) == len(hidden):
                shrink = shrink[::2].repeat_interleave(2)
            prefix = (prefix * (0.5 + 0.5 * shrink)).long().cummax(0).values
        prefixes.append(prefix)
    orders = []
    for level, size in enumerate(sizes):
        if residual and level % 2 == 1 and 3 <= level <= len(hidden):
            orders.append(orders[-2])
        else:
            shuffle = torch.randperm(size, generator=generator)
            orders.append(shuffle if shuffled else torch.arange(size))
    net = Network(
        terms=[
            randn(rows, size) if terms >> level & 1 else torch.empty(0, dtype=torch.float64)
            for level, size in enumerate(sizes[1:])
        ]
        if terms
        else [],
        weights=[
            randn(upper, lower) * spread / max(lower, 1) ** 0.5
            for lower, upper in itertools.pairwise(sizes)
        ],
        biases=[
            0.3 * randn(size) if biases >> level & 1 else torch.empty(0, dtype=torch.float64)
            for level, size in enumerate(sizes[1:])
        ],
        orders=orders,
        prefixes=prefixes,
        activation=activation,
        residual=residual,
        scale=scale,
    )
    weights = [w.where(mask, torch.nan) for w, mask in zip(net.weights, net.masks, strict=True)]
    return replace(net, weights=weights)


def raw_outputs(net: Network, x: Tensor) -> Tensor:
    """(B, D, 2): the shift m and the raw scale a of every feature, at x."""
    layers = len(net.weights)
    a, pre = x, []
    for level, (weight, mask) in enumerate(zip(net.weights, net.masks, strict=True), 1):
        p = a @ weight.where(mask, 0).T
        if net.biases[level - 1].numel():
            p = p + net.biases[level - 1]
        if net.terms and net.terms[level - 1].numel():
            p = p + net.terms[level - 1]
        if net.residual and level % 2 == 1 and 3 <= level < layers:
            p = p + pre[level - 3]
        pre.append(p)
        a = p if net.residual and level == layers - 1 else activate(p, net.activation)
    rows = net.orders[-1].view(-1, 2)[net.orders[0].argsort()]
    return pre[-1][:, rows]


def scale_map(net: Network, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """m and l, the log-scale."""
    m, raw = outputs.unbind(-1)
    c0, c1 = net.constants
    kind = SCALES[net.scale]
    if kind == "softclip":
        log_scale = raw / (1 + (raw / c0).abs())
    elif kind == "softplus":
        log_scale = torch.log(softplus(raw + c0) + c1)
    elif kind == "sigmoid":
        log_scale = torch.log(torch.sigmoid(raw + c0) + c1)
    elif kind == "clamp":
        log_scale = raw + (raw.clamp(c0, c1) - raw).detach()
    else:
        log_scale = -softplus(-(raw + c0))
    return m, log_scale


def shift_and_scale(net: Network, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, l (log-scale) and the raw scale a, each (B, D) by feature, at x."""
    outputs = raw_outputs(net, x)
    return *scale_map(net, outputs), outputs[..., 1]


def transform(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and ladj."""
    m, log_scale, raw = shift_and_scale(net, x)
    if SCALES[net.scale] == "gate":
        m = m * torch.sigmoid(-(raw + net.constants[0]))
    return log_scale.exp() * x + m, log_scale.sum(1)


def unrolled_inverse(net: Network, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and its ladj by one pass of the network per feature, differentiable."""
    columns = [torch.zeros(y.shape[0], dtype=y.dtype)] * net.features
    for feature in net.orders[0].tolist():
        m, log_scale, _ = shift_and_scale(net, torch.stack(columns, 1))
        shift, shrink = m[:, feature], torch.exp(-log_scale[:, feature])
        difference = (y[:, feature] - shift) * shrink
        gate = SCALES[net.scale] == "gate"
        columns[feature] = shift + difference if gate else difference
    x = torch.stack(columns, 1)
    return x, -shift_and_scale(net, x)[1].sum(1)
