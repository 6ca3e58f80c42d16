"""What is computed where no compiled backend serves, as on a platform without a compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fastflow
from fastflow import backends, functional, masks
from fastflow.autograd import masked, node
from fastflow.convert import Unsupported
from fastflow.reference import layout


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes all compiled backends of CPUs out of the automatic choice."""
    monkeypatch.setitem(backends._order, "cpu", [])
    monkeypatch.setattr(node, "enabled", False)
    for memory in ("_selected", "_known"):
        monkeypatch.setattr(backends, memory, {})
    yield


LAYERS: dict[str, Callable[[], fastflow.MaskedAffineAutoregressive]] = {
    "plain": lambda: fastflow.MaskedAffineAutoregressive(5, (12, 12)),
    "reversed": lambda: fastflow.MaskedAffineAutoregressive(5, (12,), order="reverse"),
    "random": lambda: fastflow.MaskedAffineAutoregressive(6, (16, 12), order="random"),
    "context": lambda: fastflow.MaskedAffineAutoregressive(4, (12, 12), context_features=3),
    "residual": lambda: fastflow.MaskedAffineAutoregressive(4, (12, 12), residual=True),
    "gate": lambda: fastflow.MaskedAffineAutoregressive(4, (12, 12), scale="gate"),
    "one": lambda: fastflow.MaskedAffineAutoregressive(1, (12, 12)),
    "one at a context": lambda: fastflow.MaskedAffineAutoregressive(1, (12,), context_features=2),
}


def gradients(layer: nn.Module, call: Callable, *inputs: Tensor | None) -> list[Tensor]:
    """Outputs, and the gradients of the points and all parameters."""
    points = [one.clone().requires_grad_() for one in inputs if one is not None]
    outputs = call(*points)
    total = sum((one * one).sum() + one.sum() for one in outputs)
    return [*outputs, *torch.autograd.grad(total, [*points, *layer.parameters()])]


