"""The affine autoregressive layer on every backend, both directions, and the flows made of it."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from conftest import Target, target_id, targets
from masked_oracle import ACTIVATIONS, SCALES, Problem, affine, affine_inverse, problem
from torch import Tensor
from torch.autograd import forward_ad

import fastflow
from fastflow import IAF, MAF, MaskedAffineAutoregressive, masks
from fastflow.functional import autoregressive, autoregressive_inverse
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


def test_log_prob_of_a_sample_is_the_returned_one(target: Target) -> None:
    D, H = (4, 20) if target.slow else (12, 48)
    for flow in (MAF(D, 3, (H, H), context_features=2), IAF(D, 3, (H,), context_features=2)):
        flow = flow.to(target.device).double()
        context = torch.randn(5, 2, device=target.device, dtype=torch.float64)
        x, log_prob = flow.rsample_and_log_prob((7,), context)
        assert x.shape == (7, 5, D) and log_prob.shape == (7, 5)
        torch.testing.assert_close(flow.log_prob(x, context), log_prob)


@pytest.mark.parametrize("order", [None, "reverse", "random"])
@by_name
def test_ladj_is_the_jacobian_determinant(target: Target, scale: Scale, order: str) -> None:
    rows, features, hidden = (1, 3, (8,)) if target.slow else (3, 4, (16, 16))
    layer = MaskedAffineAutoregressive(
        features, hidden, activation="tanh", order=order, scale=scale
    )
    layer = layer.to(target.device).double()
    x = torch.randn(rows, features, device=target.device, dtype=torch.float64)
    for direction in (layer.forward, layer.inverse):
        for row in x:
            jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(v)[0], row)
            _, want = torch.linalg.slogdet(jacobian)
            torch.testing.assert_close(direction(row)[1], want, rtol=0, atol=1e-10)
            before = layer.network.order[:, None] < layer.network.order
            assert (jacobian[before] == 0).all()


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
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(target: Target, direction: str, compiler: str) -> None:
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("interpreted kernels are Python that Dynamo cannot trace")
    if target.backend == "reference" and direction == "inverse":
        pytest.skip("its sweep reads the stairs, so that Dynamo would have to know their values")
    torch._dynamo.reset()
    layer = MaskedAffineAutoregressive(5, (16,), context_features=2).to(target.device)
    function = layer.forward if direction == "forward" else layer.inverse
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
    for rows in (3, 8, 21):
        x = torch.randn(rows, 5, device=target.device, requires_grad=True)
        context = torch.randn(rows, 2, device=target.device)
        results = []
        for f in (compiled, function):
            y, ladj = f(x, context)
            leaves = [x, *layer.parameters()]
            results.append([y, ladj, *torch.autograd.grad(y.sum() + ladj.sum(), leaves)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


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


def test_half_precision(target: Target) -> None:
    layer = MaskedAffineAutoregressive(6, (16,), context_features=3).to(target.device)
    x = torch.randn(5, 6, device=target.device)
    context = torch.randn(5, 3, device=target.device)
    want, _ = layer(x, context)
    with torch.autocast(target.device, torch.bfloat16):
        y, ladj = layer(x, context)
    assert ladj.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0, atol=0.05)  # the context layer is bfloat16
    half = copy.deepcopy(layer).half()
    y, ladj = half(x.half(), context.half())
    assert y.dtype == torch.float16 and ladj.dtype == torch.float32
    assert half.inverse(y, context.half())[0].dtype == torch.float16


def test_layers_survive_copies_and_checkpoints(target: Target) -> None:
    flow = MAF(5, 2, (16,), order="random").to(target.device)
    x = torch.randn(4, 5, device=target.device)
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    fresh = MAF(5, 2, (16,), order="random").to(target.device)
    fresh.load_state_dict(flow.state_dict())
    for twin in (copy.deepcopy(flow), torch.load(buffer, weights_only=False), fresh):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))
        assert torch.equal(twin.bijection(x)[0], flow.bijection(x)[0])


def test_training_in_either_direction_needs_one_set_of_activations(target: Target) -> None:
    """Saved memory: the hidden layers and outputs once, not D times; none of them if recomputed."""
    rows, features, hidden = 5 if target.slow else 256, 8, (64, 64)
    sizes = {}
    for recompute in (False, True):
        layer = MaskedAffineAutoregressive(features, hidden, recompute=recompute).to(target.device)
        x = torch.randn(rows, features, device=target.device)
        for direction in (layer.forward, layer.inverse):
            saved: dict[int, int] = {}

            def pack(tensor: Tensor, saved: dict = saved) -> Tensor:
                saved[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                direction(x)
            numbers = sum(p.numel() for p in layer.parameters()) + layer.network.stairs.numel()
            sizes[recompute, direction.__name__] = sum(saved.values()) - numbers
    points = 2 * rows * features
    kept = rows * (sum(hidden) + 2 * features)
    assert sizes[False, "forward"] <= kept + points and sizes[False, "inverse"] <= kept + points
    assert sizes[True, "forward"] <= points and sizes[True, "inverse"] <= points


@pytest.mark.parametrize("flow", [MAF, IAF])
def test_density_integrates_to_one(flow: type) -> None:
    model = flow(2, 3, (32, 32), activation="tanh").double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the identity
            parameter += 0.2 * torch.randn_like(parameter)
        side = torch.linspace(-14, 14, 701, dtype=torch.float64)
        grid = torch.cartesian_prod(side, side)
        mass = model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert math.isclose(float(mass), 1, abs_tol=1e-4)


def test_bad_arguments() -> None:
    for scale in ("tanh", 3):
        with pytest.raises((TypeError, ValueError), match="MaskedAffineAutoregressive: scale is"):
            MaskedAffineAutoregressive(3, scale=scale)
    with pytest.raises(ValueError, match="MAF: order is 'natural', must be"):
        MAF(3, order="natural")
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\), must be \(..., 3\)"):
        MaskedAffineAutoregressive(3)(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="context is None, must be a tensor"):
        MaskedAffineAutoregressive(3, context_features=2)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="last of weights has 4 outputs, must have two for each"):
        given = problem(2, 3, (), per_feature=1)
        autoregressive(given.x, [torch.zeros(4, 3)], None, torch.zeros(11, dtype=torch.int32))
    with pytest.raises(ValueError, match="slope is 2"):
        SoftClip(2)


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
