"""Affine autoregressive layers of fastflow and of its peers, all with the same masks and weights.

The peers agree on the layer, not on how they store it: the rows of the last layer come in another
order, the context's columns stand before or after the features', and every one has its own map from
a to the scale. So one network is drawn, written into each of them together with its masks (a
product with other zeros costs the same), and fastflow's layer is given the scale map of the peer it
is compared with: a `Form`.

Every contender is a `Chain` whose gradients come back as those of `Network.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from peers import Chain, softplus
from torch import Tensor, nn
from torch.nn import functional as F

import fastflow
from fastflow import masks, scales

ACTIVATIONS = {"relu": (torch.relu, nn.ReLU), "tanh": (torch.tanh, nn.Tanh)}


@dataclass(frozen=True)
class Form:
    """The formulas of a layer.

    Arguments:
        scale: the map from a to the scale.
        residual: the hidden layers form blocks h + W' act(W act(h) + b) + b' after a first one.
        active_context: the first hidden layer adds act(V c + v), not V c.
    """

    scale: scales.Scale
    residual: bool = False
    active_context: bool = False


PLAIN = Form(scales.SoftClip(slope=1e-3))
FORMS = {
    "zuko": PLAIN,
    "nflows": Form(scales.Softplus(offset=0.0, minimum=1e-3), active_context=True),
    # normflows' layers without blocks have no activation after the first layer: no MLP to compare
    "normflows": Form(scales.Sigmoid(offset=2.0, minimum=1e-3), residual=True),
    "pyro": Form(scales.Clamp(-5.0, 3.0)),
}


@dataclass(frozen=True)
class Network:
    """One network with its numbers, and where it is evaluated.

    Arguments:
        form: its formulas.
        activation: "relu" or "tanh".
        hidden: L, the number of hidden layers.
        masks: bool (n_l, n_{l-1}) for every layer l = 1 .. L + 1.
        tensors: x (B, D) first, which is y for an inverse; then W1, b1, .. for every layer, and
            context (B, C), V (H, C) and, where the context's part is activated, v (H,).
    """

    form: Form
    activation: str
    hidden: int
    masks: list[Tensor]
    tensors: dict[str, Tensor]

    def at(self, x: Tensor) -> Network:
        """The same network at other points."""
        return replace(self, tensors=self.tensors | {"x": x})

    def double(self) -> Network:
        tensors = {name: tensor.double() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients."""
        return tuple(f"d{name}" for name in self.tensors)


def draw(
    rows: int,
    features: int,
    widths: Sequence[int],
    context: int,
    activation: str,
    form: Form,
    device: torch.device,
) -> Network:
    """A network whose units are of order 1 and whose scales are moderate, at random points."""
    if form.residual:
        widths = widths[:1] * max(2, len(widths) // 2 * 2)
    layer = _layer(features, widths, context, activation, form)
    levels = [features, *(holder.out_features for holder in layer.network.layers)]
    seen = masks.masks(layer.network.stairs, levels)
    generator = torch.Generator().manual_seed(features + sum(widths))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"x": randn(rows, features)}
    for number, mask in enumerate(seen, 1):
        gain = 0.3 if number == len(seen) else 1.0
        fan = mask.sum(1, keepdim=True).clamp(min=1)
        tensors[f"W{number}"] = gain * randn(*mask.shape) / fan**0.5
        tensors[f"b{number}"] = 0.1 * randn(len(mask))
    if context:
        tensors |= {"context": randn(rows, context), "V": randn(levels[1], context) / context**0.5}
        if form.active_context:
            tensors["v"] = 0.1 * randn(levels[1])
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Network(form, activation, len(seen) - 1, [mask.to(device) for mask in seen], tensors)


# fastflow


def fastflow_layer(network: Network, backend: str, inverse: bool) -> Chain:
    """`fastflow.MaskedAffineAutoregressive` on one backend."""
    t = network.tensors
    own = network.form.residual  # its first layer is not among the layer's hidden_features
    widths = [t[f"W{number}"].shape[0] for number in range(1 + own, network.hidden + 1)]
    context = t["V"].shape[1] if "V" in t else 0
    layer = _layer(t["x"].shape[1], widths, context, network.activation, network.form).to(t["x"])
    holders = list(layer.network.layers)
    own_context = layer.network.context_layer
    if network.form.active_context and context:  # what a layer converted from nflows looks like
        own_context = nn.Linear(context, widths[0]).to(t["x"])
        activation = ACTIVATIONS[network.activation][1]()
        layer.network.context_layer = nn.Sequential(own_context, activation)
    direction = layer.inverse if inverse else layer.forward
    chain = _of_module(network, Layout(), holders, own_context, direction)
    return replace(chain, context=lambda: fastflow.use_backend(backend))


