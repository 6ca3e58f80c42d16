"""The affine autoregressive op on every backend, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Target, target_id, targets
from masked_oracle import ACTIVATIONS, SCALES, Problem, affine, affine_inverse, problem
from torch import Tensor
from torch.autograd import forward_ad

import fastflow
from fastflow import masks
from fastflow.functional import autoregressive, autoregressive_inverse, made
from fastflow.functional import stairs as checks
from fastflow.scales import Clamp, Gate, Scale, SoftClip

OPS = {"forward": "autoregressive_forward", "inverse": "autoregressive_inverse"}
PAIRS = [
    pytest.param(direction, target, id=f"{direction}-{target_id(target)}")
    for direction, op in OPS.items()
    for target in targets(op)
]
SIZES = [(1, (3,)), (3, ()), (5, (3,)), (6, (50, 50, 50)), (19, (33, 70)), (40, (90,))]
by_name = pytest.mark.parametrize("scale", SCALES, ids=str)


@pytest.fixture(params=targets("autoregressive_inverse"), ids=target_id)
def target(request: pytest.FixtureRequest) -> Target:
    with request.param.in_force():
        yield request.param


def apply(direction: str, given: Problem, scale: Scale, **options: bool) -> tuple[Tensor, Tensor]:
    op = autoregressive if direction == "forward" else autoregressive_inverse
    return op(given.x, **given.network, scale=scale, **options)


def oracle(direction: str, given: Problem, scale: Scale) -> tuple[Tensor, Tensor]:
    if direction == "forward":
        return affine(given, scale)
    return affine_inverse(given, scale, given.x)


def moderate(given: Problem) -> Problem:
    """Weights a few times smaller: the inverse of a steep flow magnifies what it gets."""
    given = given.to(torch.float64)
    with torch.no_grad():
        for weight in given.weights:
            weight *= 0.5
    return given


def compare(
    direction: str,
    target: Target,
    given: Problem,
    scale: Scale,
    dtype: torch.dtype = torch.float64,
    **options: bool,
) -> None:
    """Values and all gradients, against the dense masked network in float64 with D passes."""
    ours = moderate(given).to(target.device, dtype)
    exact = ours.to("cpu").to(torch.float64)
    with target.in_force():
        found, wanted = apply(direction, ours, scale, **options), oracle(direction, exact, scale)
        cotangents = [torch.randn_like(one) for one in wanted]
        grads = torch.autograd.grad(found, ours.leaves, [c.to(found[0]) for c in cotangents])
    expected = torch.autograd.grad(wanted, exact.leaves, cotangents)
    # a float32 flow of up to 40 features, one after the other, carries rounding errors along
    bar = 1e-9 if dtype == torch.float64 else 3e-4
    for one, other in zip((*found, *grads), (*wanted, *expected)):
        size = float(other.detach().abs().max()) + 1
        error = (one.detach().cpu().double() - other.detach()).abs().max()
        assert one.shape == other.shape and float(error) <= bar * size


@pytest.mark.parametrize(("direction", "target"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize(("features", "hidden"), SIZES)
def test_values_and_gradients(
    direction: str,
    target: Target,
    features: int,
    hidden: tuple[int, ...],
    context: bool,
    dtype: torch.dtype,
) -> None:
    given = problem(target.rows, features, hidden, context=context, activation="tanh")
    compare(direction, target, given, SoftClip(), dtype)


@pytest.mark.parametrize(("direction", "target"), PAIRS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@by_name
def test_every_activation_and_scale(
    direction: str, target: Target, activation: str, residual: bool, scale: Scale
) -> None:
    hidden = (16,) * (3 if residual else 2)
    given = problem(target.rows, 5, hidden, activation=activation, residual=residual, context=True)
    compare(direction, target, given, scale)


@pytest.mark.parametrize(("direction", "target"), PAIRS)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_units_in_any_order_and_without_biases(
    direction: str, target: Target, recompute: bool
) -> None:
    given = problem(target.rows, 7, (19, 23), sorted_units=False, biases=False, context=True)
    compare(direction, target, given, Gate(), recompute=recompute)


@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@by_name
def test_the_inverse_is_exact_to_rounding(target: Target, scale: Scale, context: bool) -> None:
    """The local residual of each feature, which no conditioning magnifies: at most 4 units."""
    features, width = (12, 40) if target.slow else (200, 256)
    given = problem(target.rows, features, (width, width), context=context, activation="relu")
    given = given.to(target.device, torch.float32)
    with torch.no_grad():
        x, ladj = apply("inverse", given, scale)
        exact = given.to("cpu").to(torch.float64)
        at = x.cpu().double()
        y, back = affine(exact, scale, at)
        m, a = exact.outputs(at).unflatten(-1, (features, 2)).unbind(-1)
        size = torch.maximum(given.x.cpu().double().abs(), at.abs() * a.abs().exp().clamp(max=1e3))
    # float32 sums of 256 products of order one move m and a by a few roundings
    slack = 64 * 2**-24 * (1 + m.abs() + a.abs() * (at.abs() + 1))
    residual = (y - given.x.cpu().double()).abs()
    assert (residual <= 4 * 2**-23 * size + slack).all()
    torch.testing.assert_close(ladj.cpu().double(), -back, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("direction", OPS)
def test_gradcheck(target: Target, direction: str) -> None:
    rows, features, width = (1, 2, 2) if target.slow else (2, 3, 5)
    given = problem(rows, features, (width, width), context=True, activation="tanh")
    given = moderate(given).to(target.device)
    scales = [scale for scale in SCALES if not isinstance(scale, Clamp)]  # straight-through
    if target.slow:
        scales = [scales[0], scales[-1]]  # a plain one and the gate

    for scale in scales:

        def function(*leaves: Tensor, scale: Scale = scale) -> tuple[Tensor, Tensor]:
            network = given.network | {
                "weights": leaves[1:4],
                "biases": leaves[4:7],
                "terms": [leaves[7], None, None],
            }
            op = autoregressive if direction == "forward" else autoregressive_inverse
            return op(leaves[0], **network, scale=scale)

        assert torch.autograd.gradcheck(
            function, given.leaves, nondet_tol=0.0, fast_mode=target.slow
        )
    assert torch.autograd.gradgradcheck(
        function, given.leaves, nondet_tol=0.0, fast_mode=target.slow
    )


@pytest.mark.parametrize("direction", OPS)
def test_transforms_of_pytorch(target: Target, direction: str) -> None:
    """vmap, func.grad, jacrev and forward mode answer as autograd and the oracle do."""
    given = moderate(problem(4, 3, (6,), activation="tanh")).to(target.device)
    op = autoregressive if direction == "forward" else autoregressive_inverse

    def ours(x: Tensor) -> Tensor:
        y, ladj = op(x, **given.network)
        return y.sin().sum(-1) + ladj.square()

    def theirs(x: Tensor) -> Tensor:
        given.x = x
        y, ladj = oracle(direction, given, SoftClip())
        return y.sin().sum(-1) + ladj.square()

    x = given.x.detach()
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(torch.func.vmap(ours)(x), theirs(x), **close)
    summed = [lambda v, f=f: f(v).sum() for f in (ours, theirs)]
    torch.testing.assert_close(
        torch.func.grad(summed[0])(x), torch.func.grad(summed[1])(x), **close
    )
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(theirs)(x), **close)
    torch.testing.assert_close(torch.func.hessian(summed[0])(x), torch.func.hessian(summed[1])(x))
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        one, other = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))) for f in (ours, theirs)
        )
    assert one.tangent.abs().max() > 0
    torch.testing.assert_close(one.tangent, other.tangent, **close)


@pytest.mark.parametrize("direction", OPS)
def test_rows_are_independent(target: Target, direction: str) -> None:
    given = problem(target.rows, 6, (30, 30)).to(target.device, torch.float32)
    y, ladj = apply(direction, given, SoftClip())
    with torch.no_grad():
        given.x[1] = torch.nan
    again, other = apply(direction, given, SoftClip())
    rest = torch.arange(target.rows) != 1
    assert torch.equal(y[rest], again[rest]) and torch.equal(ladj[rest], other[rest])
    assert again[1].isnan().any() and other[1].isnan()


def test_extreme_raw_scales_are_finite(target: Target) -> None:
    """|a| up to 200: a finite value and finite gradients in both directions."""
    a = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0], device=target.device)
    given = problem(5, 1, ()).to(target.device, torch.float32)
    for scale in SCALES:
        if isinstance(scale, Gate):
            continue  # its s has no lower bound: exp(200) is no float32
        for direction in OPS:
            weight = torch.zeros(2, 1, device=target.device, requires_grad=True)
            term = torch.stack([torch.zeros_like(a), a], -1).requires_grad_()
            op = autoregressive if direction == "forward" else autoregressive_inverse
            y, ladj = op(given.x, [weight], None, given.stairs, [term], scale=scale)
            (grad,) = torch.autograd.grad(y.sum() + ladj.sum(), term)
            assert y.isfinite().all() and ladj.isfinite().all() and grad.isfinite().all(), scale


@pytest.mark.parametrize("degrees", [[1, 1, 3], [2, 3, 3], [1, 1, 1], [3, 3, 3], [0, 0, 0]])
def test_residual_blocks_without_units_of_some_degrees(target: Target, degrees: list[int]) -> None:
    """The last level of a block knows no feature before its first level does."""
    given = problem(5, 4, (3, 3, 3), residual=True, activation="tanh")
    given.degrees[2] = torch.tensor(degrees)
    compare("inverse", target, given, SoftClip())


@pytest.mark.parametrize("direction", OPS)
def test_networks_that_are_not_autoregressive_are_refused(target: Target, direction: str) -> None:
    """Whichever output it is that sees too much, in both directions, and again the second time."""
    given = problem(3, 4, (8, 8, 8), residual=True).to(target.device, torch.float32)
    apply(direction, given, SoftClip())
    for feature in range(4):
        position = int(given.degrees[0][feature]) - 1
        if position == 3:
            continue  # there is no hidden unit that the last feature does not see
        given.degrees[-1][2 * feature : 2 * feature + 2] += 1
        loose = given.stairs
        given.degrees[-1][2 * feature : 2 * feature + 2] -= 1
        for _ in range(2):
            with pytest.raises(ValueError, match=f"feature at position {position} of the order"):
                op = autoregressive if direction == "forward" else autoregressive_inverse
                op(given.x, **given.network | {"stairs": loose})


def test_stairs_that_change_are_looked_at_again() -> None:
    given = problem(3, 4, (8,))
    stairs = given.stairs
    autoregressive(given.x, **given.network | {"stairs": stairs})
    stairs.copy_(masks.staircase(given.degrees, strict=False))
    with pytest.raises(ValueError, match="stairs is not autoregressive"):
        autoregressive(given.x, **given.network | {"stairs": stairs})
    with torch.inference_mode():  # its tensors do not tell that they change
        stairs = given.stairs.clone()
        autoregressive(given.x, **given.network | {"stairs": stairs})


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("op", [autoregressive, autoregressive_inverse, made])
def test_stairs_are_those_of_the_weights(target: Target, op: Callable, known: bool) -> None:
    """As many units in all are not enough, though the stairs were seen with others."""
    given, other = (problem(3, 2, widths).to(target.device) for widths in ((5, 5), (4, 6)))
    stairs = given.stairs
    if known:
        op(given.x, **given.network | {"stairs": stairs})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"levels of \(2, 4, 6, 4\) units"):
            op(other.x, **other.network | {"stairs": stairs})


@pytest.mark.parametrize("direction", OPS)
def test_stairs_changed_behind_the_back_of_pytorch_compute_nothing(direction: str) -> None:
    """The compiled op itself looks at them, at every call."""
    if "cpp" not in fastflow.backends.available("cpu"):
        pytest.skip("the compiled backend is not there")
    given = problem(3, 4, (8, 8, 8), residual=True)
    op = autoregressive if direction == "forward" else autoregressive_inverse
    tight, loose = given.stairs, masks.staircase(given.degrees, strict=False)
    given.degrees[3] = given.degrees[3].flip(0)
    for wrong in (loose, given.stairs):  # an output sees its feature; blocks that do not fit
        stairs = tight.clone()
        op(given.x, **given.network | {"stairs": stairs})
        stairs.data.copy_(wrong)
        with pytest.raises((ValueError, RuntimeError), match="stairs"):
            op(given.x, **given.network | {"stairs": stairs})


def test_stairs_made_in_inference_mode_leave_nothing_behind() -> None:
    given = problem(3, 4, (8,))
    with torch.inference_mode(), fastflow.use_backend("reference"):
        stairs = given.stairs.clone()
        before = len(checks._checked)
        for _ in range(3):
            autoregressive(given.x, **given.network | {"stairs": stairs})
    assert len(checks._checked) == before


def test_the_raw_op_does_not_walk_off_stairs_that_see_themselves() -> None:
    if "cpp" not in fastflow.backends.available("cpu"):
        pytest.skip("the compiled backend is not there")
    given = problem(3, 4, (8,), residual=False)
    loose = masks.staircase(given.degrees, strict=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="an output sees its own feature"):
        torch.ops.fastflow.autoregressive_inverse(
            *(given.x, [], given.weights, given.biases, loose, 0, False, 0, *SoftClip().constants),
            False,
        )
