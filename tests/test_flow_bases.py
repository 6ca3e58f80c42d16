"""What a flow starts from: distributions, modules that make one, other flows."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from fastflow import IAF, MAF, Flow, PlanarFlow

D, C = 3, 2
exact = {"rtol": 1e-9, "atol": 1e-9}


def _normal(loc: Tensor, scale: Tensor) -> Distribution:
    # PyTorch's own checks can be traced by no torch.compile
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


class Learned(nn.Module):
    """A normal whose parameters are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.linspace(-1, 1, D))
        self.log_scale = nn.Parameter(torch.full((D,), 0.3))

    def forward(self) -> Distribution:
        return _normal(self.loc, self.log_scale.exp())


class Conditional(nn.Module):
    """A normal whose mean is linear in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(C, D)

    def forward(self, context: Tensor) -> Distribution:
        return _normal(self.mean(context), torch.full((D,), 0.5).to(context))


def of_zuko() -> nn.Module:
    lazy = pytest.importorskip("zuko.lazy")
    law = pytest.importorskip("zuko.distributions").DiagNormal
    return lazy.UnconditionalDistribution(law, torch.linspace(-1, 1, D), torch.full((D,), 1.5))


BASES = {
    "learned": Learned,
    "conditional": Conditional,
    "zuko": of_zuko,
    "flow": lambda: MAF(D, 1, (8,)),
    "flow-context": lambda: IAF(D, 1, (8,), context_features=C),
    "flow-on-conditional": lambda: Flow(PlanarFlow(D), Conditional()),
}
BIJECTIONS = {
    "planar": lambda: PlanarFlow(D, 2),
    "context": lambda: MAF(D, 1, (8,), context_features=C).bijection,
}


@pytest.fixture(params=[(a, b) for a in BASES for b in BIJECTIONS], ids="-on-".join)
def flow(request: pytest.FixtureRequest) -> Flow:
    base, bijection = request.param
    torch.manual_seed(0)
    made = Flow(BIJECTIONS[bijection](), BASES[base]()).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def context_of(flow: Flow, *batch: int) -> Tensor | None:
    takes = flow.bijection.context_features or flow._base_takes_context
    return torch.randn(*batch, C, dtype=torch.float64) if takes else None


def by_hand(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    z, ladj = flow.bijection.inverse(x, context if flow.bijection.context_features else None)
    own = context if flow._base_takes_context else None
    if isinstance(flow.base_module, Flow):
        return by_hand(flow.base_module, z, own) + ladj
    if flow.base_module is None:
        return flow.base.log_prob(z) + ladj
    law = flow.base_module() if own is None else flow.base_module(own)
    return law.log_prob(z) + ladj


def test_a_module_is_the_base(flow: Flow) -> None:
    context = context_of(flow, 4)
    batch = () if context is None else (4,)
    x, log_prob = flow.rsample_and_log_prob((5,), context)
    assert x.shape == (5, *batch, D) and flow.sample((5,), context).shape == x.shape
    torch.testing.assert_close(log_prob, by_hand(flow, x, context), **exact)
    torch.testing.assert_close(flow.log_prob(x, context), log_prob, **exact)
    point = torch.randn(D, dtype=torch.float64)
    torch.testing.assert_close(
        flow.log_prob(point, context), by_hand(flow, point, context), **exact
    )
    law = flow.distribution(context)
    assert law.batch_shape == batch and law.has_rsample
    torch.testing.assert_close(law.log_prob(x), log_prob, **exact)
    wide = law.expand((6, *batch))
    y, wide_log_prob = wide.rsample_and_log_prob((2,))
    assert y.shape == (2, 6, *batch, D) and wide.sample().shape == (6, *batch, D)
    torch.testing.assert_close(flow.log_prob(y, context), wide_log_prob, **exact)


def test_it_is_trained_moved_saved_and_copied(flow: Flow) -> None:
    context = context_of(flow, 7)
    x = torch.randn(7, D, dtype=torch.float64)
    flow.log_prob(x, context).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.base_module.parameters())
    assert {id(p) for p in flow.base_module.parameters()} <= {id(p) for p in flow.parameters()}
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(flow)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file))
    want = flow.log_prob(x, context)
    for twin in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin.log_prob(x, context), want)
    single = copy.deepcopy(flow).float()
    own = None if context is None else context.float()
    assert single.sample((2,), own).dtype == torch.float32
    torch.testing.assert_close(single.log_prob(x.float(), own), want.float(), rtol=1e-4, atol=1e-4)


def test_transforms_of_pytorch(flow: Flow) -> None:
    context = context_of(flow, 4)
    x = torch.randn(4, D, dtype=torch.float64)
    args = (x,) if context is None else (x, context)
    want = flow.log_prob(*args)
    if type(flow.base_module) in (Learned, Conditional):
        compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), want, **exact)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(flow.log_prob(leaf, *args[1:]).sum(), leaf)
    torch.distributions.Distribution.set_default_validate_args(False)  # it looks at values
    try:
        got = torch.func.vmap(torch.func.grad(flow.log_prob))(*args)
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)
    torch.testing.assert_close(got, grad, **exact)


def test_a_base_learns() -> None:
    """The mean of the base is that of the data where the bijection is fixed at the identity."""
    torch.manual_seed(0)
    flow = Flow(PlanarFlow(D), Learned())
    flow.bijection.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], 0.05)
    x = torch.randn(500, D) * 0.5 + 3
    for _ in range(300):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    assert (flow.base_module.loc - 3).abs().max() < 0.3


def constant() -> Distribution:
    return MultivariateNormal(torch.ones(D), 2 * torch.eye(D))


def test_constants_move_with_the_flow() -> None:
    base = constant()
    flow = Flow(PlanarFlow(D), base)
    assert flow.base is base and flow.float().base is base  # nothing has moved
    before = flow.log_prob(torch.zeros(4, D))
    flow.double()
    assert flow.sample((2,)).dtype == torch.float64 and base.loc.dtype == torch.float32
    after = flow.log_prob(torch.zeros(4, D, dtype=torch.float64))
    torch.testing.assert_close(after, before.double(), rtol=1e-6, atol=1e-6)
    nn.ModuleList([flow]).float()  # as part of another module
    assert flow.base.loc.dtype == torch.float32
    assert "loc" not in " ".join(flow.state_dict())


def test_constants_keep_their_values_where_there_are_none() -> None:
    flow = Flow(PlanarFlow(D), constant()).to("meta").to_empty(device="cpu")
    flow.bijection.reset_parameters()
    assert torch.equal(flow.base.loc, torch.ones(D))
    assert flow.log_prob(torch.zeros(D)).isfinite()


def frozen() -> Distribution:
    return MAF(D, 1, (8,)).requires_grad_(False).distribution()


def test_a_frozen_flow_is_a_constant() -> None:
    flow = Flow(PlanarFlow(D), frozen()).double()
    x = flow.sample((4,))
    assert x.dtype == torch.float64 and flow.log_prob(x).isfinite().all()


WITH_GRADIENTS: list[Callable[[], Distribution]] = [
    lambda: Independent(Normal(nn.Parameter(torch.zeros(D)), torch.ones(D)), 1),
    lambda: MultivariateNormal(torch.zeros(D), scale_tril=nn.Parameter(torch.eye(D))),
    lambda: Independent(Normal(torch.zeros(D), torch.zeros(D, requires_grad=True).exp()), 1),
    lambda: MAF(D, 1, (8,)).distribution(),
    lambda: torch.distributions.TransformedDistribution(
        Independent(Normal(torch.zeros(D), torch.ones(D)), 1),
        torch.distributions.AffineTransform(nn.Parameter(torch.zeros(D)), 1.0, event_dim=1),
    ),
]


@pytest.mark.parametrize("make", WITH_GRADIENTS)
@pytest.mark.parametrize("kind", [MAF, IAF, Flow])
def test_what_nobody_would_train_is_refused(make: Callable, kind: type) -> None:
    with pytest.raises(ValueError, match=r"Flow: base .* give it as an nn.Module whose forward"):
        Flow(PlanarFlow(D), make()) if kind is Flow else kind(D, base=make())


class Making(nn.Module):
    """Makes whatever it is given."""

    def __init__(self, thing: object) -> None:
        super().__init__()
        self.thing = thing

    def forward(self) -> object:
        return self.thing


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: Flow(PlanarFlow(D), Making(3)).sample(), TypeError, "base made a int"),
        (
            lambda: Flow(PlanarFlow(D), Making(Normal(torch.zeros(D), 1.0))).sample(),
            ValueError,
            r"batch shape \(3,\) and event shape \(\)",
        ),
        (
            lambda: Flow(PlanarFlow(D), nn.Identity()).sample((), torch.zeros(2)),
            TypeError,
            "base made a Tensor, must make a torch.distributions object",
        ),
        (lambda: Flow(PlanarFlow(D), MAF(2)), ValueError, "base has 2 features"),
        (
            lambda: Flow(MAF(D, context_features=C).bijection, MAF(D, 1, (8,), context_features=4)),
            ValueError,
            "takes a context of 4, must be 3 and 2, or no context",
        ),
        (
            lambda: Flow(PlanarFlow(D), IAF(D, 1, (8,), context_features=C)).distribution(),
            TypeError,
            "FlowDistribution: context is None",
        ),
        (
            lambda: Flow(PlanarFlow(D), Learned()).sample((), torch.zeros(C)),
            TypeError,
            "context is a Tensor, must be None",
        ),
        (
            lambda: Flow(PlanarFlow(D), Learned()).log_prob(torch.zeros(D), torch.zeros(C)),
            TypeError,
            "context is a Tensor, must be None",
        ),
        (
            lambda: Flow(PlanarFlow(D), Conditional()).sample((), torch.zeros(C).long()),
            TypeError,
            "context is torch.int64, must be a floating-point tensor",
        ),
        (
            lambda: Flow(PlanarFlow(D), Conditional()).sample(),
            TypeError,
            "base Conditional needs a context",
        ),
    ],
)
def test_bad_bases_are_named(use: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        use()
