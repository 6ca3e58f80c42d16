"""The one-sweep inverse of masked autoregressive networks, below every Python layer.

The truth is the unrolled inverse: one full pass of the network per feature, in float64, with
gradients by autograd.
"""

from __future__ import annotations

import math

import pytest
import torch
from masked_networks import (
    ACTIVATIONS,
    SCALES,
    Network,
    network,
    raw_outputs,
    scale_map,
    transform,
    unrolled_inverse,
)
from torch import Tensor

from fastflow import native

pytestmark = pytest.mark.skipif("cpp" not in native.libraries, reason="needs the CPU library")

SMALL = {
    "linear": {"features": 5, "hidden": ()},
    "one": {"features": 1, "hidden": (3, 2)},
    "pair": {"features": 2, "hidden": (1,)},
    "wide": {"features": 4, "hidden": (70, 33)},
    "long": {"features": 37, "hidden": (20, 41), "biases": 0b010},
    "terms": {"features": 6, "hidden": (50, 50, 50), "terms": 0b0001},
    "all_terms": {"features": 7, "hidden": (19, 8), "terms": 0b111, "biases": 0, "lowest": 0},
    "shuffled": {"features": 9, "hidden": (31, 17), "shuffled": True, "terms": 0b010},
    "ragged": {"features": 21, "hidden": (40, 23), "ragged": True, "lowest": 0},
    "both": {"features": 18, "hidden": (64, 9, 30), "ragged": True, "shuffled": True},
    # with large blocks, of a single feature and of several
    "many_blocks": {"features": 30, "hidden": (400, 300), "ragged": True},
    "residual_blocks": {"features": 48, "hidden": (150,) * 3, "residual": True},
    "residual": {"features": 6, "hidden": (24,) * 5, "residual": True, "lowest": 0},
    "residual_one": {"features": 5, "hidden": (12,), "residual": True},
    "residual_shuffled": {
        "features": 11,
        "hidden": (21,) * 3,
        "residual": True,
        "shuffled": True,
        "terms": 0b1111,
    },
}
CASES = pytest.mark.parametrize("name", SMALL)
ROWS = pytest.mark.parametrize("rows", [1, 3, 37, 100])


