"""A VAE of fastflow.vae, and the same model with other implementations of its flow.

All have the same parameters: the flow's modules are replaced in place by ones that hold the same
numbers, in plain PyTorch as tutorials write them, or zuko's. Encoder, decoder, objective and
optimizer stay, so that the whole step is compared and only the flow differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import peers
import torch
from peers import Chain
from torch import Tensor, nn
from torch.nn import functional as F

import fastflow
from fastflow import masks
from fastflow.bijections import Bijection
from fastflow.vae import VAE, negative_elbo
from fastflow.vae.distributed import Team
from fastflow.vae.steps import TrainingStep, fastest, make_optimizer

RATE = 1e-7  # of Adam: too small for thousands of steps on the same images to go anywhere
CONTEXT = 64  # features of an image that an IAF sees
NAMES = ("reconstruction", "kl")


class EagerPlanar(Bijection):
    """An amortised planar chain, step by step."""

    def __init__(self, flow: fastflow.ConditionalPlanarFlow) -> None:
        super().__init__()
        self.features, self.context_features = flow.features, flow.context_features
        self.network = flow.network  # the names of the parameters stay
        self.parameters_of = flow.parameters_of

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return peers.eager_planar(x, *self.parameters_of(context))


class EagerGate(Bijection):
    """A step of an IAF: masks multiplied in, in every pass."""

    def __init__(self, layer: fastflow.MaskedAffineAutoregressive) -> None:
        super().__init__()
        self.features, self.context_features = layer.features, layer.context_features
        self.network, self.shift = layer.network, layer.scale.constants[0]
        for number, mask in enumerate(masks_of(layer)):
            self.register_buffer(f"mask{number}", mask.to(layer.network.layers[0].weight))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        below = x
        for number, layer in enumerate(self.network.layers):
            above = F.linear(below, layer.weight * getattr(self, f"mask{number}"), layer.bias)
            if number == 0:
                above = above + self.network.context_layer(context)
            below = F.elu(above)
        m, a = above.unflatten(-1, (-1, 2)).unbind(-1)
        gate = torch.sigmoid(a + self.shift)
        return gate * x + (1 - gate) * m, F.logsigmoid(a + self.shift).sum(-1)


class ZukoGate(Bijection):
    """A step of an IAF by zuko's masked layer, whose univariate transform is the gate."""

    def __init__(self, layer: fastflow.MaskedAffineAutoregressive) -> None:
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform

        super().__init__()
        self.features, self.context_features = layer.features, layer.context_features
        self.transform = MaskedAutoregressiveTransform(
            layer.features,
            layer.context_features,
            univariate=partial(_gate_transform(), layer.scale.constants[0]),
            hidden_features=layer.network.hidden_features,
            activation=nn.ELU,
        )
        holders = [holder for holder in self.transform.hyper if isinstance(holder, nn.Linear)]
        own = zip(holders, layer.network.layers, masks_of(layer), strict=True)
        with torch.no_grad():
            for number, (holder, source, mask) in enumerate(own):
                weight = source.weight
                if number == 0:  # zuko joins x and the context
                    of_context = layer.network.context_layer.weight
                    weight = torch.cat([weight, of_context], 1)
                    mask = torch.cat([mask, torch.ones_like(of_context, dtype=torch.bool)], 1)
                holder.weight.copy_(weight)
                holder.bias.copy_(source.bias)
                holder.mask.copy_(mask)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(context).call_and_ladj(x)


def _gate_transform() -> type:
    from torch.distributions import Transform, constraints

    class Gate(Transform):
        """s x + (1 - s) m with s = sigmoid(a + shift)."""

        domain = codomain = constraints.real
        bijective, sign = True, +1

        def __init__(self, shift: float, m: Tensor, a: Tensor) -> None:
            super().__init__()
            self.m, self.logit = m, a + shift
            self.gate = torch.sigmoid(self.logit)

        def _call(self, x: Tensor) -> Tensor:
            return self.gate * x + (1 - self.gate) * self.m

        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
            return F.logsigmoid(self.logit)

    return Gate


def masks_of(layer: fastflow.MaskedAffineAutoregressive) -> list[Tensor]:
    """The masks of its network, bool (n_l, n_{l-1}) for every layer."""
    levels = [layer.features, *(holder.out_features for holder in layer.network.layers)]
    return masks.masks(layer.network.stairs, levels)


def replaced(model: VAE, kinds: dict[type[Bijection], Callable[[Bijection], Bijection]]) -> VAE:
    """The model with the layers of its flow replaced, in place."""
    flow = model.posterior.bijection
    if isinstance(flow, fastflow.Chain):
        for number, layer in enumerate(flow.bijections):
            flow.bijections[number] = kinds[type(layer)](layer)
    else:
        model.posterior.bijection = kinds[type(flow)](flow)
    return model


EAGER = {
    fastflow.ConditionalPlanarFlow: EagerPlanar,
    fastflow.MaskedAffineAutoregressive: EagerGate,
}
ZUKO = {fastflow.MaskedAffineAutoregressive: ZukoGate}


def of_model(
    model: VAE,
    x: Tensor,
    noise: Tensor,
    names: Sequence[str],
    context: Callable[[], AbstractContextManager] = nullcontext,
    fast: bool = False,
) -> Chain:
    """A contender of a model: -ELBO's two terms (B,) of images, and a step of training.

    Arguments:
        model: the model.
        x: images (B, pixels).
        noise: shape (B, D).
        names: of the parameters of fastflow's model, in the order of the gradients.
        context: what must be in force while it runs.
        fast: whether the step is the one of `fastflow.vae`, a CUDA graph on a GPU.
    """
    own = dict(model.named_parameters())

    def run() -> tuple[Tensor, Tensor]:
        terms = negative_elbo(model, x, noise)
        return terms.reconstruction, terms.kl

    def collect(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        named = _as_fastflow(dict(zip(own, grads, strict=True)))
        return tuple(named[name] for name in names)

    def step() -> Callable[[object], object]:
        training = TrainingStep(model, make_optimizer(model, RATE), 0.0, Team())
        training.begin(RATE, 1.0)
        move = fastest(training, x.device) if fast else training
        return lambda _: move(x, noise)

    return Chain(run, list(own.values()), collect, context, tuple(names), step=step)


def _as_fastflow(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of zuko's layers under the names that fastflow's have; all others as they are."""
    named = {}
    for name, grad in grads.items():
        prefix, found, rest = name.partition("transform.hyper.")
        if not found:
            named[name] = grad
            continue
        place, _, kind = rest.partition(".")
        layer = int(place) // 2  # every other module is an activation
        if layer == 0 and kind == "weight":
            features = grad.shape[1] - CONTEXT
            grad, named[f"{prefix}network.context_layer.weight"] = (
                grad[:, :features],
                grad[:, features:],
            )
        named[f"{prefix}network.layers.{layer}.{kind}"] = grad
    return named
