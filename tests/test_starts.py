"""Where flows start, and where densities leave the range of their type."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution

from fastflow import (
    IAF,
    MAF,
    BijectionTransform,
    Flow,
    Inverse,
    MaskedAffineAutoregressive,
    PCPMap,
    PlanarFlow,
)
from fastflow.bijections.composition import Chain
from fastflow.reference.scales import log_scale
from fastflow.scales import NAMES, Gate, Sigmoid, Softplus

SCALES = [*NAMES]
C = 3


def untamed(flow: Flow) -> Flow:
    """The flow with PyTorch's starting values for all its linear layers."""
    torch.manual_seed(0)
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.Linear.reset_parameters(module)
    return flow


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", [MAF, IAF])
@pytest.mark.parametrize(
    ("features", "transforms", "options"),
    [
        (2, 20, {}),
        (64, 20, {"context_features": C}),
        (64, 20, {"context_features": C, "residual": True}),
        (64, 20, {"context_features": C, "hidden_features": ()}),
        (16, 60, {}),
    ],
)
def test_deep_flows_start_near_the_base(
    kind: type, scale: str, features: int, transforms: int, options: dict
) -> None:
    torch.manual_seed(0)
    flow = kind(features, transforms, scale=scale, **options)
    x = torch.randn(100, features)
    context = torch.randn(100, C) if "context_features" in options else None
    with torch.no_grad():
        log_prob = flow.log_prob(x, context)
        draws = flow.sample(() if context is not None else (100,), context)
    assert (log_prob - flow.base_log_prob(x)).mean().abs() < 4  # nats
    assert 0.75 < draws.std() < 1.3


@pytest.mark.parametrize("scale", [*SCALES, Softplus(0.0), Sigmoid(0.0), Gate(40.0), Gate(-900.0)])
@pytest.mark.parametrize("depth", [1, 4, 50])
def test_layers_of_a_flow_scale_together_as_one_would(scale: object, depth: int) -> None:
    layer = MaskedAffineAutoregressive(3, (8,), scale=scale, depth=depth)
    one = layer.scale
    found = log_scale(torch.tensor(one.start(depth)).double(), one.number, *one.constants)
    alone = log_scale(torch.zeros(()).double(), one.number, *one.constants)
    if not isinstance(one, (Gate, Sigmoid)):
        assert abs(found) < 1e-6
    elif alone > -700:
        assert abs(found * depth - alone) < 1e-6
    outputs = layer.network(torch.zeros(3))
    assert (outputs[:, 0].abs() < 0.3).all() and outputs.isfinite().all()
    torch.testing.assert_close(
        outputs[:, 1], torch.full((3,), one.start(depth)), rtol=0.01, atol=0.02
    )


@pytest.mark.parametrize("hidden", [(), (8,), (8, 8)])
@pytest.mark.parametrize("order", ["parents first", "children first", "the layer alone"])
def test_the_start_comes_back(hidden: tuple[int, ...], order: str) -> None:
    def make() -> MaskedAffineAutoregressive:
        return MaskedAffineAutoregressive(3, hidden, C, scale="gate", depth=6)

    def small(layer: MaskedAffineAutoregressive) -> bool:
        made = [layer.network.layers[-1], *([layer.network.context_layer] if not hidden else [])]
        raw = [linear.weight.unflatten(0, (3, 2))[:, 1].abs().max() for linear in made]
        bias = made[0].bias.unflatten(0, (3, 2))
        started = torch.full((3,), Gate().start(6))
        return bool(max(raw) < 0.01) and torch.equal(bias.T, torch.stack([0 * started, started]))

    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for twin in (layer, copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.fill_(7)
        assert not small(twin)
        if order == "the layer alone":
            twin.network.reset_parameters()
        modules = [*twin.modules()]
        for module in modules if order == "parents first" else modules[::-1]:
            if order != "the layer alone" and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert small(twin)
        hidden_layer = twin.network.layers[0].weight
        assert not hidden or 0.1 < hidden_layer.abs().max() < 1  # PyTorch's own


def test_gradients_reach_all_layers_at_the_start() -> None:
    torch.manual_seed(0)
    flow = IAF(4, 20, context_features=C)
    x, log_prob = flow.rsample_and_log_prob((64,), torch.randn(1, C))
    (log_prob + 0.5 * (x - 1).square().sum(-1).unsqueeze(0)).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad.abs().max() > 1e-7, name  # Adam's eps is 1e-8


DEEP = {
    "iaf": lambda: untamed(IAF(5, 40, (16,))),
    "iaf-context": lambda: untamed(IAF(5, 40, (16,), context_features=C)),
    "maf-sigmoid": lambda: untamed(IAF(5, 90, (16,), scale="sigmoid")),
    "with planar": lambda: untamed(
        Flow(Chain(PlanarFlow(5, 2), IAF(5, 40, (16,)).bijection, PlanarFlow(5)))
    ),
    "with pcp": lambda: untamed(
        Flow(Chain(PCPMap(5, hidden_features=(4,)), IAF(5, 40, (16,)).bijection))
    ),
    "a base": lambda: untamed(
        Flow(IAF(5, 40, (16,)).bijection, Independent(Normal(torch.zeros(5), torch.ones(5)), 1))
    ),
}
FAR = {scale: lambda s=scale: untamed(MAF(5, 6, (16,), scale=s)) for scale in SCALES}


def cases(flow: Flow, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=generator).to(dtype)
    x[::2] *= 1e30 if dtype == torch.float32 else 1e300
    context = torch.randn(40, C, generator=generator).to(dtype)
    return x, context if flow.bijection.context_features else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*DEEP, *FAR])
