"""Laws that every bijection obeys, and what each layer promises of itself."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import flow_zoo
import pytest
import torch
from conftest import Target
from torch import Tensor

import fastflow
from fastflow import Chain, ConditionalPlanarFlow, Inverse, PCPMap, Permutation, PlanarFlow

D, C = 4, 3


def bijections() -> dict[str, fastflow.Bijection]:
    torch.manual_seed(1)
    layers = {
        "planar": PlanarFlow(D, steps=3),
        "planar-centred": PlanarFlow(D, steps=3, constraint="centred"),
        "conditional": ConditionalPlanarFlow(D, C, steps=2),
        "conditional-deep": ConditionalPlanarFlow(D, C, steps=2, hidden_features=(8, 8)),
        "pcp": PCPMap(D, 0, (6,)),
        "pcp-conditional": PCPMap(D, C, (6, 5)),
        "permutation": Permutation([2, 0, 3, 1]),
        "inverse": Inverse(PlanarFlow(D, steps=2)),
        "chain": Chain(
            PlanarFlow(D),
            Permutation([3, 2, 1, 0]),
            ConditionalPlanarFlow(D, C),
            Inverse(PlanarFlow(D)),
        ),
    }
    for layer in layers.values():
        step = 0.05 if isinstance(layer, PCPMap) else 0.5  # it takes parameters times 4 to 12
        with torch.no_grad():
            for parameter in layer.parameters():  # away from the identity
                parameter += step * torch.randn_like(parameter)
    return layers


@pytest.fixture(params=bijections())
def bijection(request: pytest.FixtureRequest, target: Target) -> fastflow.Bijection:
    return bijections()[request.param].double().to(target.device)


def random_context(bijection: fastflow.Bijection, *batch: int, **like: object) -> Tensor | None:
    """A context of the size that the bijection takes, or None if it takes none."""
    C = bijection.context_features
    return torch.randn(*batch, C, **like) if C else None


@pytest.fixture
def points(bijection: fastflow.Bijection, target: Target) -> tuple[Tensor, Tensor | None]:
    like = {"dtype": torch.float64, "device": target.device}
    return torch.randn(5, D, **like), random_context(bijection, 5, **like)


def test_inverse_undoes_forward(
    bijection: fastflow.Bijection, points: tuple[Tensor, Tensor | None]
) -> None:
    x, context = points
    y, ladj = bijection(x, context)
    again, back = bijection.inverse(y, context)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, -ladj, rtol=1e-9, atol=1e-9)


def test_ladj_is_the_log_determinant_of_the_jacobian(
    bijection: fastflow.Bijection, points: tuple[Tensor, Tensor | None]
) -> None:
    x, context = points
    for direction in (bijection, bijection.inverse):
        _, ladj = direction(x, context)
        for row in range(len(x)):
            own = None if context is None else context[row]
            jacobian = torch.autograd.functional.jacobian(
                lambda z, own=own, direction=direction: direction(z, own)[0], x[row]
            )
            torch.testing.assert_close(
                ladj[row], torch.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_shapes(bijection: fastflow.Bijection, target: Target, batch: tuple) -> None:
    like = {"dtype": torch.float64, "device": target.device}
    context = random_context(bijection, *batch, **like)
    y, ladj = bijection(torch.randn(*batch, D, **like), context)
    assert y.shape == (*batch, D) and ladj.shape == batch
    y, ladj = bijection(torch.randn(2, *batch, D, **like), context)
    assert y.shape == (2, *batch, D) and ladj.shape == (2, *batch)


def test_copies_and_saves(
    bijection: fastflow.Bijection, points: tuple[Tensor, Tensor | None]
) -> None:
    x, context = points
    want = bijection(x, context)
    buffer = io.BytesIO()
    torch.save(bijection.state_dict(), buffer)
    buffer.seek(0)
    fresh = copy.deepcopy(bijection)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(bijection), pickle.loads(pickle.dumps(bijection)), fresh):
        got = other(x, context)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("constraint", ["paper", "centred"])
@pytest.mark.parametrize("steps", [1, 16])
def test_planar_starts_near_the_identity(steps: int, constraint: str) -> None:
    x = torch.randn(100, 8)
    for flow in (
        PlanarFlow(8, steps, constraint),
        ConditionalPlanarFlow(8, C, steps, (16,), constraint),
    ):
        y, ladj = flow(x, random_context(flow, 100))
        assert (y - x).abs().max() < 0.2 and ladj.abs().max() < 0.5
        assert not torch.equal(y, x)


def test_a_context_reaches_the_links_that_take_one() -> None:
    conditional, plain = ConditionalPlanarFlow(D, C), PlanarFlow(D)
    chain = Chain(plain, Chain(Inverse(conditional), Permutation([3, 2, 1, 0])))
    assert [link.context_features for link in (conditional, plain, chain)] == [C, 0, C]
    x, context = torch.randn(5, D), torch.randn(5, C)
    between, first = plain(x)
    want, second = conditional.inverse(between, context)
    y, ladj = chain(x, context)
    assert torch.equal(y, want.flip(-1)) and torch.equal(ladj, first + second)
    torch.testing.assert_close(chain.inverse(y, context)[0], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "bijection",
    [
        PlanarFlow(2),
        PCPMap(2, 0, (4,)),
        Permutation([1, 0]),
        Inverse(PlanarFlow(2)),
        Chain(PlanarFlow(2), Permutation([1, 0])),
    ],
    ids=lambda bijection: type(bijection).__name__,
)
def test_a_context_that_nothing_takes_is_refused(bijection: fastflow.Bijection) -> None:
    x, context = torch.zeros(3, 2), torch.zeros(3, 1)
    flow = fastflow.Flow(bijection)
    for call in (
        lambda: bijection(x, context),
        lambda: bijection.inverse(x, context),
        lambda: flow.log_prob(x, context),
        lambda: flow.sample((1,), context),
        lambda: flow.rsample_and_log_prob((1,), context),
    ):
        with pytest.raises(TypeError, match="context is a Tensor, must be None"):
            call()


def test_planar_trains() -> None:
    """Gradient ascent on a likelihood raises it: signs of value and log-determinant agree."""
    data = torch.randn(512, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.3]])
    flow = fastflow.Flow(Inverse(PlanarFlow(2, steps=8)))
    optimizer = torch.optim.Adam(flow.parameters(), 0.02)
    losses = []
    for _ in range(150):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_permutation_loads_another_order() -> None:
    permutation, other = Permutation([0, 1, 2]), Permutation([2, 0, 1])
    permutation.load_state_dict(other.state_dict())
    x = torch.randn(3, 3)
    assert torch.equal(permutation.inverse(permutation(x)[0])[0], x)
    assert torch.equal(permutation(x)[0], other(x)[0])


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([0, 0, 1]), r"order is \[0, 0, 1\], must hold each of"),
        (torch.tensor([2.0, 1.0, 0.0]), "order is torch.float32"),
        (torch.tensor([1, 0]), "size mismatch for 1.order"),
    ],
)
def test_permutation_refuses_to_load_what_is_none(order: Tensor, message: str) -> None:
    layers = torch.nn.Sequential(PlanarFlow(3), Permutation([2, 0, 1]))
    with pytest.raises(RuntimeError, match=message):
        layers.load_state_dict(layers.state_dict() | {"1.order": order})
    assert layers[1].order.tolist() == [2, 0, 1] and layers[1].inverse_order.tolist() == [1, 2, 0]


def test_permutation_keeps_an_order_of_its_own() -> None:
    order = torch.tensor([1, 0])
    permutation = Permutation(order)
    order.zero_()
    assert permutation.order.tolist() == [1, 0]


def test_reprs_name_what_matters() -> None:
    assert "features=4, steps=3, constraint='centred'" in repr(PlanarFlow(4, 3, "centred"))
    assert "context_features=2" in repr(ConditionalPlanarFlow(4, 2))
    assert "[1, 0]" in repr(Permutation([1, 0]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PlanarFlow(0), ValueError, "PlanarFlow: features is 0, must be at least 1"),
        (lambda: PlanarFlow(2.0), TypeError, "PlanarFlow: features is 2.0, must be an integer"),
        (lambda: PlanarFlow(2, steps=0), ValueError, "steps is 0"),
        (lambda: PlanarFlow(2, constraint="x"), ValueError, "constraint is 'x'"),
        (lambda: ConditionalPlanarFlow(2, 0), ValueError, "context_features is 0"),
        (lambda: ConditionalPlanarFlow(2, 3, 1, (0,)), ValueError, "hidden_features is 0"),
        (
            lambda: ConditionalPlanarFlow(2, 3)(torch.zeros(1, 2)),
            TypeError,
            "ConditionalPlanarFlow: context is None, must be a torch.Tensor",
        ),
        (
            lambda: ConditionalPlanarFlow(2, 3)(torch.zeros(1, 2), [0.0] * 3),
            TypeError,
            "ConditionalPlanarFlow: context is a list, must be a torch.Tensor",
        ),
        (
            lambda: ConditionalPlanarFlow(2, 3).inverse([0.0] * 2, torch.zeros(3)),
            TypeError,
            "ConditionalPlanarFlow: y is a list, must be a torch.Tensor",
        ),
        (
            lambda: ConditionalPlanarFlow(2, 3).parameters_of(torch.zeros(3, dtype=torch.int64)),
            TypeError,
            "ConditionalPlanarFlow: context is torch.int64, must be a floating-point tensor",
        ),
        (
            lambda: ConditionalPlanarFlow(2, 3)(torch.zeros(1, 2), torch.zeros(1, 4)),
            ValueError,
            r"context has shape \(1, 4\), must be \(..., 3\)",
        ),
        (
            lambda: ConditionalPlanarFlow(2, 3)(torch.zeros(5, 2), torch.zeros(4, 3)),
            ValueError,
            r"ConditionalPlanarFlow: these batches do not broadcast: x \(5,\), context \(4,\)",
        ),
        (
            lambda: fastflow.MADE(2, 1, (8,), 3)(torch.zeros(5, 2), torch.zeros(4, 3)),
            ValueError,
            r"MADE: these batches do not broadcast: x \(5,\), context \(4,\)",
        ),
        (
            lambda: fastflow.MAF(2, 2, (8,), 3).log_prob(torch.zeros(5, 2), torch.zeros(4, 3)),
            ValueError,
            r"Autoregressive: these batches do not broadcast: x \(5,\), context \(4,\)",
        ),
        (
            lambda: fastflow.IAF(2, 2, (8,), 3).log_prob(torch.zeros(5, 2), torch.zeros(4, 3)),
            ValueError,
            r"Autoregressive: these batches do not broadcast: y \(5,\), context \(4,\)",
        ),
        (lambda: ConditionalPlanarFlow(2, 3, 1, 32), TypeError, "hidden_features is 32"),
        (lambda: Permutation([1.0, 0.0]), TypeError, "order is torch.float32"),
        (lambda: Chain(), ValueError, "bijections is empty"),
        (lambda: Chain(torch.nn.Identity()), TypeError, "bijection 0 is a Identity"),
        (lambda: Chain(PlanarFlow(2), PlanarFlow(3)), ValueError, "bijection 1 has 3 features"),
        (
            lambda: Chain(
                PlanarFlow(2), ConditionalPlanarFlow(2, 3), Inverse(ConditionalPlanarFlow(2, 4))
            ),
            ValueError,
            "bijection 2 takes a context of 4 features, another before it one of 3",
        ),
        (lambda: Inverse(torch.nn.Identity()), TypeError, "bijection is a Identity"),
        (
            lambda: Inverse(fastflow.Bijection()),
            TypeError,
            "Inverse: bijection, a Bijection, must have an integer attribute `features`",
        ),
        (
            lambda: fastflow.MAF(2).log_prob([0.0, 0.0]),
            TypeError,
            "MaskedAffineAutoregressive: x is a list, must be a torch.Tensor",
        ),
        (
            lambda: fastflow.IAF(2, context_features=3)(torch.zeros(2), torch.zeros(3).long()),
            TypeError,
            "MaskedAffineAutoregressive: context is torch.int64, must be a floating-point tensor",
        ),
        (
            lambda: ConditionalPlanarFlow(2, 3)(torch.zeros(2), torch.zeros(3).long()),
            TypeError,
            "ConditionalPlanarFlow: context is torch.int64, must be a floating-point tensor",
        ),
        (lambda: Permutation([0, 0]), ValueError, r"order is \[0, 0\]"),
        (lambda: Permutation([]), ValueError, "order is"),
        (lambda: Permutation([1, 0])(torch.zeros(3)), ValueError, "x has shape"),
        (lambda: PlanarFlow(2)(torch.zeros(5, 3)), ValueError, "w has 2 features, z has 3"),
    ],
)
def test_bad_arguments_are_named(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


HALF = (torch.float16, torch.bfloat16)
TYPES = (*HALF, torch.float32, torch.float64)


@pytest.mark.parametrize("name", [*flow_zoo.FLOWS])
@pytest.mark.parametrize("of_parameters", TYPES)
def test_types_are_promoted_together(name: str, of_parameters: torch.dtype) -> None:
    """The image has the promoted type, and its accuracy, whichever argument brings it."""
    flow = flow_zoo.make(name).to(of_parameters)
    exact = copy.deepcopy(flow).double()
    x, context = flow_zoo.points(flow, 5)
    x = x.bfloat16()  # a number in every type, but for some rounding in float16
    context = None if context is None else context.bfloat16()
    for of_x, of_context in itertools.product(TYPES, TYPES if context is not None else TYPES[:1]):
        points, own = x.to(of_x), None if context is None else context.to(of_context)
        want = torch.promote_types(of_x, of_parameters)
        want = want if own is None else torch.promote_types(want, of_context)
        for direction in ("forward", "inverse"):
            image, ladj = getattr(flow.bijection, direction)(points, own)
            assert image.dtype == want and ladj.dtype == torch.promote_types(want, torch.float32)
            other = None if own is None else own.double()
            image_64, ladj_64 = getattr(exact.bijection, direction)(points.double(), other)
            # what goes from layer to layer is rounded to the promoted type
            tolerance = 1e-9 if want == torch.float64 else max(1e-4, 16 * torch.finfo(want).eps)
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(image.double(), image_64, **close)
            torch.testing.assert_close(ladj.double(), ladj_64, **close)


@pytest.mark.parametrize("name", [*flow_zoo.FLOWS])
def test_integers_are_refused(name: str) -> None:
    flow = flow_zoo.make(name)
    x, context = flow_zoo.points(flow, 5)
    cases = [(x.long(), context)]
    cases += [] if context is None else [(x, context.long())]
    for points, own in cases:
        for direction in ("forward", "inverse"):
            with pytest.raises(TypeError, match=r"torch.int64, must be a floating-point tensor"):
                getattr(flow.bijection, direction)(points, own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastflow.MAF(4, 2, (8,)).bijection,
        lambda: fastflow.MaskedAffineAutoregressive(
            4, (8,), adjacency=torch.ones(4, 4).tril(-1).bool()
        ),
        lambda: fastflow.Chain(fastflow.Permutation([1, 0, 3, 2]), fastflow.PlanarFlow(4, 2)),
    ],
    ids=["order", "adjacency", "permutation"],
)
def test_what_was_loaded_in_inference_mode_can_be_trained(make: Callable) -> None:
    bijection = make()
    with torch.inference_mode():
        bijection.load_state_dict(bijection.state_dict())
    for direction in (bijection, bijection.inverse):
        y, ladj = direction(torch.randn(3, 4))
        (y.sum() + ladj.sum()).backward()
