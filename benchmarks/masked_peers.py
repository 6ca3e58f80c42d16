"""Affine autoregressive layers of fastflow and of its peers, all with the same masks and weights.

The peers do not agree on how they store a network: the rows of the last layer come in another
order, the context's columns stand before or after the features'. So one network (masked_network.py)
is written into each of them together with its masks: a product with other zeros costs the same.

Every contender is a `Chain` whose gradients come back as those of `Network.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from masked_network import ACTIVATIONS, Network, layer_of
from peers import Chain
from torch import Tensor, nn

import fastflow

# fastflow


def fastflow_layer(network: Network, backend: str, inverse: bool) -> Chain:
    """`fastflow.MaskedAffineAutoregressive` on one backend."""
    t = network.tensors
    if network.form.active_context and "V" in t:  # which only a layer converted from nflows has
        chain = nflows(network, inverse, convert=True)
        return replace(chain, context=lambda: fastflow.use_backend(backend))
    own = network.form.residual  # its first layer is not among the layer's hidden_features
    widths = [t[f"W{number}"].shape[0] for number in range(1 + own, network.hidden + 1)]
    context = t["V"].shape[1] if "V" in t else 0
    layer = layer_of(t["x"].shape[1], widths, context, network.activation, network.form).to(t["x"])
    holders = list(layer.network.layers)
    direction = layer.inverse if inverse else layer.forward
    chain = _of_module(network, Layout(), holders, layer.network.context_layer, direction)
    return replace(chain, context=lambda: fastflow.use_backend(backend))


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


def nflows(network: Network, inverse: bool, convert: bool = False) -> Chain:
    """nflows' MaskedAffineAutoregressiveTransform without residual blocks, as sbi sets it up.

    With `convert` it is fastflow's.
    """
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    return _nflows_like(MaskedAffineAutoregressiveTransform, network, inverse, convert)


def normflows(network: Network, inverse: bool) -> Chain:
    """normflows.flows.MaskedAffineAutoregressive with residual blocks."""
    from normflows.flows import MaskedAffineAutoregressive

    return _nflows_like(MaskedAffineAutoregressive, network, inverse)


def _nflows_like(
    layer: Callable[..., nn.Module], network: Network, inverse: bool, convert: bool = False
) -> Chain:
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
    if convert:
        fastflow.convert(module, strict=True)
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