def inverse(net: Network, y: Tensor, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastflow.autoregressive_inverse(
        y, net.terms, net.weights, net.biases, net.stairs, *net.flags(), save
    )


def inverse_backward(
    net: Network,
    dx: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Tensor,
    x_grad: bool = True,
    param_grads: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    layers = (net.layers(net.terms), net.layers(net.biases))
    return torch.ops.fastflow.autoregressive_inverse_backward(
        dx, dladj, x, saved, net.weights, net.stairs, *net.flags(), *layers, x_grad, param_grads
    )


def cotangents(rows: int, features: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    sizes = ((rows, features), (rows, features), (rows,))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)


def everything(net: Network, y: Tensor, dx: Tensor, dladj: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name, those that were not asked for left out."""
    x, ladj, saved = inverse(net, y)
    dy, *lists = inverse_backward(net, dx, dladj, x, saved)
    named = {"x": x, "ladj": ladj, "dy": dy}
    for name, tensors in zip(("dterms", "dweights", "dbiases"), lists, strict=True):
        named |= {f"{name}[{i}]": tensor for i, tensor in enumerate(tensors) if tensor.numel()}
    return named


def expected(net: Network, y: Tensor, dx: Tensor, dladj: Tensor) -> dict[str, Tensor]:
    """The same by the unrolled inverse and autograd."""
    leaves = {"dy": y}
    for name in ("terms", "weights", "biases"):
        tensors = enumerate(getattr(net, name))
        leaves |= {f"d{name}[{i}]": tensor for i, tensor in tensors if tensor.numel()}
    for tensor in leaves.values():
        tensor.requires_grad_()
    x, ladj = unrolled_inverse(net, y)
    grads = torch.autograd.grad(
        [x, ladj], list(leaves.values()), [dx, dladj], allow_unused=True, materialize_grads=True
    )
    for tensor in leaves.values():
        tensor.requires_grad_(False)
    named = {"x": x.detach(), "ladj": ladj.detach(), **dict(zip(leaves, grads, strict=True))}
    for name, mask in zip(
        (f"dweights[{i}]" for i in range(len(net.weights))), net.masks, strict=True
    ):
        named[name] = named[name].where(mask, 0)
    return named


def check(net: Network, rows: int) -> None:
    """Values and gradients in float64, relative to the largest entry of each, to 1e-9."""
    y, dx, dladj = cotangents(rows, net.features)
    found, truth = everything(net, y, dx, dladj), expected(net, y, dx, dladj)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).abs().max()
        assert error <= 1e-9 * max(1.0, value.abs().max()), (name, error)


@CASES
@ROWS
def test_equals_the_unrolled_inverse(name: str, rows: int) -> None:
    check(network(rows=rows, **SMALL[name]), rows)


@pytest.mark.parametrize("scale", range(len(SCALES)), ids=SCALES)
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_every_activation_and_scale(activation: int, scale: int) -> None:
    net = network(6, (13, 22), 19, activation=activation, scale=scale, terms=0b001, lowest=0)
    check(net, 19)


def test_masked_weights_get_gradients_of_exactly_zero() -> None:
    net = network(9, (14, 25), 35, shuffled=True)
    for name, value in everything(net, *cotangents(35, 9)).items():
        if name.startswith("dweights"):
            mask = net.masks[int(name[-2])]
            assert value.where(mask, 0).equal(value)


@pytest.mark.parametrize("scale", range(len(SCALES)), ids=SCALES)
@pytest.mark.parametrize("options", [{}, {"shuffled": True}, {"residual": True, "terms": 0b10}])
@pytest.mark.parametrize(
    ("features", "hidden", "rows"),
    [(1, (8,), 40), (6, (50, 50, 50), 3), (64, (130,) * 3, 90), (784, (300,), 33), (784, (90,), 1)],
)
def test_local_residual(
    features: int, hidden: tuple[int, ...], rows: int, scale: int, options: dict
) -> None:
    """y is 4 units of what one feature rounds from F(x), with m and the scale that the sweep found.

    These in turn are those of the network at x, as well as float32 computes them: their mean
    square error is at most twice that of plain PyTorch. Against the network in float64 no bound in
    units of y can hold, for a sweep or any float32 network: the sums of m may cancel.
    """
    activation = (features + scale) % len(ACTIVATIONS)
    single = network(
        features, hidden, rows, scale=scale, activation=activation, spread=0.58, **options
    ).to(torch.float32)
    y = cotangents(rows, features, torch.float32)[0]
    x, ladj, saved = inverse(single, y)
    net = single.to(torch.float64)
    found = outputs(saved, single, rows)
    m, log_scale = scale_map(net, found.double())
    shift = m * torch.sigmoid(-(found[..., 1] + net.constants[0])) if scale == 4 else m
    back = log_scale.exp() * x + shift
    bound = 4 * 2**-23 * torch.maximum(y.abs(), (x.abs() + m.abs()) * log_scale.exp())
    assert ((back - y).abs() <= bound).all(), ((back - y).abs() / bound).max() * 4
    terms = log_scale.abs().sum(1) + math.sqrt(features)
    assert ((ladj + log_scale.sum(1)).abs() <= 4 * 2**-23 * terms).all()

    def error(values: Tensor, exact: Tensor) -> Tensor:
        return (values - exact).square().mean().sqrt()

    exact = raw_outputs(net, x.double())
    plain = error(raw_outputs(single, x), exact)
    assert error(found, exact) <= 2 * plain + 2**-26 * exact.abs().max()


def outputs(saved: Tensor, net: Network, rows: int) -> Tensor:
    """(rows, D, 2): m and a by feature, from the tiles of `saved`, which end with them."""
    tile = 64
    while tile > 16 and -(-rows // tile) < 6:
        tile //= 2
    units = sum(len(order) for order in net.orders[1:])
    by_row = saved.view(-1, units, tile)[:, -2 * net.features :].transpose(1, 2).flatten(0, 1)
    return by_row[:rows].view(rows, -1, 2)[:, net.orders[0].argsort()]


@CASES
def test_float32_is_close_to_float64(name: str) -> None:
    """Gradients err by the rounding of well-conditioned sums, far less than 1e-4 of the largest."""
    net = network(rows=50, spread=0.5, **SMALL[name])
    net = net.to(torch.float32).to(torch.float64)
    arguments = cotangents(50, net.features, torch.float32)
    truth = everything(net, *(tensor.double() for tensor in arguments))
    for value, (key, exact) in zip(
        everything(net.to(torch.float32), *arguments).values(), truth.items(), strict=True
    ):
        assert (value - exact).abs().max() <= 1e-4 * max(1.0, exact.abs().max()), key


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_their_batch(name: str, dtype: torch.dtype) -> None:
    net = network(rows=139, **SMALL[name]).to(dtype)
    arguments = cotangents(139, net.features, dtype)
    whole = everything(net, *arguments)
    for rows in ([0], [138], [70, 3], list(range(5)), list(range(9, 22)), list(range(40, 97))):
        part = everything(net.rows(rows), *(tensor[rows] for tensor in arguments))
        for key, value in part.items():
            if not key.startswith(("dweights", "dbiases")):
                assert value.equal(whole[key][rows]), (key, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sums_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Sums of more than one piece, which a few rows and many take in different shapes."""
    net = network(330, (530, 290), 70, ragged=True, spread=0.5).to(dtype)
    arguments = cotangents(70, 330, dtype)
    whole = everything(net, *arguments)
    for rows in ([69], [3, 5], [1, 2, 8], [7, 6, 5, 4], list(range(20, 60))):
        part = everything(net.rows(rows), *(tensor[rows] for tensor in arguments))
        for key in ("x", "ladj", "dy"):
            assert part[key].equal(whole[key][rows]), (key, rows)


@CASES
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_threads_change_nothing(name: str, rows: int) -> None:
    net = network(rows=rows, **SMALL[name]).to(torch.float32)
    arguments = cotangents(rows, net.features, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything(net, *arguments))
    finally:
        torch.set_num_threads(threads)
    for key, value in results[0].items():
        assert all(value.equal(other[key]) for other in results[1:]), key


@CASES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_row(name: str, poison: float) -> None:
    rows, bad = 45, 17
    net = network(rows=rows, **SMALL[name]).to(torch.float32)
    arguments = cotangents(rows, net.features, torch.float32)
    clean = everything(net, *arguments)
    arguments[0][bad] = arguments[1][bad] = poison
    others = torch.arange(rows) != bad
    for key, value in everything(net, *arguments).items():
        if not key.startswith(("dweights", "dbiases")):
            assert value[others].equal(clean[key][others]), key


def test_what_is_not_wanted_is_empty() -> None:
    net = network(6, (9, 9), 4, terms=0b101, biases=0b110)
    y, dx, dladj = cotangents(4, 6)
    assert inverse(net, y, save=False)[2].shape == (0,)
    x, _, saved = inverse(net, y)
    full = inverse_backward(net, dx, dladj, x, saved)
    part = inverse_backward(net, dx, dladj, x, saved, x_grad=False, param_grads=False)
    assert part[0].shape == (0,)
    assert all(tensor.shape == (0,) for tensors in part[2:] for tensor in tensors)
    assert [tensor.shape for tensor in part[1]] == [(4, 9), (0,), (4, 12)]
    assert all(a.equal(b) for a, b in zip(part[1], full[1], strict=True))
    assert [tensor.shape for tensor in full[3]] == [(0,), (9,), (12,)]


def test_widest() -> None:
    """D = 4096: values by the local residual, gradients by one Jacobian-vector identity."""
    net = network(4096, (65,), 2, spread=0.5)
    y, dx, dladj = cotangents(2, 4096)
    x, ladj, saved = inverse(net, y)
    back, forward_ladj = transform(net, x)
    assert (back - y).abs().max() <= 1e-12 * x.abs().max()
    assert (ladj + forward_ladj).abs().max() <= 1e-9
    dy = inverse_backward(net, dx, dladj, x, saved)[0]
    leaf = x.clone().requires_grad_()
    y_again, ladj_again = transform(net, leaf)
    total = torch.autograd.grad([y_again, ladj_again], leaf, [dy, dladj])[0]
    assert (total - dx).abs().max() <= 1e-9 * max(1.0, dy.abs().max())
