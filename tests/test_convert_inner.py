"""Converted layers whose inner modules are changed compute what the library's own layers do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conversion import check_left_alone, check_same
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

import fastflow
from fastflow.convert.layer import MaskedLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils:FutureWarning", "ignore::DeprecationWarning"
)
D, C = 3, 2


class Adapter(nn.Module):
    """W x + b + B A x, in the place of a layer, without any attribute of it."""

    def __init__(self, base: nn.Module, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.ones(1, sizes[1], dtype=torch.float64))
        self.b = nn.Parameter(0.2 * torch.ones(sizes[0], 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0 * (x @ self.a.mT) @ self.b.mT + 0.25  # which keeps the order


class Case(NamedTuple):
    """A layer, and both directions as functions of it, of points and of a context."""

    layer: nn.Module
    forward: Callable[..., tuple[Tensor, ...]]
    inverse: Callable[..., tuple[Tensor, ...]]
    context: bool


def of_nflows(context: bool, residual: bool) -> Case:
    library = pytest.importorskip("nflows.transforms")
    layer = library.MaskedAffineAutoregressiveTransform(
        D, 8, context_features=C if context else None, use_residual_blocks=residual
    )
    return Case(layer, lambda m, *given: m(*given), lambda m, *given: m.inverse(*given), context)


def of_normflows(context: bool, residual: bool) -> Case:
    library = pytest.importorskip("normflows.flows")
    layer = library.MaskedAffineAutoregressive(
        D,
        8,
        num_blocks=0 if context else 2,  # what fastflow converts
        context_features=C if context else None,
        use_residual_blocks=residual,
    )
    return Case(layer, lambda m, *given: m(*given), lambda m, *given: m.inverse(*given), context)


def of_zuko(context: bool) -> Case:
    library = pytest.importorskip("zuko.flows")
    layer = library.MaskedAutoregressiveTransform(D, C * context, hidden_features=(8, 8))

    def inverse(layer: nn.Module, y: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        transform = layer(*c)
        x = transform.inv(y)
        return x, transform.log_abs_det_jacobian(x, y)

    return Case(layer, lambda m, x, *c: m(*c).call_and_ladj(x), inverse, context)


def of_pyro(context: bool, planar: bool = False, stable: bool = False) -> Case:
    library = pytest.importorskip("pyro.distributions.transforms")
    if planar:
        layer = library.conditional_planar(D, C, [8])
    elif context:
        layer = library.conditional_affine_autoregressive(D, C, [8, 8], stable=stable)
    else:
        layer = library.affine_autoregressive(D, [8, 8], stable=stable)

    def at(layer: nn.Module, *c: Tensor) -> torch.distributions.Transform:
        return layer.condition(*c) if context else layer

    def forward(layer: nn.Module, x: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        transform = at(layer, *c)
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)

    def inverse(layer: nn.Module, y: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        if planar:  # Pyro knows no inverse
            return forward(layer, y, *c)
        transform = at(layer, *c)
        # the library's own starts from float32 zeros
        x = transform.inv(y)
        return x, transform.log_abs_det_jacobian(x, transform(x))

    return Case(layer, forward, inverse, context)


CASES: dict[str, Callable[[], Case]] = {
    "nflows": lambda: of_nflows(False, True),
    "nflows, context": lambda: of_nflows(True, True),
    "nflows, feed-forward, context": lambda: of_nflows(True, False),
    "normflows": lambda: of_normflows(False, True),
    "normflows, context": lambda: of_normflows(True, True),
    "normflows, feed-forward": lambda: of_normflows(False, False),
    "zuko": lambda: of_zuko(False),
    "zuko, context": lambda: of_zuko(True),
    "pyro": lambda: of_pyro(False),
    "pyro, context": lambda: of_pyro(True),
    "pyro, stable, context": lambda: of_pyro(True, stable=True),
    "pyro, planar, context": lambda: of_pyro(True, planar=True),
}
MASKED = [name for name in CASES if "planar" not in name]


@pytest.fixture(autouse=True)
def float64() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # Pyro makes zeros of the default type
    yield
    torch.set_default_dtype(before)


def build(name: str) -> tuple[Case, nn.Module, list[Tensor]]:
    """A case, a converted copy of its layer, and inputs."""
    torch.manual_seed(0)
    case = CASES[name]()
    for parameter in case.layer.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    fast = copy.deepcopy(case.layer)
    assert len(fastflow.convert(fast, strict=True).replaced) == 1
    return case, fast, [torch.randn(5, size) for size in ([D, C] if case.context else [D])]


def linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def put(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def patch(linear: nn.Module) -> None:
    inner = linear.forward
    linear.forward = lambda h: inner(h) + 0.5


def double_input(_: nn.Module, args: tuple) -> tuple:
    return (2 * args[0], *args[1:])


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda m: linears(m)[-1].register_forward_hook(lambda _, __, p: p + 0.5),
    "forward hook on the first": lambda m: linears(m)[0].register_forward_hook(
        lambda _, __, p: 2 * p
    ),
    "pre-hook": lambda m: linears(m)[-1].register_forward_pre_hook(double_input),
    "hook on the network": lambda m: next(m.children()).register_forward_pre_hook(double_input),
    "another forward": lambda m: patch(linears(m)[-1]),
    "adapter": lambda m: put(
        m, linears(m)[-1], Adapter(linears(m)[-1], linears(m)[-1].weight.shape)
    ),
    "checkpoint": lambda m: put(m, linears(m)[0], checkpoint_wrapper(linears(m)[0])),
    "spectral_norm": lambda m: [nn.utils.spectral_norm(one) for one in linears(m.eval())],
    "weight_norm": lambda m: [nn.utils.weight_norm(one) for one in linears(m)],
    "prune": lambda m: [prune.l1_unstructured(one, "weight", 0.3) for one in linears(m)],
    "parametrization": lambda m: [parametrizations.weight_norm(one) for one in linears(m)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CASES)
def test_changes_after_conversion_act(name: str, change: str) -> None:
    case, fast, inputs = build(name)
    for model in (case.layer, fast):
        torch.manual_seed(1)
        CHANGES[change](model)
    for call in (case.forward, case.inverse):
        check_same(call, case.layer, fast, inputs)
    assert fast.state_dict().keys() == case.layer.state_dict().keys()
    fast.load_state_dict(case.layer.state_dict())
    fast.double()
    fastflow.revert(fast)
    assert type(fast) is type(case.layer)
    check_same(case.forward, case.layer, fast, inputs)
    if change != "parametrization":  # it is a subclass then, which PyTorch's tools make
        assert [type(one) for one in fast.modules()] == [type(one) for one in case.layer.modules()]


@pytest.mark.parametrize("change", ["hook on the network", "checkpoint", "adapter"])
@pytest.mark.parametrize("name", MASKED)
def test_copies_of_changed_layers(name: str, change: str) -> None:
    case, fast, inputs = build(name)
    for model in (case.layer, fast):
        torch.manual_seed(1)
        CHANGES[change](model)
    stored = io.BytesIO()
    torch.save(fast, stored)
    stored.seek(0)
    for other in (copy.deepcopy(fast), torch.load(stored, weights_only=False)):
        check_same(case.forward, case.layer, other, inputs)


@pytest.mark.parametrize("tool", ["spectral_norm", "weight_norm", "prune", "parametrization"])
@pytest.mark.parametrize("name", CASES)
def test_weights_behind_tools_train(name: str, tool: str) -> None:
    case, fast, inputs = build(name)
    CHANGES[tool](fast)
    optimizer = torch.optim.SGD(fast.parameters(), 1e-2)
    unused = {"nflows", "normflows"} & {name}  # no context
    for _ in range(3):
        optimizer.zero_grad()
        y, ladj = case.forward(fast, *inputs)
        (y.square().mean() - ladj.mean()).backward()
        assert all(p.grad is not None for p in fast.parameters()) or unused
        optimizer.step()


@pytest.mark.parametrize("name", MASKED)
def test_unchanged_again_it_is_fast_again(name: str) -> None:
    case, fast, inputs = build(name)
    (layer,) = (module for module in fast.modules() if isinstance(module, MaskedLayer))
    assert layer.layers() is not None
    handle = linears(fast)[0].register_forward_hook(lambda *_: None)
    assert layer.layers() is None
    handle.remove()
    assert layer.layers() is not None
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert layer.layers() is None
    finally:
        handle.remove()
    inner = linears(fast)[0]
    forward = inner.forward
    patch(inner)
    assert layer.layers() is None
    inner.forward = forward  # as tools put it back: an attribute still
    assert layer.layers() is not None
    for call in (case.forward, case.inverse):
        check_same(call, case.layer, fast, inputs)


@pytest.mark.parametrize("name", MASKED)
def test_a_changed_layer_under_compile(name: str) -> None:
    if name.startswith(("zuko", "pyro")):
        pytest.skip("its own code does not compile in one graph")
    case, fast, inputs = build(name)
    for model in (case.layer, fast):
        linears(model)[-1].register_forward_hook(lambda _, __, p: p + 0.5)
    torch.compiler.reset()
    run = torch.compile(fast, fullgraph=True, backend="eager")
    for found, want in zip(run(*inputs), case.forward(case.layer, *inputs)):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "planar" not in name])
def test_layers_with_replaced_methods_are_left_alone(name: str) -> None:
    torch.manual_seed(0)
    layer = CASES[name]().layer
    patch(linears(layer)[-1])
    check_left_alone(layer, "has a forward of its own")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("nflows", "_elementwise_forward"),
        ("normflows", "_elementwise_inverse"),
        ("zuko", "meta"),
        ("pyro", "_call"),
        ("pyro, context", "condition"),
        ("pyro, planar, context", "condition"),
    ],
)
def test_methods_of_the_layer_count(name: str, method: str) -> None:
    layer = CASES[name]().layer
    inner = getattr(layer, method)
    setattr(layer, method, lambda *given: inner(*given))
    check_left_alone(layer, f"has a {method} of its own")


@pytest.mark.parametrize(
    ("name", "method"),
    [("nflows", "_elementwise_forward"), ("normflows", "_elementwise_forward"), ("zuko", "meta")],
)
def test_methods_replaced_after_conversion_act(name: str, method: str) -> None:
    case, fast, inputs = build(name)
    for model in (case.layer, fast):
        inner = getattr(model, method)
        setattr(model, method, lambda x, *more, inner=inner: inner(x, *(2 * one for one in more)))
    check_same(case.forward, case.layer, fast, inputs)


@pytest.mark.parametrize("name", MASKED)
def test_a_network_in_a_wrapper(name: str) -> None:
    case, fast, inputs = build(name)
    for model in (case.layer, fast):
        put(model, next(model.children()), checkpoint_wrapper(next(model.children())))
    check_same(case.forward, case.layer, fast, inputs)
    fastflow.revert(fast)
    assert "CheckpointWrapper" in fastflow.convert(fast).skipped[0].reason


def test_zuko_local_reparametrisation() -> None:
    bayesian = pytest.importorskip("zuko.bayesian")
    torch.manual_seed(0)
    flow = pytest.importorskip("zuko.flows").MAF(D, C, transforms=2, hidden_features=(8,))
    model = bayesian.BayesianModel(flow, init_logvar=-2.0)
    fast = copy.deepcopy(model)
    fastflow.convert(fast)
    x, c = torch.ones(50, D), torch.ones(50, C)
    for local in (True, False, True):
        densities = []
        for one in (model, fast):
            torch.manual_seed(1)
            with one.reparameterize(local_trick=local) as flow:
                densities.append(flow(c).log_prob(x))
            densities[-1].sum().backward()
        torch.testing.assert_close(*densities)
        assert (densities[1].std() > 1e-3) == local  # rows are equal, noise is not
        for (name, one), other in zip(model.named_parameters(), fast.parameters()):
            torch.testing.assert_close(one.grad, other.grad, msg=name)
    assert all(layer.layers() for layer in fast.modules() if isinstance(layer, MaskedLayer))


def test_zuko_local_reparametrisation_of_fastflow_layers() -> None:
    bayesian = pytest.importorskip("zuko.bayesian")
    model = bayesian.BayesianModel(fastflow.MAF(D, transforms=1, hidden_features=(8,)))
    x = torch.randn(5, D)
    with model.reparameterize() as flow:
        flow.log_prob(x)
    with (
        model.reparameterize(local_trick=True) as flow,
        pytest.raises(TypeError, match=r"network.layers.0 has a forward of its own"),
    ):
        flow.log_prob(x)
    model.base.log_prob(x)