def _layer(
    features: int, widths: Sequence[int], context: int, activation: str, form: Form
) -> fastflow.MaskedAffineAutoregressive:
    return fastflow.MaskedAffineAutoregressive(
        *(features, tuple(widths), context, activation), residual=form.residual, scale=form.scale
    )


# Plain PyTorch


def outputs(
    network: Network, t: dict[str, Tensor], x: Tensor, dense: bool = False
) -> tuple[Tensor, Tensor]:
    """Shift and log-scale (B, D) of a masked network as it is usually written.

    With `dense` the masks are left out: right only where the weights are zero already.
    """
    activation, L = ACTIVATIONS[network.activation][0], network.hidden
    below, levels = x, []
    for number in range(1, L + 2):
        weight = t[f"W{number}"]
        if not dense:
            weight = weight * network.masks[number - 1]
        p = F.linear(below, weight, t[f"b{number}"])
        if number == 1 and "V" in t:
            term = F.linear(t["context"], t["V"], t.get("v"))
            p = p + (activation(term) if network.form.active_context else term)
        if network.form.residual and number % 2 and 3 <= number <= L:
            p = p + levels[-2]
        levels.append(p)
        below = p if network.form.residual and number == L else activation(p)
    m, a = levels[-1].unflatten(-1, (-1, 2)).unbind(-1)
    return m, log_scale(a, network.form.scale)


def log_scale(a: Tensor, scale: scales.Scale) -> Tensor:
    """log s(a), by the formulas of `fastflow.scales`."""
    c0, c1 = scale.constants
    if isinstance(scale, scales.SoftClip):
        return a / (1 + (a / c0).abs())
    if isinstance(scale, scales.Softplus):
        return torch.log(softplus(a + c0) + c1)
    if isinstance(scale, scales.Sigmoid):
        return torch.log(torch.sigmoid(a + c0) + c1)
    assert isinstance(scale, scales.Clamp)
    return a + (a.clamp(c0, c1) - a).detach()