@pytest.mark.parametrize("wide", [False, True], ids=["passes", "sweep"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_those_of_the_reference(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, kind: str, direction: str, wide: bool
) -> None:
    monkeypatch.setattr(masked, "CHEAP_PASS", 0 if wide else masked.CHEAP_PASS)
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    x = torch.randn(7, layer.features, dtype=torch.float64)
    c = None
    if layer.context_features:
        c = torch.randn(7, layer.context_features, dtype=torch.float64)
    call = getattr(layer, direction)
    found = gradients(layer, call, x, c)
    with fastflow.use_backend("reference"):  # whose backward pass is written by hand
        wanted = gradients(layer, call, x, c)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_parallel_passes_are_differentiated_by_pytorch(uncompiled: None) -> None:
    layer = fastflow.MaskedAffineAutoregressive(5, (12, 12))
    y, _ = layer(torch.randn(3, 5))
    assert "MaskedNetwork" not in type(y.grad_fn.next_functions[0][0]).__name__
    assert type(y.grad_fn).__name__ != "MaskedNetworkBackward"


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_masked_weights_may_hold_anything(uncompiled: None, value: float) -> None:
    torch.manual_seed(0)
    layer = fastflow.MaskedAffineAutoregressive(4, (8, 8), order="random")
    x = torch.randn(5, 4)
    wanted = gradients(layer, layer, x)
    with torch.no_grad():
        for own, mask in zip(layer.network.layers, layer.network.masks()):
            own.weight[~mask] = value
    found = gradients(layer, layer, x)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    layer.zero_grad()
    sum(one.sum() for one in layer(x)).backward()
    for own, mask in zip(layer.network.layers, layer.network.masks()):
        assert not own.weight.grad[~mask].any()


def test_masks_are_made_once_and_anew_when_the_order_changes(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = layout.masks.masks
    monkeypatch.setattr(layout.masks, "masks", lambda *given: made.append(0) or real(*given))
    layer = fastflow.MaskedAffineAutoregressive(4, (8, 8))
    other = fastflow.MaskedAffineAutoregressive(4, (8, 8), order="reverse")
    x = torch.randn(5, 4)
    with torch.inference_mode():
        layer(x)  # what is made here serves autograd too
    for _ in range(3):
        layer(x)[0].sum().backward()
    assert len(made) == 1
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x)[0], other(x)[0])
    layer.network.stairs.copy_(fastflow.MADE(4, 2, (8, 8)).stairs)  # in place
    other.network.load_state_dict(layer.network.state_dict() | {"order": torch.arange(4)})
    assert torch.equal(layer(x)[0], other(x)[0])


def test_autocast_rounds_nothing(uncompiled: None) -> None:
    layer = fastflow.MaskedAffineAutoregressive(5, (12, 12))
    x = torch.randn(3, 5)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert all(map(torch.equal, found, wanted))


# one feature


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_masks_are_checked(
    request: pytest.FixtureRequest, compiled: bool, inverse: bool, features: int
) -> None:
    if not compiled:
        request.getfixturevalue("uncompiled")
    own = torch.arange(features) + 1
    levels = [own, own.repeat(2), own.repeat_interleave(2) + 1]  # outputs see their own feature
    weights = [torch.ones(len(n), len(m)) for m, n in pairwise(levels)]
    biases = [torch.ones(len(n)) for n in levels[1:]]
    compute = functional.autoregressive_inverse if inverse else functional.autoregressive
    for x in (torch.ones(3, features), torch.ones(2, 3, features)):
        with pytest.raises(ValueError, match="not autoregressive"):
            compute(x, weights, biases, masks.staircase(levels))


def test_one_feature_has_no_hidden_layers() -> None:
    layer = fastflow.MaskedAffineAutoregressive(1, (64, 64), residual=True)
    assert len(layer.network.layers) == 1
    x = torch.randn(6, 1)
    y, ladj = layer(x)
    assert torch.allclose(layer.inverse(y)[0], x, atol=1e-6)
    assert torch.equal(ladj, ladj[:1].expand(6))
    at = fastflow.MaskedAffineAutoregressive(1, (64, 64), context_features=2)
    assert len(at.network.layers) == 3  # the context is to be seen


def libraries() -> dict[str, Callable[[int], nn.Module]]:
    nflows = pytest.importorskip("nflows.transforms")
    normflows = pytest.importorskip("normflows.flows")
    pyro = pytest.importorskip("pyro.distributions.transforms")
    zuko = pytest.importorskip("zuko.flows.autoregressive")
    return {
        "nflows": lambda D: nflows.MaskedAffineAutoregressiveTransform(
            D, 16, use_residual_blocks=False
        ),
        "nflows residual": lambda D: nflows.MaskedAffineAutoregressiveTransform(D, 16),
        "normflows": lambda D: normflows.MaskedAffineAutoregressive(D, 16),
        "pyro": lambda D: pyro.affine_autoregressive(D, hidden_dims=[16, 16]),
        "zuko": lambda D: zuko.MaskedAutoregressiveTransform(D, hidden_features=(16, 16)),
    }


NAMES = ["nflows", "nflows residual", "normflows", "pyro", "zuko"]


def both(name: str, layer: nn.Module, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Image and log-determinant of one direction, as the library asks for them."""
    if name == "zuko":
        transform = layer()
        return (transform.inv if inverse else transform).call_and_ladj(x)
    if name == "pyro":
        x = x.view_as(x)
        y = layer.inv(x) if inverse else layer(x)
        pair = (y, x) if inverse else (x, y)
        return y, layer.log_abs_det_jacobian(*pair)
    return layer.inverse(x) if inverse else layer(x)


@pytest.mark.filterwarnings("ignore:AutoRegressiveNN input_dim = 1")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["nflows", "nflows residual", "normflows", "pyro"])
def test_one_feature_of_a_library_runs_its_network_on_one_row(
    monkeypatch: pytest.MonkeyPatch, name: str, inverse: bool
) -> None:
    torch.manual_seed(0)
    original = libraries()[name](1)  # Pyro's inverse makes tensors of the default type
    layer = copy.deepcopy(original)
    fastflow.convert(layer, strict=True)
    x = torch.randn(9, 1)
    rows = []
    real = masked.by_node
    spied = lambda op, x, *rest: rows.append((op, len(x))) or real(op, x, *rest)  # noqa: E731
    monkeypatch.setattr("fastflow.functional.network.by_node", spied)
    wanted = gradients_where_used(original, name, x, inverse)
    found = gradients_where_used(layer, name, x, inverse)
    assert ("made", 1) in rows and all(count == 1 for _, count in rows)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def gradients_where_used(layer: nn.Module, name: str, x: Tensor, inverse: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    outputs = both(name, layer, x, inverse)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(
        sum((one * one).sum() for one in outputs), leaves, allow_unused=True
    )
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    return [*outputs, *(z if grad is None else grad for grad, z in zip(grads, zeros))]


# converted layers


@pytest.mark.parametrize("name", NAMES)
def test_convert_leaves_layers_alone_and_says_why(uncompiled: None, name: str) -> None:
    model = nn.Sequential(libraries()[name](4))
    report = fastflow.convert(model)
    assert not report.replaced
    (row,) = report.skipped
    assert "no compiled backend serves cpu" in row.reason and "without_kernels" in row.reason
    with pytest.raises(Unsupported, match="no compiled backend"):
        fastflow.convert(model, strict=True)
    assert fastflow.convert(model, without_kernels=True).replaced
    with fastflow.use_backend("reference"):  # somebody asks for it
        assert fastflow.convert(nn.Sequential(libraries()[name](4))).replaced


@pytest.mark.parametrize("cheap", [True, False], ids=["passes", "sweep"])
@pytest.mark.parametrize("name", NAMES)
def test_the_library_answers_where_no_backend_serves(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, name: str, cheap: bool
) -> None:
    monkeypatch.setattr(masked, "CHEAP_PASS", 2**30 if cheap else 0)
    torch.manual_seed(0)
    original = libraries()[name](4)
    layer = copy.deepcopy(original)
    fastflow.convert(layer, without_kernels=True)
    x = torch.randn(9, 4)
    for inverse in (False, True):
        wanted = gradients_where_used(original, name, x, inverse)
        found = gradients_where_used(layer, name, x, inverse)
        same = cheap or not inverse  # the very code of the library
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            # a converted layer of Pyro is computed once more for ladj: gradients in another order
            if same and (name != "pyro" or number < 2):
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
