"""Random networks for the raw ops made and autoregressive, and their results in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

OPS = torch.ops.fastflow
ACTIVATIONS = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "softplus": lambda v: v.clamp_min(0) + torch.log1p(torch.exp(-v.abs())),
    "leaky_relu": F.leaky_relu,
}
SCALES = {
    "softclip": (math.log(1e-3), 0.0),
    "softplus": (math.log(math.e - 1), 1e-3),
    "softplus0": (0.0, 0.0),
    "sigmoid": (2.0, 1e-3),
    "sigmoid0": (1.0, 0.0),
    "clamp": (-5.0, 3.0),
    "gate": (1.5, 0.0),
}
KINDS = {"softclip": 0, "softplus": 1, "softplus0": 1, "sigmoid": 2, "sigmoid0": 2} | {
    "clamp": 3,
    "gate": 4,
}


@dataclass
class Case:
    """A random network with random stairs. Masked-out weights are inf or NaN."""

    batch: int
    sizes: tuple[int, ...]  # D, H_1 .. H_L, N
    activation: str = "tanh"
    residual: bool = False
    scale: str | None = None
    sorted: bool = False
    terms: str = "some"  # none, some
    dtype: torch.dtype = torch.float64
    seed: int = 0
    names: tuple[str, ...] = field(default=("x", "terms", "weights", "biases"), repr=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(self.dtype)

        def order(n: int, identity: bool) -> Tensor:
            return torch.arange(n) if identity else torch.randperm(n, generator=random)

        sizes, layers = self.sizes, len(self.sizes) - 1
        self.orders = [order(n, self.sorted and 0 < i < layers) for i, n in enumerate(sizes)]
        self.prefixes, self.masks = [], []
        degrees = [torch.arange(1, sizes[0] + 1)]  # how many features a unit depends on
        for layer, (columns, rows) in enumerate(itertools.pairwise(sizes)):
            prefix = torch.randint(0, columns + 1, (rows,), generator=random).sort().values
            skip = self.residual and 2 <= layer < layers - 1 and layer % 2 == 0
            if skip:
                self.orders[layer + 1] = self.orders[layer - 1]
            if self.scale:  # the op refuses outputs that see their own feature
                degree = torch.randint(0, sizes[0], (rows,), generator=random).sort().values
                degree = degrees[layer - 1] if skip else degree
                if layer == layers - 1:
                    degree = torch.arange(sizes[0]).repeat_interleave(2)
                prefix = torch.searchsorted(degrees[-1], degree, right=True)
                degrees.append(degree)
            self.prefixes.append(prefix)
        for layer, (columns, rows) in enumerate(itertools.pairwise(sizes)):
            mask = torch.zeros(rows, columns, dtype=torch.bool)
            seen = torch.arange(columns) < self.prefixes[layer][:, None]
            mask[self.orders[layer + 1][:, None], self.orders[layer][None, :]] = seen
            self.masks.append(mask)
        self.stairs = torch.cat(
            [self.orders[0]]
            + [part for pair in zip(self.orders[1:], self.prefixes, strict=True) for part in pair]
        ).to(torch.int32)
        self.x = normal(self.batch, sizes[0])
        hole = torch.tensor([math.inf, -math.inf, math.nan], dtype=self.dtype)
        self.weights = []
        for mask in self.masks:
            rows, columns = mask.shape
            holes = hole[torch.randint(0, 3, mask.shape, generator=random)]
            weight = normal(rows, columns) * columns**-0.5 * 1.5
            self.weights.append(torch.where(mask, weight, holes))
        self.biases = [
            normal(rows) if self.terms == "none" or layer % 3 != 1 else normal(0)
            for layer, rows in enumerate(sizes[1:])
        ]
        self.term_list = [
            normal(self.batch, rows) if self.terms == "some" and layer % 2 == 0 else normal(0)
            for layer, rows in enumerate(sizes[1:])
        ]
        if self.terms == "none":
            self.term_list = []

    @property
    def constants(self) -> tuple:
        kind = list(ACTIVATIONS).index(self.activation)
        if self.scale is None:
            return (self.stairs, kind, self.residual)
        return (self.stairs, kind, self.residual, KINDS[self.scale], *SCALES[self.scale])

    @property
    def bits(self) -> tuple[int, int]:
        """terms_grad and biases_given."""
        terms = sum(1 << i for i, term in enumerate(self.term_list) if term.numel())
        return terms, sum(1 << i for i, bias in enumerate(self.biases) if bias.numel())

    def forward(self, x: Tensor | None = None, save: bool = True) -> tuple[Tensor, ...]:
        op = OPS.made_forward if self.scale is None else OPS.autoregressive_forward
        x = self.x if x is None else x
        return op(x, self.term_list, self.weights, self.biases, *self.constants, save)

    def backward(
        self,
        cotangents: list[Tensor],
        saved: Tensor,
        x_grad: bool = True,
        param_grads: bool = True,
    ) -> tuple:
        op = OPS.made_backward if self.scale is None else OPS.autoregressive_backward
        flags = (*self.bits, x_grad, param_grads)
        return op(*cotangents, self.x, saved, self.weights, *self.constants, *flags)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """(y, ladj), and the leaves x, weights, biases, terms they were computed from."""
        leaf = [
            [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
            for tensors in ([self.x], self.weights, self.biases, self.term_list)
        ]
        (x,), weights, biases, terms = leaf
        activate = ACTIVATIONS[self.activation]
        layers = len(weights)
        a, before = x, []
        for layer, (weight, mask) in enumerate(zip(weights, self.masks, strict=True)):
            p = F.linear(a, torch.where(mask, weight, 0))
            if biases[layer].numel():
                p = p + biases[layer]
            if terms and terms[layer].numel():
                p = p + terms[layer]
            if self.residual and layer >= 2 and layer % 2 == 0 and layer < layers - 1:
                p = p + before[-2]
            before.append(p)
            linear = layer == layers - 1 or (self.residual and layer == layers - 2)
            a = p if linear else activate(p)
        leaves = [tensor for tensors in leaf for tensor in tensors]
        if self.scale is None:
            return [a], leaves
        rows, feature = self.orders[-1], self.orders[0]
        shift = torch.zeros_like(x).index_copy(1, feature, a[:, rows[0::2]])
        raw = torch.zeros_like(x).index_copy(1, feature, a[:, rows[1::2]])
        c0, c1 = SCALES[self.scale]
        softplus = ACTIVATIONS["softplus"]
        if self.scale == "softclip":
            log_scale = raw / (1 + (raw / c0).abs())
        elif self.scale in ("softplus", "softplus0"):
            log_scale = (softplus(raw + c0) + c1).log()
        elif self.scale == "sigmoid":
            log_scale = (torch.sigmoid(raw + c0) + c1).log()
        elif self.scale == "clamp":
            log_scale = raw + (raw.clamp(c0, c1) - raw).detach()
        else:
            log_scale = -softplus(-(raw + c0))
        if self.scale == "gate":
            shift = torch.sigmoid(-(raw + c0)) * shift
        return [log_scale.exp() * x + shift, log_scale.sum(1)], leaves

    def cotangents(self, outputs: list[Tensor]) -> list[Tensor]:
        random = torch.Generator().manual_seed(self.seed + 1)
        return [
            torch.randn(out.shape, generator=random, dtype=torch.float64).to(self.dtype)
            for out in outputs
        ]


def flatten(gradients: tuple) -> list[Tensor]:
    """x, weights, biases, terms: the order of Case.reference."""
    dx, dterms, dweights, dbiases = gradients
    return [dx, *dweights, *dbiases, *dterms]
