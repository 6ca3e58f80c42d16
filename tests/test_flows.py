"""Flow: a bijection as a distribution."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal

from fastflow import (
    Bijection,
    Chain,
    ConditionalPlanarFlow,
    Flow,
    Inverse,
    Permutation,
    PlanarFlow,
)


def moved(flow: Flow) -> Flow:
    """The flow with parameters away from the identity."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.7 * torch.randn_like(parameter)
    return flow.double()


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("constraint", ["paper", "centred"])
def test_density_integrates_to_one(inverted: bool, constraint: str) -> None:
    bijection = PlanarFlow(2, steps=4, constraint=constraint)
    flow = moved(Flow(Inverse(bijection) if inverted else bijection))
    axis = torch.linspace(-25, 25, 1501, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass - 1) < 1e-3


def test_samples_have_the_density_they_report() -> None:
    flow = moved(Flow(PlanarFlow(3, steps=4)))
    x, log_prob = flow.rsample_and_log_prob((1000,))
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-9, atol=1e-9)
    assert flow.sample((7,)).shape == (7, 3) and not flow.sample((7,)).requires_grad
    log_prob.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())


def test_context_shapes() -> None:
    flow = Flow(ConditionalPlanarFlow(2, 3, steps=2))
    context = torch.randn(4, 3)
    assert flow.sample((5,), context).shape == (5, 4, 2)
    x, log_prob = flow.rsample_and_log_prob((), context)
    assert x.shape == (4, 2) and log_prob.shape == (4,)
    assert flow.log_prob(torch.randn(6, 4, 2), context).shape == (6, 4)
    assert flow.sample((5,), context[0]).shape == (5, 2)


@pytest.mark.parametrize(
    "base",
    [
        MultivariateNormal(torch.ones(2), torch.eye(2)),
        Independent(Laplace(torch.zeros(2), torch.ones(2)), 1),
    ],
)
def test_any_base(base: torch.distributions.Distribution) -> None:
    flow = Flow(PlanarFlow(2, steps=2), base)
    x, log_prob = flow.rsample_and_log_prob((50,))
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-4, atol=1e-4)


def test_default_base_follows_the_module() -> None:
    flow = Flow(PlanarFlow(2)).double()
    assert flow.sample((3,)).dtype == torch.float64
    assert flow.base.event_shape == (2,)


@pytest.mark.parametrize(
    "bijection",
    [
        PlanarFlow(2).double(),
        Inverse(ConditionalPlanarFlow(2, 3)).double(),
        Chain(Permutation([1, 0]), PlanarFlow(2).double()),
    ],
    ids=lambda bijection: type(bijection).__name__,
)
def test_default_base_is_that_of_a_converted_bijection(bijection: Bijection) -> None:
    flow = Flow(bijection)
    assert flow.base.sample().dtype == torch.float64
    assert flow.float().base.sample().dtype == torch.float32


def test_default_base_is_on_the_device_of_the_bijection() -> None:
    for bijection in (PlanarFlow(2), Permutation([1, 0])):
        assert Flow(bijection.to("meta")).base.sample().device.type == "meta"
        assert Flow(bijection).base.sample().dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Flow(torch.nn.Identity()), TypeError, "bijection is a Identity"),
        (lambda: Flow(PlanarFlow(2), 3), TypeError, "base is a int"),
        (lambda: Flow(PlanarFlow(2)).sample(1.5), TypeError, "shape is 1.5, must be an integer or"),
        (lambda: Flow(PlanarFlow(2)).sample((-1,)), ValueError, "must have no negative size"),
        (
            lambda: Flow(ConditionalPlanarFlow(2, 3)).sample((1,), [0.0]),
            TypeError,
            "Flow: context is a list, must be a torch.Tensor",
        ),
        (lambda: Flow(PlanarFlow(2), Normal(0.0, 1.0)), ValueError, r"event shape \(\)"),
        (
            lambda: Flow(PlanarFlow(2), MultivariateNormal(torch.zeros(3), torch.eye(3))),
            ValueError,
            r"event shape \(3,\), must be \(\) and \(2,\)",
        ),
    ],
)
def test_bad_arguments_are_named(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
