"""The op that computes a context's layer with the network, against the layer and op apart.

Those are held against an oracle elsewhere (test_autoregressive_kernels.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import masked_networks
import pytest
import torch
from masked_networks import ACTIVATIONS
from torch import Tensor, nn

import fastflow
from fastflow import backends, functional, native
from fastflow.autograd import node
from fastflow.autograd.context import ContextTerm, plain_linear

OPS = torch.ops.fastflow
pytestmark = pytest.mark.skipif(
    native.probe("cpp") is not None or not node.enabled,
    reason=f"no CPU library or no autograd node: {native.probe('cpp') or node.reason}",
)
NETWORKS = {
    "sbi": {"features": 6, "hidden": (50, 50, 50), "activation": 1, "lowest": 0},
    "shuffled": {"features": 9, "hidden": (31, 17), "shuffled": True, "scale": 1},
    "residual": {"features": 5, "hidden": (22, 22, 22), "residual": True, "activation": 3},
    "linear": {"features": 4, "hidden": (), "scale": 4, "activation": 2},
}
ROWS = [1, 4, 5, 17, 64, 200, 700]


class Case:
    """A network, its points x, of either side, and a context of C features; float64."""

    def __init__(self, name: str, rows: int, inverse: bool, bias: bool = True, C: int = 13) -> None:
        self.network = net = masked_networks.network(rows=rows, **NETWORKS[name])
        generator = torch.Generator().manual_seed(rows)
        units = len(net.weights[0])
        shapes = {"x": (rows, net.features), "context": (rows, C), "weight": (units, C)}
        shapes |= {"bias": (units,), "dy": (rows, net.features), "dladj": (rows,)}
        for key, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, key, 0.4 * value if key == "weight" else value)
        self.bias = self.bias if bias else None
        self.inverse = False
        if inverse:  # of any point features may be huge
            self.x, self.inverse = self.run(activated=False)["y"], True

    def to(self, dtype: torch.dtype) -> Case:
        other = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, (Tensor, masked_networks.Network)):
                setattr(other, key, value.to(dtype))
        return other

    def rows(self, which: slice) -> Case:
        other = copy.copy(self)
        for key in ("x", "context", "dy", "dladj"):
            setattr(other, key, getattr(self, key)[which].contiguous())
        return other

    def ops(self, stem: str) -> tuple[Callable, Callable]:
        """The passes of this direction; `stem` is how their names begin."""
        names = ("inverse", "inverse_backward") if self.inverse else ("forward", "backward")
        return tuple(getattr(OPS, stem + name) for name in names)

    def input(self, y: Tensor) -> Tensor:
        """What the network was applied to, given the outputs."""
        return y if self.inverse else self.x

    def run(self, activated: bool, wanted: tuple[bool, bool, bool] = (True,) * 3) -> dict:
        """All that the two ops return, without `saved`; wanted: of x, context and parameters."""
        net = self.network
        layers = (net.weights, net.biases, net.stairs, *net.flags())
        term = (self.weight, self.bias, activated)
        forward, backward = self.ops("autoregressive_context_")
        y, ladj, saved = forward(self.x, self.context, *term, *layers, True)
        grads = backward(
            *(self.dy, self.dladj, self.input(y), self.context, saved, self.weight),
            *(self.bias is not None, activated, net.weights, net.stairs, *net.flags()),
            *(net.layers(net.biases), *wanted),
        )
        names = ("y", "ladj", "dx", "dcontext", "dweight", "dbias", "weights", "biases")
        return dict(zip(names, (y, ladj, *grads), strict=True))

    def apart(self, activated: bool) -> dict:
        """The same by PyTorch's linear layer and the op without a context."""
        net = self.network
        leaves = [t.clone().requires_grad_() for t in (self.context, self.weight)]
        if self.bias is not None:
            leaves.append(self.bias.clone().requires_grad_())
        term = nn.functional.linear(*leaves)
        if activated:
            term = masked_networks.activate(term, net.activation)
        terms = [term.detach(), *[self.x.new_empty(0)] * (len(net.weights) - 1)]
        forward, backward = self.ops("autoregressive_")
        y, ladj, saved = forward(
            *(self.x, terms, net.weights, net.biases, net.stairs, *net.flags(), True)
        )
        dx, dterms, weights, biases = backward(
            *(self.dy, self.dladj, self.input(y), saved, net.weights, net.stairs, *net.flags()),
            *(1, net.layers(net.biases), True, True),
        )
        dcontext, dweight, *dbias = torch.autograd.grad(term, leaves, dterms[0])
        found = {"y": y, "ladj": ladj, "dx": dx, "dcontext": dcontext, "dweight": dweight}
        none = self.x.new_empty(0)
        return found | {"dbias": (*dbias, none)[0], "weights": weights, "biases": biases}


@pytest.fixture(params=[False, True], ids=["forward", "inverse"])
def inverse(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[True, False], ids=["activated", "linear"])
def activated(request: pytest.FixtureRequest) -> bool:
    return request.param


