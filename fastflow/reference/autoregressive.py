r"""The affine autoregressive layer in plain PyTorch, both directions, the backward passes by hand.

A masked network (`fastflow.reference.network`) with two outputs for every feature gives its shift m
and raw scale a; outputs of feature i see features before i only. Parallel direction:

    y_i = s_i x_i + m_i,   ladj = sum_i log s_i        (`fastflow.reference.scales`)

Inverse: x_i follows from y_i once m_i and a_i are known, which needs x before i only. One sweep
over the features in their order computes every unit of the network once, as soon as what it sees is
there. Backward of the inverse: the cotangent of x_i is complete once all later features have been
visited, so one sweep in reverse gives the cotangents of all pre-activations.

`saved` holds P_1 .. P_L and the outputs side by side, (B, n) flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import masks
from fastflow.reference import made, network, scales
from fastflow.reference.layout import layout, output_rows, remembered
from fastflow.transforms import readable

NOTHING: Any = None  # where a list by level has no entry for level 0
BLOCK = 16  # stages between two products with everything that is known before them


def autoregressive_forward(
    x: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor | Sequence[Tensor],
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, D), ladj (B,) and what backward needs."""
    found = network.forward(x, terms, weights, biases, stairs, activation, residual)
    m, a = _by_feature(found[-1], stairs, network.widths(x, weights))
    y, l = scales.step(x, m, a, scale, c0, c1)  # noqa: E741
    return y, l.sum(-1), torch.cat(found, -1).flatten() if save else x.new_empty(0)


