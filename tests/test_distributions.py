"""Flows and bijections in torch.distributions and in Pyro."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from conftest import in_threads
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
    MADE,
    MAF,
    Bijection,
    BijectionTransform,
    ConditionalPlanarFlow,
    Flow,
    Inverse,
    PCPMap,
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


NO_RSAMPLE = r"^Flow: its base .* cannot be reparametrised"


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
    for one in (law, law.flow):
        assert one.sample((3,)).shape == (3, 2)
        with pytest.raises(NotImplementedError, match=NO_RSAMPLE):
            one.rsample()
        with pytest.raises(NotImplementedError, match=NO_RSAMPLE):
            one.rsample_and_log_prob()
    box = Flow(Permutation([1, 0]), Independent(Uniform(torch.zeros(2), torch.ones(2)), 1))
    assert box.distribution().log_prob(torch.full((2,), 0.5)) == 0


NO_CLOSED_FORM = {
    "mean": lambda law: law.mean,
    "variance": lambda law: law.variance,
    "stddev": lambda law: law.stddev,
    "mode": lambda law: law.mode,
    "entropy": lambda law: law.entropy(),
    "perplexity": lambda law: law.perplexity(),
    "cdf": lambda law: law.cdf(torch.zeros(2)),
    "icdf": lambda law: law.icdf(torch.full((2,), 0.5)),
}


@pytest.mark.parametrize("what", NO_CLOSED_FORM)
def test_what_has_no_closed_form(what: str) -> None:
    law = Flow(PlanarFlow(2)).distribution()
    name = {"stddev": "variance", "perplexity": "entropy"}.get(what, what)
    with pytest.raises(NotImplementedError, match=f"the {name} of a flow .* from .*samples"):
        NO_CLOSED_FORM[what](law)


def test_every_method_that_cannot_answer_says_why() -> None:
    law, x = Flow(PlanarFlow(2)).distribution(), torch.zeros(2)
    methods = [lambda: law.enumerate_support(), *(partial(f, law) for f in NO_CLOSED_FORM.values())]
    for method in methods:
        with pytest.raises(NotImplementedError, match=r"^FlowDistribution: the "):
            method()
    named = {"enumerate_support", *NO_CLOSED_FORM}
    for name in dir(torch.distributions.Distribution):  # what a later torch adds is seen here
        if name.startswith(("_", "set_default")) or name in named:
            continue
        value = getattr(law, name)
        if callable(value) and "value" in inspect.signature(value).parameters:
            value(x)


SHAPES = {
    "int": (5, (5,)),
    "numpy": (np.int64(5), (5,)),
    "tuple": ((2, 3), (2, 3)),
    "list-of-numpy": ([np.int64(2), 3], (2, 3)),
    "array": (np.array([2, 3]), (2, 3)),
    "size": (torch.Size([2, 3]), (2, 3)),
    "empty": ((), ()),
    "zero": (0, (0,)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
def test_sample_shapes(shape: str, context: bool) -> None:
    given, want = SHAPES[shape]
    flow, batch = counting_flow(context), (4,) if context else ()
    c = random(4, C) if context else None
    law = flow.distribution(c)
    for method in ("sample", "rsample"):
        assert getattr(flow, method)(given, c).shape == (*want, *batch, D)
        assert getattr(law, method)(given).shape == (*want, *batch, D)
        assert getattr(flow, method)(given, c).requires_grad == (method == "rsample")
    for x, log_prob in (flow.rsample_and_log_prob(given, c), law.rsample_and_log_prob(given)):
        assert x.shape == (*want, *batch, D) and log_prob.shape == x.shape[:-1]
    assert law.expand((*want, *batch)).batch_shape == (*want, *batch)
    assert flow.distribution().expand(given).sample().shape == (*want, D) if not context else True


NO_SHAPES = {
    "str": ("5", TypeError, "is '5', must be an integer or a sequence of integers"),
    "strs": (("5",), TypeError, r"is \('5',\), must be"),
    "float": (5.0, TypeError, "is 5.0, must be"),
    "floats": ([2.0], TypeError, r"is \[2.0\], must be"),
    "bool": (True, TypeError, "is True, must be"),
    "bools": ((True, 2), TypeError, r"is \(True, 2\), must be"),
    "none": (None, TypeError, "is None, must be"),
    "context": (torch.zeros(4, C), TypeError, r"is a tensor of shape \(4, 2\), must be"),
    "negative": (-1, ValueError, r"is \(-1,\), must have no negative size"),
    "negatives": ((2, -1), ValueError, r"is \(2, -1\), must have no negative size"),
}


@pytest.mark.parametrize("case", NO_SHAPES)
def test_what_is_no_shape(case: str) -> None:
    given, error, message = NO_SHAPES[case]
    flow, c = counting_flow(context=True), random(4, C)
    for method in ("sample", "rsample", "rsample_and_log_prob"):
        with pytest.raises(error, match=f"^Flow: shape {message}"):
            getattr(flow, method)(given, c)
        with pytest.raises(error, match=f"^FlowDistribution: sample_shape {message}"):
            getattr(flow.distribution(c), method)(given)
    with pytest.raises(error, match=f"^FlowDistribution: batch_shape {message}"):
        flow.distribution(c).expand(given)


def test_a_shape_given_as_context() -> None:
    flow = counting_flow(context=True)
    for method in ("sample", "rsample", "rsample_and_log_prob"):
        with pytest.raises(TypeError, match=r"^Flow: context is a tuple, must be a torch.Tensor"):
            getattr(flow, method)((5,), (4,))
    with pytest.raises(TypeError, match=r"^FlowDistribution: context is a tuple"):
        flow.distribution((4,))
    with pytest.raises(TypeError, match=r"^Flow: context is a tuple, must be None"):
        counting_flow().sample((5,), (4,))


def test_counts_of_any_integer_type() -> None:
    two, four = np.int64(2), np.int32(4)
    flows = (
        MAF(two, two, (four,), context_features=two),
        IAF(two, torch.tensor(2), [np.uint8(4)]),
        Flow(PlanarFlow(two, four)),
        Flow(ConditionalPlanarFlow(two, two, two, (four,))),
        Flow(PCPMap(two, two, (four,))),
    )
    for flow in flows:
        context = torch.zeros(2) if flow.bijection.context_features else None
        assert flow.sample(two, context).shape == (2, 2) and type(flow.features) is int
        assert all(type(part.in_features) is int for part in parts_of(flow.bijection))
    for wrong in (2.0, "2", True, np.float64(2), np.bool_(True), torch.tensor(True), None):
        with pytest.raises(TypeError, match=r"features is .*, must be an integer"):
            PlanarFlow(wrong)
    with pytest.raises(ValueError, match="features is 0, must be at least 1"):
        PlanarFlow(np.int64(0))
    own = Permutation([1, 0])
    own.features = two
    assert Flow(own).sample(3).shape == (3, 2)


def parts_of(bijection: Bijection) -> list[torch.nn.Linear]:
    """The linear layers of a masked bijection."""
    kinds = [part for part in bijection.modules() if isinstance(part, MADE)]
    return [part for made in kinds for part in made.modules() if hasattr(part, "in_features")]


def test_a_divergence_by_samples() -> None:
    """KL(N(0, 1) || N(1, 1)) is 1/2 a dimension; the mean of 20000 draws misses it by 0.012."""
    law = Flow(Permutation([1, 0])).distribution()
    other = Independent(Normal(torch.ones(2), torch.ones(2)), 1)
    x, log_prob = law.rsample_and_log_prob((20000,))
    assert abs((log_prob - other.log_prob(x)).mean() - 1) < 0.05  # four deviations
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(law, other)


def test_one_pass_draws_and_scores() -> None:
    flow = counting_flow(context=True)
    law = flow.distribution(random(4, C))
    x, known = law.rsample_and_log_prob((2,))
    assert flow.bijection.passes == 1
    parameters = list(flow.parameters())
    torch.testing.assert_close(law.log_prob(x), known, **exact)
    assert flow.bijection.passes == 2
    first, second = (
        torch.autograd.grad(one.sum(), parameters, retain_graph=True)
        for one in (known, law.log_prob(x))
    )
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)  # through x and directly


def change_parameter(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)


def step_an_optimizer(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    flow.log_prob(random(5, D), context[:1]).mean().backward()
    torch.optim.SGD(flow.parameters(), 0.1).step()


def step_a_fused_optimizer(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        flow.zero_grad()
        flow.log_prob(random(5, D), context[:1]).mean().backward()
        kind(flow.parameters(), 0.1, fused=True).step()


def clamp_data(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    for parameter in flow.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def set_from_a_vector(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    vector = torch.nn.utils.parameters_to_vector(flow.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.5, flow.parameters())


def change_x_unseen(flow: Flow, x: Tensor, y: Tensor, context: Tensor) -> None:
    x.data.add_(1)


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
CHANGES += [change_y, change_context, change_nothing, step_a_fused_optimizer, clamp_data]
CHANGES += [set_from_a_vector, change_x_unseen]


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
    change(flow, x, y, context)
    with torch.no_grad():
        fresh = flow.bijection(x, context)
        if change is not change_y:  # a changed y says nothing of x
            torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), fresh[1], **exact)
        torch.testing.assert_close(transform(x), fresh[0], **exact)
        torch.testing.assert_close(transform.inv(y), flow.bijection.inverse(y, context)[0], **exact)
    if change is change_nothing:
        torch.testing.assert_close(before, fresh[1], **exact)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_density_of_a_draw_is_not_stale(change: Callable) -> None:
    flow, context = counting_flow(context=True), random(4, C)
    law = flow.distribution(context)
    x = law.sample()
    law.log_prob(x)
    with torch.no_grad():
        x_before, before = x.clone(), law.log_prob(x)
    change(flow, x, x.clone(), context)
    with torch.no_grad():
        torch.testing.assert_close(law.log_prob(x), flow.log_prob(x.clone(), context), **exact)
        if change not in (change_nothing, change_y):
            assert not torch.allclose(law.log_prob(x), before), x_before


@pytest.mark.parametrize("make", FLOWS)
@pytest.mark.parametrize("cache_size", [None, 0, 1])
def test_path_gradients_at_a_draw(make: Callable, cache_size: int | None) -> None:
    """d log q(x) / dx at x = q.rsample() is what it is at any other tensor with these values."""
    flow = make().double()
    context = random(4, C) if flow.bijection.context_features else None
    law = flow.distribution(context)
    if cache_size is not None:
        transform = BijectionTransform(flow.bijection, context, cache_size)
        law = TransformedDistribution(flow.base, transform)
    x = law.rsample((5,))
    (got,) = torch.autograd.grad(law.log_prob(x).sum(), x, retain_graph=True)
    leaf = x.detach().requires_grad_()
    (want,) = torch.autograd.grad(flow.log_prob(leaf, context).sum(), leaf)
    torch.testing.assert_close(got, want, **exact)
    (half,) = torch.autograd.grad((law.log_prob(x) + x.square().sum(-1)).sum(), x)
    torch.testing.assert_close(half, want + 2 * leaf.detach(), **exact)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_determinants_after_a_backward_through_the_value(cache_size: int) -> None:
    flow = counting_flow()
    transform, z = BijectionTransform(flow.bijection, None, cache_size), random(4, D)
    y = transform(z)
    y.square().mean().backward()
    transform.log_abs_det_jacobian(z, y).mean().backward()
    y = transform(z)
    transform.log_abs_det_jacobian(z, y).sum().backward()
    transform.log_abs_det_jacobian(z, y).sum().backward()  # again, without retain_graph


def test_training_on_one_batch_with_a_fused_optimizer() -> None:
    """Every step sees the parameters of its moment, in the loss and in the validation."""
    flow, data, held = counting_flow(), random(64, D), random(16, D)
    law = TransformedDistribution(flow.base, BijectionTransform(flow.bijection, cache_size=1))
    optimizer = torch.optim.Adam(flow.parameters(), 0.05, fused=True)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(law.log_prob(held), flow.log_prob(held), **exact)
        optimizer.zero_grad()
        (-law.log_prob(data).mean()).backward()
        optimizer.step()


def test_threads_do_not_mix() -> None:
    flow, points = counting_flow(), [random(20, D) for _ in range(8)]
    transform = BijectionTransform(flow.bijection, cache_size=1)
    wants = [flow.bijection.bijection(x)[1] for x in points]

    def work(number: int) -> None:
        x = points[number]
        for _ in range(200):
            y = transform(x)
            torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), wants[number], **exact)
            torch.testing.assert_close(transform.inv(y), x, **exact)

    in_threads(work)


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


def test_copies_after_use() -> None:
    flow = counting_flow(context=True)
    context = random(4, C)
    law, transform = flow.distribution(context), BijectionTransform(flow.bijection, context, 1)
    x = law.rsample()
    y = transform(x)
    for copied in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        twin, other = copied(law), copied(transform)
        torch.testing.assert_close(twin.log_prob(x), law.log_prob(x), **exact)
        assert twin.sample((3,)).shape == (3, 4, D)
        assert torch.equal(other(x), y)
        torch.testing.assert_close(other.inv(other(x)), x, **exact)
        inverse = copied(transform.inv)
        assert torch.equal(inverse(y), transform.inv(y)) and type(inverse) is type(transform.inv)
        assert inverse.inv.inv is inverse and other.inv.inv is other
        density = TransformedDistribution(flow.base, transform.inv)
        points = random(4, D)
        assert torch.equal(copied(density).log_prob(points), density.log_prob(points))
    assert transform.with_cache(1) is transform
    assert transform.with_cache(0)._cache_size == 0 and transform.inv.inv is transform


WITHOUT_PYRO = """
import copy, pickle, sys, torch
from torch.distributions import TransformedDistribution
from fastflow import MAF, BijectionTransform
flow = MAF(3, 2)
law = TransformedDistribution(flow.base, BijectionTransform(flow.bijection).inv)
want = law.log_prob(torch.zeros(3))
for twin in (copy.deepcopy(law), pickle.loads(pickle.dumps(law))):
    assert torch.equal(twin.log_prob(torch.zeros(3)), want)
assert "pyro" not in sys.modules and "zuko" not in sys.modules
"""


def test_inverses_are_pickled_without_the_patches_of_pyro() -> None:
    """Pyro, once imported, mends torch's own inverse transforms, which lose what they invert."""
    subprocess.run([sys.executable, "-c", WITHOUT_PYRO], check=True)


def test_transforms_of_pytorch() -> None:
    """vmap, grad and torch.compile see a distribution as they see its flow."""
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
    """A flow is the guide of a correlated normal, in a plate."""
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
    assert flow.bijection.passes == 150 * {"distribution": 2, "transform": 3}[way]
    assert sum(losses[:10]) / 10 > 0.5 and sum(losses[-10:]) / 10 < 0.1  # a KL divergence
    law = pyro.distributions.Independent(flow.distribution(), 0)
    assert law.expand((4, 3)).to_event(1).shape() == (4, 3, 2)
    assert law.expand_by((5,)).mask(False).sample().shape == (5, 2)