def eager(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The parallel direction: y (B, D) and ladj (B,)."""
    m, l = outputs(network, t, t["x"])  # noqa: E741
    return t["x"] * l.exp() + m, l.sum(-1)


def dense(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same without masks: what any dense network of these widths costs."""
    m, l = outputs(network, t, t["x"], dense=True)  # noqa: E741
    return t["x"] * l.exp() + m, l.sum(-1)


def eager_inverse(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse as libraries compute it: D passes, each gets one more feature right."""
    x = torch.zeros_like(t["x"])
    for _ in range(x.shape[-1]):
        m, l = outputs(network, t, x)  # noqa: E741
        x = (t["x"] - m) * (-l).exp()
    return x, -l.sum(-1)


def jacobi_inverse(network: Network, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same iteration, ended as soon as nothing changes any more."""
    x = torch.zeros_like(t["x"])
    for _ in range(x.shape[-1]):
        m, l = outputs(network, t, x)  # noqa: E741
        before, x = x, (t["x"] - m) * (-l).exp()
        if torch.equal(before, x):
            break
    return x, -l.sum(-1)


def of_function(network: Network, function: Callable[..., tuple[Tensor, Tensor]]) -> Chain:
    """A contender that is a function of the network and its tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in network.tensors.values()]

    def run() -> tuple[Tensor, Tensor]:
        return function(network, dict(zip(network.tensors, leaves)))

    return Chain(run, leaves, names=network.gradients)


def compiled(network: Network) -> Chain:
    """`eager` under torch.compile, for these shapes; it compiles while it is being checked."""
    torch.compiler.reset()
    return of_function(network, torch.compile(eager, fullgraph=True, dynamic=False))


def dense_chain(network: Network) -> Chain:
    """`dense` on weights that were masked beforehand; the masks return for its gradients."""
    seen = {f"W{number}": mask for number, mask in enumerate(network.masks, 1)}
    tensors = {name: t * seen[name] if name in seen else t for name, t in network.tensors.items()}

    def collect(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        each = zip(network.tensors, grads, strict=True)
        return tuple(grad * seen[name] if name in seen else grad for name, grad in each)

    return replace(of_function(replace(network, tensors=tensors), dense), collect=collect)


def inverse_and_gradients(
    network: Network, cotangents: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """What the inverse must return, without D passes: fixed points both ways.

    With x = f^-1(y) and gx the cotangent of x, dy solves J' dy = gx, where J = df/dx = diag(s) + N.
    N is strictly triangular, so dy <- (gx - N' dy) / s no longer changes after D rounds at most.

    Arguments:
        network: at y.
        cotangents: of x and of the inverse's ladj; None for the outputs alone.
    """
    with torch.no_grad():
        x, ladj = jacobi_inverse(network, network.tensors)
    found = {"x": x, "ladj": ladj}
    if cotangents is None:
        return found
    leaves = {name: t.detach().requires_grad_() for name, t in network.at(x).tensors.items()}
    start, (dx, dladj) = leaves["x"], cotangents
    m, l = outputs(network, leaves, start)  # noqa: E741
    y, ladj, s = x * l.exp() + m, l.sum(-1), l.detach().exp()  # x is constant: dy/dx is N
    (through,) = torch.autograd.grad(ladj, start, -dladj, retain_graph=True)
    gx = dx + through
    dy = gx / s
    for _ in range(x.shape[-1]):
        (product,) = torch.autograd.grad(y, start, dy, retain_graph=True)
        before, dy = dy, (gx - product) / s
        if torch.equal(before, dy):
            break
    others = [leaf for name, leaf in leaves.items() if name != "x"]
    rest = torch.autograd.grad((y, ladj), others, (-dy, -dladj))
    return found | dict(zip(network.gradients, (dy, *rest)))


# Peers


@dataclass(frozen=True)
class Layout:
    """How a library stores a network.

    Arguments:
        theirs, ours: reorder the rows of the last layer, there and back. Ours are m_1, a_1, m_2, ..
        context_first: where the context is joined to x: before or after it.
    """

    theirs: Callable[[Tensor], Tensor] = lambda rows: rows
    ours: Callable[[Tensor], Tensor] = lambda rows: rows
    context_first: bool = False


def swapped(rows: Tensor) -> Tensor:
    """m_1, a_1, m_2, .. as a_1, m_1, a_2, .., and back."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def blocked(rows: Tensor) -> Tensor:
    """m_1, a_1, m_2, .. as m_1, .., m_D, a_1, .., a_D."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def interleaved(rows: Tensor) -> Tensor:
    """`blocked` undone."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def zuko(network: Network, inverse: bool) -> Chain:
    """zuko.flows.MaskedAutoregressiveTransform: x and c joined; m before a."""
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform

    features, widths, context = _sizes(network)
    activation = ACTIVATIONS[network.activation][1]
    transform = MaskedAutoregressiveTransform(
        features, context, hidden_features=widths, activation=activation
    )
    holders = [holder for holder in transform.hyper if isinstance(holder, nn.Linear)]

    def run(x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        at = transform(c)
        return at.inv.call_and_ladj(x) if inverse else at.call_and_ladj(x)

    return _of_module(network, Layout(), holders, None, run)


def nflows(network: Network, inverse: bool) -> Chain:
    """nflows' MaskedAffineAutoregressiveTransform without residual blocks, as sbi sets it up."""
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    return _nflows_like(MaskedAffineAutoregressiveTransform, network, inverse)


def normflows(network: Network, inverse: bool) -> Chain:
    """normflows.flows.MaskedAffineAutoregressive with residual blocks."""
    from normflows.flows import MaskedAffineAutoregressive

    return _nflows_like(MaskedAffineAutoregressive, network, inverse)


def _nflows_like(layer: Callable[..., nn.Module], network: Network, inverse: bool) -> Chain:
    """a before m; a layer of its own for the context."""
    features, widths, context = _sizes(network)
    blocks = len(widths) - 1
    module = layer(
        *(features, widths[0], context or None),
        num_blocks=blocks // 2 if network.form.residual else blocks,
        use_residual_blocks=network.form.residual,
        activation=ACTIVATIONS[network.activation][0],
    )
    net = module.autoregressive_net
    holders = [net.initial_layer]
    for block in net.blocks:
        holders += block.linear_layers if network.form.residual else [block.linear]
    holders.append(net.final_layer)
    own = net.context_layer if context else None
    direction = module.inverse if inverse else module.forward
    return _of_module(network, Layout(swapped, swapped), holders, own, direction)


def pyro(network: Network, inverse: bool) -> Chain:
    """Pyro's AffineAutoregressive, or the conditional one: c and x joined; all m before all a."""
    from pyro.distributions import transforms
    from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN

    features, widths, context = _sizes(network)
    activation = ACTIVATIONS[network.activation][1]()
    options = {"permutation": torch.arange(features), "nonlinearity": activation}
    if context:
        net = ConditionalAutoRegressiveNN(features, context, list(widths), **options)
        conditional = transforms.ConditionalAffineAutoregressive(net)
    else:
        net = AutoRegressiveNN(features, list(widths), **options)
        unconditional = transforms.AffineAutoregressive(net)

    def run(x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        transform = unconditional if c is None else conditional.condition(c)
        # Given the tensor of the call before it answers from its cache: the view is a new tensor,
        # as a training step's is.
        x = x.view_as(x)
        if inverse:
            found = transform.inv(x)
            return found, -transform.log_abs_det_jacobian(found, x)
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)

    layout = Layout(blocked, interleaved, context_first=True)
    return _of_module(network, layout, list(net.layers), None, run)


PEERS = {"zuko": zuko, "nflows": nflows, "normflows": normflows, "pyro": pyro}


def _sizes(network: Network) -> tuple[int, tuple[int, ...], int]:
    """D, the widths of the hidden layers, C."""
    t = network.tensors
    widths = tuple(t[f"W{number}"].shape[0] for number in range(1, network.hidden + 1))
    return t["x"].shape[1], widths, t["V"].shape[1] if "V" in t else 0


def _of_module(
    network: Network,
    layout: Layout,
    holders: list[nn.Linear],
    own_context: nn.Linear | None,
    run: Callable[..., tuple[Tensor, Tensor]],
) -> Chain:
    """Writes the network into a module's layers and makes a contender of it.

    Arguments:
        network: the numbers.
        layout: where the module has them.
        holders: its masked layers, first to last.
        own_context: its layer for the context; None if there is none or the context is joined to x.
        run: its direction, a function of x and the context.
    """
    t = network.tensors
    joined = "V" in t and own_context is None
    last = len(holders) - 1
    for number, holder in enumerate(holders):
        weight, mask = t[f"W{number + 1}"], network.masks[number]
        if joined and number == 0:
            weight = _join(weight, t["V"], layout)
            mask = _join(mask, torch.ones_like(t["V"], dtype=torch.bool), layout)
        place = layout.theirs if number == last else (lambda rows: rows)
        holder.to(t["x"])  # also the buffers
        with torch.no_grad():
            holder.weight.copy_(place(weight))
            holder.bias.copy_(place(t[f"b{number + 1}"]))
            if hasattr(holder, "mask"):
                holder.mask.copy_(place(mask))
    inputs = {name: t[name].detach().clone() for name in ("x", "context") if name in t}
    for tensor in inputs.values():
        tensor.requires_grad_()
    parameters = {f"W{number}": holder.weight for number, holder in enumerate(holders, 1)}
    parameters |= {f"b{number}": holder.bias for number, holder in enumerate(holders, 1)}
    if own_context is not None and "V" in t:
        parameters["V"] = own_context.weight
        if "v" in t:
            parameters["v"] = own_context.bias
        own_context.to(t["x"])
        with torch.no_grad():
            for name in ("V", "v"):
                if name in parameters:
                    parameters[name].copy_(t[name])
    leaves = inputs | parameters

    def collect(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        named = dict(zip(leaves, grads, strict=True))
        for name in (f"W{last + 1}", f"b{last + 1}"):
            named[name] = layout.ours(named[name])
        if joined:
            named["W1"], named["V"] = _part(named["W1"], t["x"].shape[1], layout)
        return tuple(named[name] for name in t)

    return Chain(
        lambda: run(*inputs.values()), list(leaves.values()), collect, names=network.gradients
    )


def _join(own: Tensor, of_context: Tensor, layout: Layout) -> Tensor:
    both = (of_context, own) if layout.context_first else (own, of_context)
    return torch.cat(both, 1)


def _part(both: Tensor, features: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """`_join` undone."""
    if layout.context_first:
        of_context, own = both.split([both.shape[1] - features, features], 1)
        return own, of_context
    own, of_context = both.split([features, both.shape[1] - features], 1)
    return own, of_context