def flat(values: dict) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        yield from ((name, one) for one in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_layer_and_the_op(name: str, rows: int, inverse: bool, activated: bool) -> None:
    case = Case(name, rows, inverse, bias=rows % 2 == 0)
    found, want = case.run(activated), case.apart(activated)
    for (key, one), (_, other) in zip(flat(found), flat(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda m: f"{key}: {m}")  # noqa: B023


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)))
def test_every_activation_of_the_term(kind: int, inverse: bool) -> None:
    case = Case("shuffled", 33, inverse)
    case.network = masked_networks.replace(case.network, activation=kind)
    found, want = case.run(True), case.apart(True)
    for (_, one), (_, other) in zip(flat(found), flat(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sbi", "shuffled"])
def test_a_row_is_bitwise_the_same_in_any_batch(name: str, inverse: bool, activated: bool) -> None:
    case = Case(name, 200, inverse).to(torch.float32)
    whole = case.run(activated)
    for begin, end in [(0, 1), (199, 200), (7, 10), (16, 49), (31, 131)]:
        part = case.rows(slice(begin, end)).run(activated)
        for key in ("y", "ladj", "dx", "dcontext"):
            assert torch.equal(part[key], whole[key][begin:end]), key


def test_threads_change_no_bit(inverse: bool, activated: bool) -> None:
    case, threads = Case("sbi", 1100, inverse).to(torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):  # as many groups of rows differ
            torch.set_num_threads(count)
            results.append(case.run(activated))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for (_, one), (_, other) in zip(flat(results[0]), flat(result), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False,) * 3])
def test_what_is_not_wanted_is_left_out(
    wanted: tuple[bool, bool, bool], inverse: bool, activated: bool
) -> None:
    case = Case("sbi", 40, inverse)
    whole, part = case.run(activated), case.run(activated, wanted)
    for key, want in zip(("dx", "dcontext"), wanted):
        assert torch.equal(part[key], whole[key] if want else part[key].new_empty(0))
    for key in ("dweight", "dbias"):
        assert part[key].numel() == 0
    assert not any(grad.numel() for grad in part["weights"] + part["biases"])


# ---------------------------------------------------------------- through the layers


def layer_and_inputs(rows: int = 5) -> tuple[fastflow.MaskedAffineAutoregressive, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = fastflow.MaskedAffineAutoregressive(3, (7, 6), 2, "tanh").double()
    x, context = torch.randn(rows, 3 + 2, dtype=torch.float64).split([3, 2], 1)
    x, context = (tensor.contiguous().requires_grad_() for tensor in (x, context))
    return layer, x, context


def inside(output: Tensor) -> bool:
    return output.grad_fn.name().startswith("fastflow::autoregressive_context_")


def test_layers_take_it(inverse: bool) -> None:
    layer, x, context = layer_and_inputs()
    run = layer.inverse if inverse else layer
    for _ in range(2):  # the first call looks at the stairs
        assert all(map(inside, run(x, context)))
    with fastflow.use_backend("cpp"):
        assert inside(run(x, context)[0])
    with fastflow.use_backend("reference"):
        assert not inside(run(x, context)[0])
    assert not inside(run(x, context[0])[0])  # it broadcasts


def test_a_network_without_affine_step_calls_the_layer() -> None:
    layer, x, context = layer_and_inputs()
    layer.network(x, context)  # the first call looks at the stairs
    assert not inside(layer.network(x, context))


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: linear.register_full_backward_hook(lambda *_: None),
        lambda linear: nn.utils.parametrizations.weight_norm(linear),
        lambda linear: setattr(linear, "forward", lambda c: c @ linear.weight.mT),
        lambda linear: linear.__dict__.update(weight=linear._parameters.pop("weight")),
    ],
    ids=["forward hook", "pre-hook", "backward hook", "parametrized", "another forward", "replica"],
)
def test_a_changed_layer_is_called(change: Callable[[nn.Linear], object]) -> None:
    layer, x, context = layer_and_inputs()
    assert plain_linear(layer.network.context_layer)
    change(layer.network.context_layer)
    assert not plain_linear(layer.network.context_layer)
    assert not inside(layer(x, context)[0])


def test_autocast_rounds_the_context_in_both_directions_alike() -> None:
    layer, x, context = layer_and_inputs(rows=40)
    layer, x, context = layer.float(), x.detach().float(), context.detach().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, ladj = layer(x, context)
        back, minus_ladj = layer.inverse(y, context)
    assert not torch.equal(y, layer(x, context)[0])
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(minus_ladj, -ladj, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_context_layer_is_computed_once(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, context = layer_and_inputs()
    layer(x, context)  # the first call looks at the stairs
    calls = []
    computed = ContextTerm.computed
    monkeypatch.setattr(ContextTerm, "computed", lambda *given: calls.append(1) or computed(*given))
    with fastflow.use_backend(backend) if backend else contextlib.nullcontext():
        layer(x, context)
        layer(x, context[:1])  # which broadcasts
        layer.inverse(x, context)
    assert len(calls) == (1 if backend is None else 3)


def test_derivatives_of_derivatives(inverse: bool, activated: bool) -> None:
    layer, x, context = layer_and_inputs(rows=2)
    held = layer.network.network(context)
    term = held["terms"]._replace(activated=activated)
    shared = (held["biases"], held["stairs"])

    def run(x: Tensor, context: Tensor, weight: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        own = ContextTerm(context, weight, None, term.activated)
        own_op = functional.autoregressive_inverse if inverse else functional.autoregressive
        return own_op(x, weights, *shared, own, activation="tanh")

    inputs = (x, context, term.weight, *held["weights"])
    assert inside(run(*inputs)[0])
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_wrong_calls_are_refused(inverse: bool) -> None:
    case = Case("sbi", 5, inverse)
    for key, bad, message in (
        ("context", case.context[:4], "the context has the wrong shape"),
        ("weight", case.weight[:-1], "the context's weight has the wrong shape"),
        ("weight", case.weight.float(), "the context's weight must have the dtype"),
        ("bias", case.bias[:-1], "the context's bias has the wrong shape"),
        ("context", case.context.T.contiguous().T, "the context must be contiguous"),
    ):
        other = copy.copy(case)
        setattr(other, key, bad)
        with pytest.raises(RuntimeError, match=message):
            other.run(True)


def test_no_other_backend_has_it() -> None:
    for direction in ("forward", "inverse"):
        assert backends.available("cpu", f"autoregressive_context_{direction}") == ["cpp"]
