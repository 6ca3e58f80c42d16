"""Flows and bijections in torch.distributions and in Pyro."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
    constraints,
)

from fastflow import (
    IAF,
    MAF,
    Bijection,
    BijectionTransform,
    ConditionalPlanarFlow,
    Flow,
    Inverse,
    Permutation,
    PlanarFlow,
)

D, C = 3, 2
exact = {"rtol": 1e-9, "atol": 1e-9}


class Counting(Bijection):
    """Counts the passes through a bijection, of both directions."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection, self.passes = bijection, 0
        self.features, self.context_features = bijection.features, bijection.context_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.passes += 1
        return self.bijection(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.passes += 1
        return self.bijection.inverse(y, context)


def counting_flow(context: bool = False) -> Flow:
    maf = MAF(D, transforms=2, hidden_features=(8,), context_features=C if context else 0)
    return Flow(Counting(maf.bijection)).double()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


FLOWS = [
    pytest.param(lambda: MAF(D, 2, (8,)), id="maf"),
    pytest.param(lambda: IAF(D, 2, (8,), context_features=C), id="iaf-context"),
    pytest.param(lambda: Flow(PlanarFlow(D, 2)), id="planar"),
    pytest.param(lambda: Flow(Inverse(ConditionalPlanarFlow(D, C, 2))), id="planar-context"),
]


@pytest.mark.parametrize("make", FLOWS)
@pytest.mark.parametrize("cache_size", [0, 1])
def test_a_transformed_distribution_is_the_flow(make: Callable, cache_size: int) -> None:
    flow = make().double()
    context = random(4, C) if flow.bijection.context_features else None
    transform = BijectionTransform(flow.bijection, context, cache_size)
    law, batch = TransformedDistribution(flow.base, transform), () if context is None else (4,)
    assert law.batch_shape == batch and law.event_shape == (D,)
    x = law.rsample((5,))
    assert x.shape == (5, *batch, D)
    torch.testing.assert_close(law.log_prob(x), flow.log_prob(x, context), **exact)
    point = random(D)
    torch.testing.assert_close(law.log_prob(point), flow.log_prob(point, context), **exact)
    wide = law.expand((6, *batch))
    assert wide.sample((2,)).shape == (2, 6, *batch, D)
    torch.testing.assert_close(wide.log_prob(point)[0], flow.log_prob(point, context), **exact)
    back = transform.inv.inv(transform.inv(x))
    torch.testing.assert_close(back, x, **exact)


@pytest.mark.parametrize("make", FLOWS)
def test_a_distribution_is_the_flow(make: Callable) -> None:
    flow = make().double()
    context = random(4, C) if flow.bijection.context_features else None
    law, batch = flow.distribution(context), () if context is None else (4,)
    assert law.batch_shape == batch and law.event_shape == (D,) and law.has_rsample
    assert law.support == constraints.real_vector
    x, log_prob = law.rsample_and_log_prob((5,))
    assert x.shape == (5, *batch, D) and x.requires_grad
    torch.testing.assert_close(log_prob, flow.log_prob(x.detach(), context), **exact)
    torch.testing.assert_close(law.log_prob(x.detach()), log_prob, **exact)
    assert not law.sample().requires_grad
    torch.manual_seed(1)
    one = law.sample((3,))
    torch.manual_seed(1)
    assert torch.equal(one, flow.sample((3,), context))


@pytest.mark.parametrize("make", FLOWS)
def test_expanding_and_reinterpreting(make: Callable) -> None:
    flow = make().double()
    context = random(4, C) if flow.bijection.context_features else None
    law = flow.distribution(context, validate_args=True)
    wide = law.expand((6, 4))
    x = wide.rsample((2,))
    assert wide.batch_shape == (6, 4) and x.shape == (2, 6, 4, D) and wide._validate_args
    assert len(set(x.flatten().tolist())) == x.numel()  # draws of their own
    torch.testing.assert_close(wide.log_prob(x), flow.log_prob(x, context), **exact)
    torch.testing.assert_close(
        wide.log_prob(x[0, 0, 0]), flow.log_prob(x[0, 0, 0], context).expand(6, 4), **exact
    )
    joint = Independent(wide, 1)
    assert joint.batch_shape == (6,) and joint.event_shape == (4, D)
    torch.testing.assert_close(joint.log_prob(x), wide.log_prob(x).sum(-1))
    assert Independent(law.expand((2, 4)), 1).expand((5, 2)).sample().shape == (5, 2, 4, D)


def test_any_base_and_what_it_cannot_do() -> None:
    base = MultivariateNormal(torch.ones(2), torch.eye(2))
    law = Flow(PlanarFlow(2), base).distribution().expand((5,))
    with torch.no_grad():
        x = law.sample()
        before = law.log_prob(x)
        base.loc += 3  # no parameter of the flow, and still part of the density
        torch.testing.assert_close(law.log_prob(x), law.flow.log_prob(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(law.log_prob(x), before)
    discrete = Independent(torch.distributions.Poisson(torch.ones(2)), 1)
    law = Flow(Permutation([1, 0]), discrete).distribution()
    assert not law.has_rsample and law.sample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError):
        law.rsample()
    box = Flow(Permutation([1, 0]), Independent(Uniform(torch.zeros(2), torch.ones(2)), 1))
    assert box.distribution().log_prob(torch.full((2,), 0.5)) == 0


@pytest.mark.parametrize("what", ["mean", "variance", "stddev", "entropy"])
def test_what_has_no_closed_form(what: str) -> None:
    law = Flow(PlanarFlow(2)).distribution()
    name = what.replace("stddev", "variance")
    with pytest.raises(NotImplementedError, match=f"the {name} of a flow .* from .*samples"):
        getattr(law, what)() if what == "entropy" else getattr(law, what)


def test_a_divergence_by_samples() -> None:
    """KL(N(0, 1) || N(1, 1)) is 1/2 a dimension; the mean of 20000 draws misses it by 0.012."""
    law = Flow(Permutation([1, 0])).distribution()
    other = Independent(Normal(torch.ones(2), torch.ones(2)), 1)
    x, log_prob = law.rsample_and_log_prob((20000,))
    assert abs((log_prob - other.log_prob(x)).mean() - 1) < 0.05  # four deviations
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(law, other)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_one_pass_gives_value_and_determinant(cache_size: int) -> None:
    flow = counting_flow(context=True)
    law = TransformedDistribution(
        flow.base, BijectionTransform(flow.bijection, random(4, C), cache_size)
    )
    law.log_prob(random(4, D)).sum().backward()
    assert flow.bijection.passes == 1
    x = law.transforms[0](random(4, D))
    law.transforms[0].log_abs_det_jacobian(*[random(4, D)] * 2)  # of another pair
    assert flow.bijection.passes == 3
    x = law.rsample()
    law.log_prob(x)
    assert flow.bijection.passes == (4 if cache_size else 5)


def test_the_density_of_a_draw_takes_no_pass() -> None:
    flow = counting_flow(context=True)
    law = flow.distribution(random(4, C))
    x = law.rsample((2,))
    known = law.log_prob(x)
    assert flow.bijection.passes == 1
    torch.testing.assert_close(known, law.log_prob(x.clone()), **exact)
    assert flow.bijection.passes == 2
    parameters = list(flow.parameters())
    again = flow.log_prob(x.detach(), law.context)
    first, second = (
        torch.autograd.grad(one.sum(), parameters, retain_graph=True)
        for one in (known, law.log_prob(x.clone()))
    )
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)  # through x and directly
    torch.testing.assert_close(again, known, **exact)


def change_parameter(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)


def step_an_optimizer(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    flow.log_prob(random(5, D), context[:1]).mean().backward()
    torch.optim.SGD(flow.parameters(), 0.1).step()


def replace_parameter(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    layer = flow.bijection.bijection.bijection[0].network.layers[0]
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.5)


def load_parameters(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    flow.load_state_dict(counting_flow(context=True).state_dict(), assign=True)


def change_x(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    x.add_(1)


def change_y(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    y.mul_(2)


def change_context(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    context.add_(1)


def change_nothing(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    pass


CHANGES = [change_parameter, step_an_optimizer, replace_parameter, load_parameters, change_x]
CHANGES += [change_y, change_context, change_nothing]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_nothing_stale_is_returned(change: Callable, cache_size: int, direction: str) -> None:
    flow, context, given = counting_flow(context=True), random(4, C), random(4, D)
    transform = BijectionTransform(flow.bijection, context, cache_size)
    with torch.no_grad():
        if direction == "forward":
            x, y = given, transform(given)
        else:
            x, y = transform.inv(given), given
        before = transform.log_abs_det_jacobian(x, y)
        first = transform(x) if direction == "forward" else transform.inv(y)  # remembers again
    change(flow, x, y, context)
    with torch.no_grad():
        fresh = flow.bijection(x, context)
        if change is not change_y:  # a changed y says nothing of x
            torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), fresh[1], **exact)
        torch.testing.assert_close(transform(x), fresh[0], **exact)
        torch.testing.assert_close(transform.inv(y), flow.bijection.inverse(y, context)[0], **exact)
    if change is change_nothing:
        torch.testing.assert_close(before, fresh[1], **exact)
        assert (first is (y if direction == "forward" else x)) == bool(cache_size)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_gradients_are_there_though_the_draw_had_none(cache_size: int) -> None:
    flow = counting_flow()
    laws = (
        flow.distribution(),
        TransformedDistribution(flow.base, BijectionTransform(flow.bijection, None, cache_size)),
    )
    for law in laws:
        x = law.sample((5,))
        got = torch.autograd.grad(law.log_prob(x).sum(), list(flow.parameters()))
        want = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        y = law.rsample((5,))
        with torch.no_grad():
            assert not law.log_prob(y).requires_grad
    with torch.inference_mode():  # whose tensors do not tell when they change
        x = laws[0].sample((5,))
        before = laws[0].log_prob(x)
        x += 1
        assert not torch.allclose(laws[0].log_prob(x), before)


def test_copies_hold_no_draw() -> None:
    flow = counting_flow(context=True)
    context = random(4, C)
    law, transform = flow.distribution(context), BijectionTransform(flow.bijection, context, 1)
    x = law.rsample()
    y = transform(x)
    for copied in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        twin, other = copied(law), copied(transform)
        torch.testing.assert_close(twin.log_prob(x), law.log_prob(x), **exact)
        assert twin.sample((3,)).shape == (3, 4, D)
        assert torch.equal(other(x), y) and torch.equal(other.inv(other(x)), x)
    assert transform.with_cache(1) is transform
    assert transform.with_cache(0)._cache_size == 0 and transform.inv.inv is transform


def test_transforms_of_pytorch() -> None:
    """What is remembered is nothing that vmap, grad or torch.compile would see."""
    flow = counting_flow()
    transform = BijectionTransform(flow.bijection, cache_size=1)
    law, points = TransformedDistribution(flow.base, transform, validate_args=False), random(4, D)
    for one in (law, flow.distribution(validate_args=False)):
        want = flow.log_prob(points)
        torch.testing.assert_close(torch.func.vmap(one.log_prob)(points), want, **exact)
        grads = torch.func.vmap(torch.func.grad(one.log_prob))(points)
        leaf = points.clone().requires_grad_()
        torch.testing.assert_close(
            grads, torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)[0], **exact
        )
        compiled = torch.compile(one.log_prob, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(points), want, **exact)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BijectionTransform(torch.nn.Identity()), TypeError, "bijection is a Identity"),
        (lambda: BijectionTransform(PlanarFlow(2), torch.zeros(1)), TypeError, "must be None"),
        (lambda: BijectionTransform(ConditionalPlanarFlow(2, 3)), TypeError, "context is None"),
        (lambda: BijectionTransform(PlanarFlow(2), cache_size=2), ValueError, "must be 0 or 1"),
        (
            lambda: BijectionTransform(PlanarFlow(2)).forward_shape((5, 3)),
            ValueError,
            r"BijectionTransform: shape is \(5, 3\), must be \(..., 2\)",
        ),
        (lambda: Flow(PlanarFlow(2)).distribution(torch.zeros(1)), TypeError, "must be None"),
        (
            lambda: Flow(ConditionalPlanarFlow(2, 3)).distribution(torch.zeros(4)),
            ValueError,
            r"FlowDistribution: context has shape \(4,\), must be \(..., 3\)",
        ),
        (
            lambda: Flow(ConditionalPlanarFlow(2, 3)).distribution(
                torch.full((3,), torch.nan), True
            ),
            ValueError,
            "Expected parameter context",
        ),
        (
            lambda: Flow(PlanarFlow(2)).distribution(None, True).log_prob(torch.zeros(3)),
            ValueError,
            "must match event_shape",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_validation_can_be_turned_off() -> None:
    law = Flow(PlanarFlow(2)).distribution(validate_args=False)
    assert law.log_prob(torch.full((2,), torch.nan)).isnan()
    with pytest.raises(ValueError, match="within the support"):
        Flow(PlanarFlow(2)).distribution(None, True).log_prob(torch.full((2,), torch.nan))


@pytest.mark.parametrize("way", ["distribution", "transform"])
def test_stochastic_variational_inference_in_pyro(way: str) -> None:
    """A flow is the guide of a correlated normal, in a plate; each step takes one pass of it."""
    pyro = pytest.importorskip("pyro")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    flow = Flow(Counting(IAF(2, 2, (16,), activation="tanh").bijection))
    target = MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    target = pyro.distributions.MultivariateNormal(target.loc, target.covariance_matrix)

    def model() -> None:
        with pyro.plate("draws", 128):
            pyro.sample("x", target)

    def guide() -> None:
        pyro.module("flow", flow)
        if way == "distribution":
            law = pyro.distributions.Independent(flow.distribution(), 0)
        else:
            law = pyro.distributions.TransformedDistribution(
                pyro.distributions.Normal(torch.zeros(2), torch.ones(2)).to_event(1),
                [BijectionTransform(flow.bijection, cache_size=1)],
            )
        with pyro.plate("draws", 128):
            pyro.sample("x", law)

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 2e-2}), pyro.infer.Trace_ELBO())
    losses = [svi.step() / 128 for _ in range(150)]
    assert flow.bijection.passes == 150
    assert sum(losses[:10]) / 10 > 0.5 and sum(losses[-10:]) / 10 < 0.1  # a KL divergence
    law = pyro.distributions.Independent(flow.distribution(), 0)
    assert law.expand((4, 3)).to_event(1).shape() == (4, 3, 2)
    assert law.expand_by((5,)).mask(False).sample().shape == (5, 2)