def test_a_density_of_a_finite_point_is_not_nan(name: str, dtype: torch.dtype) -> None:
    flow = (DEEP | FAR)[name]().to(dtype)
    x, context = cases(flow, dtype)
    with torch.no_grad():
        found = flow.log_prob(x, context)
        law = flow.distribution(context)
        assert not found.isnan().any()
        assert name in FAR or (found == -math.inf).any()
        assert torch.equal(law.log_prob(x), found)
        if flow.base_module is None and flow._base is None:
            given = BijectionTransform(flow.bijection, context)
            made = TransformedDistribution(flow.base, given).log_prob(x)
            torch.testing.assert_close(made.isinf(), found.isinf())
            assert not made.isnan().any()
        x[3], x[4, 2] = math.nan, math.nan
        if context is not None:
            context[5, 1] = math.nan
        if flow._base is not None:
            return  # it refuses NaN itself
        lost = flow.log_prob(x, context)
        bad = [3, 4] if context is None else [3, 4, 5]
        assert lost.isnan().nonzero()[:, 0].tolist() == bad
        rest = [row for row in range(40) if row not in bad]
        assert torch.equal(lost[rest], found[rest])


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_lost_rows_leave_the_gradients_of_others_alone(with_context: bool, with_base: bool) -> None:
    base = Independent(Normal(torch.zeros(5), torch.ones(5)), 1) if with_base else None
    flow = IAF(5, 10, (16,), context_features=C * with_context, base=base)
    flow = untamed(flow).double()
    x, context = cases(flow, torch.float64)
    kept = flow.log_prob(x, context).isfinite() & (x.abs().amax(-1) < 1e9)
    lost = flow.log_prob(x, context) == -math.inf
    assert kept.any() and lost.any()
    rows = kept | lost
    leaf = x[rows].requires_grad_()
    some = None if context is None else context[rows]
    log_prob = flow.log_prob(leaf, some)
    got = torch.autograd.grad(log_prob.sum(), [leaf, *flow.parameters()])
    other = None if context is None else context[kept]
    part = x[kept].requires_grad_()
    want = torch.autograd.grad(flow.log_prob(part, other).sum(), [part, *flow.parameters()])
    assert all(grad.isfinite().all() for grad in want)
    assert not got[0][lost[rows]].any()
    assert all(map(torch.equal, got[1:], want[1:]))
    leaf = x[lost].requires_grad_()  # none is left
    flow.log_prob(leaf, None if context is None else context[lost]).sum().backward()
    assert not leaf.grad.any() and not any(p.grad.any() for p in flow.parameters())


@pytest.mark.parametrize("name", ["iaf", "iaf-context"])
def test_graphs_and_function_transforms_say_the_same(name: str) -> None:
    flow = DEEP[name]().double()
    x, context = cases(flow, torch.float64)
    args = (x,) if context is None else (x, context)
    with torch.no_grad():
        want = flow.log_prob(*args)
        compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args).isinf(), want.isinf())
        assert not torch.func.vmap(flow.log_prob)(*args).isnan().any()


def test_parameters_that_are_nan_are_not_hidden() -> None:
    flow = DEEP["iaf"]()
    with torch.no_grad():
        flow.bijection[0].network.layers[-1].bias[:] = math.nan
        assert flow.log_prob(cases(flow, torch.float32)[0]).isnan().all()


def test_what_is_undetermined_stays_nan() -> None:
    """A determinant that is NaN at a finite image says nothing of the density."""

    class Undetermined(PlanarFlow):
        def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return y, y.sum(-1) * math.nan

    assert Flow(Inverse(Inverse(Undetermined(2)))).log_prob(torch.zeros(4, 2)).isnan().all()