def autoregressive_backward(
    dy: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    terms_grad: int,
    biases_given: int,
    x_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx, and the gradients of terms, weights and biases; shape (0,) where not wanted."""
    *hidden, outputs = made.split(saved, x, weights)
    m, a = _by_feature(outputs, stairs, network.widths(x, weights))
    dx, dm, da = scales.step_vjp(dy, dladj[:, None], x, m, a, scale, c0, c1)
    d_outputs = _to_outputs(dm, da, stairs)
    through, cotangents = network.backward(
        d_outputs, x, hidden, weights, stairs, activation, residual
    )
    lists = made.gradients(
        cotangents, x, hidden, stairs, activation, residual, terms_grad, biases_given, param_grads
    )
    return dx + through if x_grad else x.new_empty(0), *lists


def autoregressive_inverse(
    y: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor | Sequence[Tensor],
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D), ladj (B,) of the inverse, and what backward needs, in one sweep.

    Stage r computes the units that see r features, then outputs r, then x_r. Stages come in blocks:
    a product with everything known before the block starts the sums of the block's units, and its
    stages add what the block itself brings. Masks that are no staircase are inverted by passes, and
    so are those whose values are out of reach: in a graph, or under vmap.
    """
    if not isinstance(stairs, Tensor) or not (save or readable(stairs)):
        net = (terms, weights, biases, stairs, activation, residual)
        return *inverse_of_network(y, *net, scale, c0, c1), y.new_empty(0)
    net = _Sorted.of(y, weights, stairs, residual)
    hidden, act = net.hidden, network.BY_NUMBER[activation].value
    y = y.index_select(-1, net.orders[0])
    starts = net.starts(y, terms, biases)

    known = [y[..., :0]] * (hidden + 1)  # A_0 .. A_L of all units before the block
    pre = [[] for _ in range(hidden + 2)]  # pieces of P_1 .. P_L and of the outputs
    logs = []
    for block in net.blocks():
        sums = [NOTHING] + [
            starts[level][..., net.units(level, block)]
            + known[level - 1] @ net.part(level, block, slice(known[level - 1].shape[-1])).mT
            for level in range(1, hidden + 2)
        ]
        fresh = [[] for _ in range(hidden + 1)]  # pieces of A_0 .. A_L of the block's own units
        for r in block:
            for level in range(1, hidden + 2):
                units = net.units(level, range(r, r + 1))
                offset = net.units(level, block).start
                p = sums[level][..., units.start - offset : units.stop - offset]
                if fresh[level - 1]:
                    seen = torch.cat(fresh[level - 1], -1)
                    begin = known[level - 1].shape[-1]
                    columns = slice(begin, begin + seen.shape[-1])
                    p = p + seen @ net.weights[level][units, columns].mT
                if network.skips(level, hidden, residual):
                    p = p + pre[level - 2][-1]
                pre[level].append(p)
                if level <= hidden:
                    active = network.activates(level, hidden, residual)
                    fresh[level].append(act(p) if active else p)
            if r < net.features:
                m, a = pre[-1][-1].split(1, -1)
                x_r, l = scales.step_back(y[..., r : r + 1], m, a, scale, c0, c1)  # noqa: E741
                fresh[0].append(x_r)
                logs.append(l)
        known = [torch.cat([old, *new], -1) for old, new in zip(known, fresh)]
    ladj = -torch.cat(logs, -1).sum(-1)
    x = net.unsort(0, known[0])
    if not save:
        return x, ladj, x.new_empty(0)
    found = [net.unsort(level, torch.cat(pre[level], -1)) for level in range(1, hidden + 2)]
    return x, ladj, torch.cat(found, -1).flatten()


def autoregressive_inverse_backward(
    dx: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
    terms_grad: int,
    biases_given: int,
    y_grad: bool,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dy, and the gradients of terms, weights and biases, in one sweep in reverse.

    Stage r undoes what stage r of the inverse did: x_r, then outputs r, then the units that see r
    features, from the highest level down.
    """
    net = _Sorted.of(x, weights, stairs, residual)
    hidden, slope = net.hidden, network.BY_NUMBER[activation].slope
    pre = made.split(saved, x, weights)
    p_sorted = [NOTHING] + [p.index_select(-1, net.orders[i]) for i, p in enumerate(pre, 1)]
    x_sorted, dx = (t.index_select(-1, net.orders[0]) for t in (x, dx))

    later = [dx[..., :0]] * (hidden + 2)  # dP_1 .. dP_L, d outputs of all units after the block
    dy = []
    for block in reversed(net.blocks()):
        sums = [
            later[level + 1] @ net.rest(level + 1, block, net.units(level, block))
            for level in range(hidden + 1)
        ]
        fresh = [[] for _ in range(hidden + 2)]  # pieces of the block's own units, last first
        for r in reversed(block):
            for level in [0, *range(hidden, 0, -1)]:
                units = net.units(level, range(r, r + 1))
                offset = net.units(level, block).start
                total = _columns(sums[level], slice(units.start - offset, units.stop - offset))
                if fresh[level + 1]:
                    above = torch.cat(fresh[level + 1][::-1], -1)
                    end = net.units(level + 1, block).stop
                    total = (
                        total + above @ net.weights[level + 1][end - above.shape[-1] : end, units]
                    )
                if level:
                    if network.activates(level, hidden, residual):
                        total = total * slope(p_sorted[level][..., units])
                    if network.skips(level + 2, hidden, residual):
                        total = total + fresh[level + 2][-1]
                    fresh[level].append(total)
                elif r < net.features:
                    m, a = p_sorted[-1][..., 2 * r : 2 * r + 2].split(1, -1)
                    dy_r, dm, da = scales.step_back_vjp(
                        _columns(dx, units) + total,
                        dladj[:, None],
                        x_sorted[..., units],
                        m,
                        a,
                        scale,
                        c0,
                        c1,
                    )
                    dy.append(dy_r)
                    fresh[-1].append(torch.cat([dm, da], -1))
        later = [torch.cat([*new[::-1], old], -1) for old, new in zip(later, fresh)]
    cotangents = [net.unsort(level, later[level]) for level in range(1, hidden + 2)]
    lists = made.gradients(
        cotangents, x, pre[:-1], stairs, activation, residual, terms_grad, biases_given, param_grads
    )
    dy = net.unsort(0, torch.cat(dy[::-1], -1)) if y_grad else x.new_empty(0)
    return dy, *lists


def inverse_of_network(
    y: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor | Sequence[Tensor],
    activation: int,
    residual: bool,
    scale: int,
    c0: float,
    c1: float,
) -> tuple[Tensor, Tensor]:
    """The inverse by passes through the whole network, each of which settles some features more."""
    widths = network.widths(y, weights)

    def stages() -> list[Tensor]:
        seen = network.reach(layout(stairs, widths).masks, residual)
        return settled_by_passes(seen[output_rows(stairs, widths[0])].any(1))

    def shift_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = network.forward(x, terms, weights, biases, stairs, activation, residual)[-1]
        return _by_feature(outputs, stairs, widths)

    sources = (stairs,) if isinstance(stairs, Tensor) else stairs
    settled = remembered(stages, sources, (*widths, residual)) or stages()
    return inverse_by_passes(y, shift_and_scale, settled, (scale, c0, c1))


def settled_by_passes(adjacency: Tensor) -> list[Tensor]:
    """Which features (D,) are known after each pass through an autoregressive map.

    Arguments:
        adjacency: bool (D, D), [i, j] says that what is made for feature i depends on x_j.
    """
    found = [torch.zeros_like(adjacency[0])]
    for _ in range(masks.depth(adjacency) if readable(adjacency) else len(adjacency)):
        found.append(~(adjacency & ~found[-1]).any(1))
    return found[1:]


def inverse_by_passes(
    y: Tensor,
    shift_and_scale: Callable[[Tensor], tuple[Tensor, Tensor]],
    settled: Sequence[Tensor],
    scale: tuple[int, float, float],
) -> tuple[Tensor, Tensor]:
    """The inverse by passes through any autoregressive map, of which each settles more features.

    Arguments:
        y: (*batch, D).
        shift_and_scale: gives m and a (*batch, D) at x.
        settled: what `settled_by_passes` returns for the map.
        scale: the scale map, as ops take it.

    Returns:
        x (*batch, D), and ladj (*batch,) of the inverse.
    """
    x = torch.zeros_like(y)
    for known in settled:
        found, l = scales.step_back(y, *shift_and_scale(x), *scale)  # noqa: E741
        x = torch.where(known, found, 0)  # what was found of unknown features may be infinite
    return x, -l.sum(-1)


class _Sorted(NamedTuple):
    """A network with every level in the order of its degrees, as the sweeps visit it."""

    features: int
    hidden: int
    orders: list[Tensor]
    weights: list[Tensor]  # by level, masked
    ends: list[list[int]]  # by level: how many units are known before each stage, and at the end

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor], stairs: Tensor, residual: bool) -> _Sorted:
        levels = network.widths(x, weights)

        def plan() -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
            """By level, the order of the units, what they see in it, and the ends."""
            orders, prefixes = masks.parts(stairs, levels)
            orders = [order.long() for order in orders]
            seen = [
                mask[order][:, below]
                for mask, order, below in zip(layout(stairs, levels).masks, orders[1:], orders)
            ]
            ends = [[*range(levels[0] + 1), levels[0]]]
            for known in network.known_units(prefixes, levels[0], residual)[1:]:
                ends.append([0, *known.tolist()])
            ends.append([2 * stage for stage in ends[0]])
            return orders, seen, ends

        orders, seen, ends = remembered(plan, (stairs,), (*levels, residual)) or plan()
        taken = [
            torch.where(mask, weight[order][:, below], 0)
            for weight, mask, order, below in zip(weights, seen, orders[1:], orders)
        ]
        return cls(levels[0], len(weights) - 1, orders, [NOTHING, *taken], ends)

    def blocks(self) -> list[range]:
        """Stages 0 .. D in blocks; the last one computes units that see all features."""
        stages = range(self.features + 1)
        return [stages[first : first + BLOCK] for first in range(0, len(stages), BLOCK)]

    def units(self, level: int, stages: range) -> slice:
        """The units of a level that become known in these stages."""
        return slice(self.ends[level][stages[0]], self.ends[level][stages[-1] + 1])

    def part(self, level: int, stages: range, columns: slice) -> Tensor:
        """The weights between the units of these stages and the given ones one level below."""
        return self.weights[level][self.units(level, stages), columns]

    def rest(self, level: int, stages: range, columns: slice) -> Tensor:
        """The weights of the units of all later stages, for the given ones one level below."""
        return self.weights[level][self.units(level, stages).stop :, columns]

    def starts(self, x: Tensor, terms: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """By level, what the pre-activations hold before any product: biases and terms, (B, n)."""
        found = [NOTHING]
        for position, order in enumerate(self.orders[1:]):
            start = x.new_zeros(x.shape[:-1] + order.shape)
            if biases[position].shape != (0,):
                start = start + biases[position][order]
            if terms and terms[position].shape != (0,):
                start = start + terms[position].index_select(-1, order)
            found.append(start)
        return found

    def unsort(self, level: int, values: Tensor) -> Tensor:
        """Values (B, n) of a level's sorted units, put back to where the units are."""
        return values.index_select(-1, self.orders[level].argsort())


def _columns(tensor: Tensor, columns: slice) -> Tensor:
    """A slice of the last dimension, for cotangents.

    By index, a slice of all columns would be an alias, which the vmap of
    autograd.grad(is_grads_batched=True) does not know.
    """
    return tensor.narrow(-1, columns.start, columns.stop - columns.start)


def _by_feature(
    outputs: Tensor, stairs: Tensor | Sequence[Tensor], widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The shifts and raw scales (B, D) of the features from the network's outputs (B, 2 D)."""
    if layout(stairs, widths).interleaved:
        m, a = outputs.unflatten(-1, (-1, 2)).unbind(-1)
        return m, a
    rows = output_rows(stairs, widths[0])
    # not index_select: what torch.compile makes of its backward reads out of bounds on CPUs
    m, a = (outputs.gather(-1, row.expand(*outputs.shape[:-1], -1)) for row in rows.unbind(-1))
    return m, a


def _to_outputs(dm: Tensor, da: Tensor, stairs: Tensor) -> Tensor:
    """The cotangent of the outputs (B, 2 D) from those of shifts and raw scales."""
    rows = output_rows(stairs, dm.shape[-1]).T.flatten()
    return torch.cat([dm, da], -1).index_select(-1, rows.argsort())
